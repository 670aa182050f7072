"""The experts are the package apt-plugin-moe."""

from apt_model._moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {"MoERouter": "apt_plugin_moe.router:MoERouter"},
    package="apt-plugin-moe",
)
