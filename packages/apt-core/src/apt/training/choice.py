"""The plugins of a run: chosen, found, and the profile held against what they bring.

All of it before torch is imported, which takes seconds: whoever made a slip is told at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from apt.checkpoint.lock import recorded_plugins, requirements_of
from apt.core.discovery import Plugins, choose, discover
from apt.core.profiles import Profile, check_sections


def choose_plugins(
    profile: Profile,
    lock: Mapping[str, Any] | None = None,
    *,
    plugins: Iterable[str] | None = None,
    no_plugin: Iterable[str] = (),
    no_plugins: bool = False,
    strict: bool = False,
) -> Plugins:
    """The plugins that a run may use; their `registry` is the run's own.

    Args:
        lock: what the run was made with that is gone on with.
        plugins, no_plugin, no_plugins, strict: as the command line's options of those names.

    Raises:
        ConfigError: the section of a provider does not fit, or, where everything is to be strict, has no reader.
        PluginError: the choice cannot be had.
    """
    selection = choose(
        plugins=plugins,
        no_plugin=no_plugin,
        no_plugins=no_plugins,
        profile=profile.config.plugins,
        recorded=recorded_plugins(lock) if lock else None,
    )
    found = discover(selection, strict=strict)
    found.registry = found.registry_of_a_run()
    found.registry.recorded = requirements_of(lock) if lock else {}
    check_sections(profile.config, found.registry, profile.origins, found.absent, strict=strict)
    return found
