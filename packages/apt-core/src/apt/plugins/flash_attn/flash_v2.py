"""flash-attn is the package apt-plugin-flash."""

from apt_model._moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {"FlashAttentionV2": "apt_plugin_flash.flash:FlashAttention"},
    package="apt-plugin-flash",
)
