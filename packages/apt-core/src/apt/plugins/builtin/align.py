"""The alignment is the package apt-plugin-align."""

from apt_model._moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {"BistateAlign": "apt_plugin_align.align:BistateAlign"},
    package="apt-plugin-align",
)
