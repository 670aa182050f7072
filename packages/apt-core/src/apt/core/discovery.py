"""Plugins: found through their entry points, selected before any of them is imported, loaded one by one.

Whatever a plugin raises while it loads disables that plugin alone, with a status and a reason that `apt plugin-list`
shows.
"""

from __future__ import annotations

import importlib
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

from apt.core.catalogue import ENTRY_POINTS, PLUGINS, how_to_install
from apt.core.errors import HINT, AptError, AptWarning, PluginError, did_you_mean
from apt.core.hooks import Hooks
from apt.core.registry import Registry
from apt.hookspecs import API_VERSION

GROUP = "apt.providers"
BUILTIN = "builtin"
"""Core's own plugin: it brings the defaults, and so cannot be left out."""

Status = Literal["ok", "disabled", "api-mismatch", "missing-dependency", "conflict", "import-error"]


@dataclass(slots=True)
class Plugin:
    """One entry point, and what became of it."""

    name: str
    module_name: str
    distribution: str | None = None
    version: str | None = None
    source: str = "installed"
    """"installed", or "editable: PATH"."""
    status: Status = "ok"
    reason: str | None = None
    fix: str | None = None
    import_ms: float | None = None
    module: ModuleType | None = None

    def refuse(self, status: Status, reason: str, fix: str | None = None) -> None:
        self.status, self.reason, self.fix = status, reason, fix


@dataclass(frozen=True, slots=True)
class Selection:
    """Which plugins may be used."""

    names: tuple[str, ...] | None = None
    """None: all that are installed."""
    excluded: tuple[str, ...] = ()
    source: str = "default"
    """Where `names` was said, for messages."""


@dataclass(slots=True)
class Plugins:
    """What discovery found, and the registry that the loaded plugins filled."""

    found: list[Plugin]
    registry: Registry = field(default_factory=Registry)
    absent: tuple[str, ...] = ()
    """The packages that were asked for, are not installed, and have been named in a warning."""

    def registry_of_a_run(self) -> Registry:
        """A view for one run: what the plugins registered, and what scripts have in the global registry."""
        from apt.core.registry import registry as global_registry

        view = self.registry.view()
        view.merge(global_registry, plugin="script")
        return view

    @property
    def loaded(self) -> list[Plugin]:
        return [plugin for plugin in self.found if plugin.module is not None]


def find_plugins() -> list[Plugin]:
    """Every installed plugin, by name, without importing any."""
    from importlib_metadata import entry_points

    found = [_describe(point) for point in entry_points(group=GROUP)]
    if not any(plugin.name == BUILTIN for plugin in found):
        # A source tree on the path, without its metadata.
        found.append(Plugin(BUILTIN, "apt.builtin.plugin", "apt-core", source="source tree"))
    counts = Counter(plugin.name for plugin in found)
    for plugin in found:
        if counts[plugin.name] > 1:
            owners = " and ".join(sorted({str(p.distribution) for p in found if p.name == plugin.name}))
            plugin.refuse("conflict", f"{owners} both bring a plugin called {plugin.name!r}", "uninstall one of them")
    return sorted(found, key=lambda plugin: (plugin.name != BUILTIN, plugin.name))


def choose(
    *,
    plugins: Iterable[str] | None = None,
    no_plugin: Iterable[str] = (),
    no_plugins: bool = False,
    profile: Iterable[str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Selection:
    """The selection: command line over environment over profile.

    Args:
        plugins, no_plugin, no_plugins: the options of those names.
        profile: the profile's `plugins`.
        environ: read for APT_PLUGINS and APT_DISABLE_PLUGINS, names apart by commas or spaces.
    """
    names: tuple[str, ...] | None
    if no_plugins:
        names, source = (), "--no-plugins"
    elif plugins is not None:
        names, source = tuple(plugins), "--plugins"
    elif "APT_PLUGINS" in environ:
        names, source = _split(environ["APT_PLUGINS"]), "APT_PLUGINS"
    elif profile is not None:
        names, source = tuple(profile), "the profile's plugins"
    else:
        names, source = None, "default"
    # Whom the command line names is not left out by the environment.
    disabled = () if plugins is not None else _split(environ.get("APT_DISABLE_PLUGINS", ""))
    return Selection(names, (*no_plugin, *disabled), source)


def select(found: list[Plugin], selection: Selection, *, strict: bool = False) -> tuple[str, ...]:
    """Mark what is not selected as disabled; return the packages that are asked for and absent, each warned of once.

    Raises:
        PluginError: a name that is neither installed nor in the catalogue; with `strict`, one that is not installed.
    """
    installed = {plugin.name for plugin in found}
    absent: dict[str, list[str]] = {}
    for name, source in [
        *((name, selection.source) for name in selection.names or ()),
        *((name, "--no-plugin or APT_DISABLE_PLUGINS") for name in selection.excluded),
    ]:
        if ENTRY_POINTS.get(name, name) in installed:
            continue
        if name not in PLUGINS:
            near = did_you_mean(name, installed | set(PLUGINS), cutoff=HINT)
            known = ", ".join(sorted(installed - {BUILTIN})) or "none"
            raise PluginError(
                f"{source}: there is no plugin {name!r}",
                hint=f"did you mean {near!r}?" if near else f"installed: {known}",
            )
        if name not in selection.excluded:
            absent.setdefault(PLUGINS[name], []).append(name)
    for package, names in absent.items():
        one, fix = len(names) == 1, how_to_install(package)
        message = f"{selection.source}: " + (
            f"plugin {names[0]!r} is not installed" if one else f"plugins {_all_of(names)} are not installed"
        )
        if strict:
            raise PluginError(message, hint=fix)
        it = "it" if one else "them"
        warnings.warn(f"{message}; going on without {it} (to get {it}: {fix})", AptWarning, stacklevel=3)
    wanted = None if selection.names is None else {ENTRY_POINTS.get(name, name) for name in selection.names}
    excluded = {ENTRY_POINTS.get(name, name) for name in selection.excluded}
    if BUILTIN in excluded:
        message = f"plugin {BUILTIN!r} is apt-core's own and cannot be left out"
        if strict:
            raise PluginError(message)
        warnings.warn(message, AptWarning, stacklevel=3)
    for plugin in found:
        if plugin.name == BUILTIN or plugin.status != "ok":
            continue
        if plugin.name in excluded:
            plugin.refuse("disabled", "left out by --no-plugin or APT_DISABLE_PLUGINS")
        elif wanted is not None and plugin.name not in wanted:
            plugin.refuse("disabled", f"not among {selection.source}")
    return tuple(absent)


def load(found: list[Plugin]) -> Plugins:
    """Import what is selected and let it register its providers."""
    plugins = Plugins(found)
    for plugin in found:
        if plugin.status == "ok":
            _load_one(plugin, plugins.registry)
    return plugins


def discover(selection: Selection | None = None, *, strict: bool = False) -> Plugins:
    """Find, select and load. With `strict`, a selected plugin that does not load is an error.

    Raises:
        PluginError: see `select`; with `strict`, for any selected plugin whose status is not ok.
    """
    found = find_plugins()
    absent = select(found, selection if selection is not None else choose(), strict=strict)
    plugins = load(found)
    plugins.absent = absent
    for plugin in plugins.found:
        if plugin.status in ("ok", "disabled"):
            continue
        message = f"plugin {plugin.name!r} ({plugin.distribution}) is not used: {plugin.status}: {plugin.reason}"
        if strict:
            raise PluginError(message, hint=plugin.fix)
        warnings.warn(message + (f" (to mend it: {plugin.fix})" if plugin.fix else ""), AptWarning, stacklevel=2)
    return plugins


def load_installed(registry: Registry) -> None:
    """Fill the global registry with what the environment selects."""
    registry.merge(discover().registry)


def _load_one(plugin: Plugin, registry: Registry) -> None:
    started = time.perf_counter()
    try:
        module = importlib.import_module(plugin.module_name)
        theirs = getattr(module, "API_VERSION", None)
        if not _compatible(theirs, API_VERSION):
            declared = "no API_VERSION" if theirs is None else f"API_VERSION = {theirs}"
            newer = isinstance(theirs, tuple) and theirs > API_VERSION
            fix = (
                "upgrade apt-core" if newer else f"ask for a version of {plugin.distribution} for API {API_VERSION[0]}"
            )
            plugin.refuse("api-mismatch", f"it declares {declared}, this apt-core has {API_VERSION}", fix)
            return
        # Registered on the side first: a plugin that fails half-way leaves nothing behind.
        own = Registry()
        hooks = Hooks()
        hooks.add(module, plugin.name)
        with own.owned_by(plugin.name, plugin.distribution, plugin.version):
            # Straight through pluggy: here a failure is to be raised.
            hooks.manager.hook.apt_register_providers(registry=own)
        registry.merge(own)
        plugin.module = module
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        if plugin.module_name == missing or plugin.module_name.startswith(f"{missing}."):
            plugin.refuse(
                "import-error", f"its module {plugin.module_name!r} does not exist", f"reinstall {plugin.distribution}"
            )
        else:
            plugin.refuse(
                "missing-dependency", f"it needs {missing!r}, which is not installed", f"pip install {missing}"
            )
    except (Exception, SystemExit) as error:
        text = str(error) if isinstance(error, AptError) else f"{type(error).__name__}: {error}"
        first_line = text.partition("\n")[0]
        plugin.refuse("import-error", first_line, f"upgrade or uninstall {plugin.distribution or plugin.module_name}")
    finally:
        plugin.import_ms = round((time.perf_counter() - started) * 1000, 2)


def _compatible(theirs: object, ours: tuple[int, int]) -> bool:
    fits = isinstance(theirs, tuple) and len(theirs) == 2 and all(isinstance(part, int) for part in theirs)
    return fits and theirs[0] == ours[0] and theirs[1] <= ours[1]  # type: ignore[index]


def _describe(point: Any) -> Plugin:
    plugin = Plugin(point.name, point.value)
    if point.dist is not None:
        plugin.distribution, plugin.version = _name_and_version(point.dist)
        plugin.source = _source(point.dist.read_text("direct_url.json")) or plugin.source
    return plugin


def _source(direct_url: str | None) -> str | None:
    """Where an editable install lies; None for any other."""
    if direct_url is None:
        return None
    import json

    try:
        origin = json.loads(direct_url)
        return f"editable: {origin['url'].removeprefix('file://')}" if origin["dir_info"]["editable"] else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _name_and_version(distribution: Any) -> tuple[str | None, str | None]:
    """From the head of its METADATA; the mail parser behind `distribution.metadata` costs 10 ms, and 1 ms a file."""
    fields: dict[str, str] = {}
    for line in (distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or "").splitlines():
        if not line:
            break
        key, _, value = line.partition(":")
        fields.setdefault(key.lower(), value.strip())
    return fields.get("name"), fields.get("version")


def _all_of(names: list[str]) -> str:
    return " and ".join(map(repr, dict.fromkeys(names)))


def _split(names: str) -> tuple[str, ...]:
    return tuple(names.replace(",", " ").split())
