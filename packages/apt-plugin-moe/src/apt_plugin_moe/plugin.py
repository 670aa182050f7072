"""What APT loads of this package: the router, as an import string."""

from typing import Any

from apt.hookspecs import hookimpl

API_VERSION = (1, 1)


@hookimpl
def apt_register_providers(registry: Any) -> None:
    registry.register(
        "router",
        "topk_moe",
        "apt_plugin_moe.router:MoERouter",
        version="1.0.0",
        section="moe",
        config="apt_plugin_moe.config:MoEConfig",
    )
