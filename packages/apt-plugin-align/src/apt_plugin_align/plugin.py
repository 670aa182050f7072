"""What APT loads of this package: the contract it was written for, and what it registers."""

from apt.api import Registry, hookimpl

API_VERSION = (1, 1)


@hookimpl
def apt_register_providers(registry: Registry) -> None:
    registry.register(
        "align",
        "bistate_default",
        "apt_plugin_align.align:BistateAlign",
        version="1.0.0",
        section="bistate",
        config="apt_plugin_align.config:BistateConfig",
    )
