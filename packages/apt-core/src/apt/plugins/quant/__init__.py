"""The schemes are the package apt-plugin-quant."""

from apt_model._moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "Int8Weights": "apt_plugin_quant.providers:Int8Weights",
        "Int8Dynamic": "apt_plugin_quant.providers:Int8Dynamic",
        "Int4Weights": "apt_plugin_quant.providers:Int4Weights",
    },
    package="apt-plugin-quant",
)
