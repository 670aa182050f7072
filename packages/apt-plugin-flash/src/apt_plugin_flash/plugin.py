"""What APT loads of this package: its attentions, as import strings. All of them read the section `model.mha`."""

from typing import Any

from apt.hookspecs import hookimpl

API_VERSION = (1, 1)


@hookimpl
def apt_register_providers(registry: Any) -> None:
    for name, target in {
        "flash_sdpa": "apt_plugin_flash.sdpa:SDPAAttention",
        "flash_v2": "apt_plugin_flash.flash:FlashAttention",
        "flex": "apt_plugin_flash.flex:FlexAttention",
    }.items():
        config = "apt_plugin_flash.config:WindowedMHAConfig"
        registry.register("attention", name, target, version="1.0.0", section="mha", config=config)
