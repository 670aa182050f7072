"""Plugins: found through their entry points, selected before any of them is imported, and imported only where a run
calls on them: what they register is known without (see `apt.core.scan`).

Whatever a plugin raises while it loads disables that plugin alone, with a status and a reason that `apt plugin-list`
shows.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from apt.core.catalogue import ENTRY_POINTS, PLUGINS, how_to_install, how_to_restore
from apt.core.distributions import editable_path, name_and_version, record_sha256, sources_sha256, sources_stamp
from apt.core.errors import HINT, AptWarning, PluginError, did_you_mean
from apt.core.examine import Contents, Status, examine
from apt.core.registry import Registration, Registry

GROUP = "apt.providers"
BUILTIN = "builtin"
"""Core's own plugin: it brings the defaults, and so cannot be left out."""


NO_PLUGINS = "--no-plugins"


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
    """What importing it took when it was looked into, in a process that had imported those before it."""
    hooks: tuple[str, ...] = ()
    """The hooks that it implements."""
    loaded: bool = False
    """Whether what it registers can be used."""
    module: ModuleType | None = None
    """The module, once something has called on it."""
    metadata: Any = field(default=None, repr=False, compare=False)
    """Its `importlib_metadata.Distribution`."""

    def refuse(self, status: Status, reason: str, fix: str | None = None) -> None:
        self.status, self.reason, self.fix = status, reason, fix

    @property
    def label(self) -> str:
        """How messages name it: "plugin 'moe' (apt-plugin-moe)"."""
        return f"plugin {self.name!r}" + (f" ({self.distribution})" if self.distribution else "")

    @property
    def entry_point(self) -> str:
        return f"{self.name} = {self.module_name} ({self.distribution} {self.version})"

    def sha256(self) -> str | None:
        """Of its distribution's files, as its RECORD has them; of its sources, where those may change after it was
        installed or nothing was recorded."""
        return self._record() or sources_sha256(self.module_name)

    def stamp(self) -> str:
        """Another text whenever its files are others: cheaper than `sha256`, and good for this machine alone."""
        return self._record() or sources_stamp(self.module_name)

    def _record(self) -> str | None:
        as_installed = self.metadata is not None and self.source == "installed"
        return record_sha256(self.metadata.read_text("RECORD")) if as_installed else None


@dataclass(frozen=True, slots=True)
class Selection:
    """Which plugins may be used."""

    names: tuple[str, ...] | None = None
    """None: all that are installed."""
    excluded: tuple[str, ...] = ()
    source: str = "default"
    """Where `names` was said, for messages."""
    recorded: Mapping[str, str] = field(default_factory=dict)
    """{plugin: requirement} of what a run was made with, such as {"moe": "apt-plugin-moe==2.0.0"}."""


@dataclass(slots=True)
class Plugins:
    """What discovery found, and the registry that the loaded plugins filled."""

    found: list[Plugin]
    registry: Registry = field(default_factory=Registry)
    absent: tuple[str, ...] = ()
    """The packages that were asked for, are not installed, and have been named in a warning."""
    strict: bool = False

    def registry_of_a_run(self) -> Registry:
        """A view for one run: what the plugins registered, and what scripts have in the global registry."""
        from apt.core.registry import registry as global_registry

        view = self.registry.view()
        view.merge(global_registry, plugin="script")
        return view

    def used(self, names: Container[str], hooks: Container[str]) -> list[Plugin]:
        """What a run calls on: core's own plugin, those of these names, and those that implement one of these hooks."""
        return [
            plugin
            for plugin in self.found
            if plugin.loaded
            and (plugin.name == BUILTIN or plugin.name in names or any(hook in hooks for hook in plugin.hooks))
        ]

    def listeners(self, hooks: Container[str]) -> list[Plugin]:
        """The plugins that implement one of these hooks, imported now if they were not yet.

        One that cannot be imported here, though it could be when it was looked into, is passed over with a warning.

        Raises:
            PluginError: that, where everything is to be strict.
        """
        listeners = [plugin for plugin in self.found if plugin.loaded and any(hook in hooks for hook in plugin.hooks)]
        for plugin in listeners:
            if plugin.module is None:
                contents, plugin.module = examine(plugin.name, plugin.module_name, plugin.distribution)
                if plugin.module is None:
                    plugin.refuse(contents.status, contents.reason or "", contents.fix)
                    _complain(plugin, self.strict)
        return [plugin for plugin in listeners if plugin.module is not None]


def find_plugins() -> list[Plugin]:
    """Every installed plugin, by name, without importing any."""
    from importlib_metadata import entry_points

    found = [_describe(point) for point in entry_points(group=GROUP)]
    if not any(plugin.name == BUILTIN for plugin in found):
        # A source tree on the path, without its metadata.
        from apt import __version__

        found.append(Plugin(BUILTIN, "apt.builtin.plugin", "apt-core", __version__, source="source tree"))
    counts = Counter(plugin.name for plugin in found)
    for plugin in found:
        if counts[plugin.name] > 1:
            owners = " and ".join(sorted({str(p.distribution) for p in found if p.name == plugin.name}))
            plugin.refuse("conflict", f"{owners} both bring a plugin called {plugin.name!r}", "uninstall one of them")
        elif ":" in plugin.module_name:
            plugin.refuse(
                "import-error",
                f"its entry point names {plugin.module_name!r}, and a plugin is a module",
                f'its authors write: {plugin.name} = "{plugin.module_name.partition(":")[0]}"',
            )
    return sorted(found, key=lambda plugin: (plugin.name != BUILTIN, plugin.name))


def choose(
    *,
    plugins: Iterable[str] | None = None,
    no_plugin: Iterable[str] = (),
    no_plugins: bool = False,
    profile: Iterable[str] | None = None,
    recorded: Mapping[str, str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Selection:
    """The selection: command line over environment over profile.

    Args:
        plugins, no_plugin, no_plugins: the options of those names.
        profile: the profile's `plugins`.
        recorded: {plugin: requirement} of what the run was made with that is opened.
        environ: read for APT_PLUGINS and APT_DISABLE_PLUGINS, names apart by commas or spaces.
    """
    names: tuple[str, ...] | None
    if no_plugins:
        names, source = (), NO_PLUGINS
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
    return Selection(names, (*no_plugin, *disabled), source, recorded or {})


def select(found: list[Plugin], selection: Selection, *, strict: bool = False) -> tuple[str, ...]:
    """Mark what is not selected as disabled; return the packages that are asked for and absent, each warned of once.

    Raises:
        PluginError: a name that is neither installed nor in the catalogue nor recorded; with `strict`, one that is not
            installed.
    """
    packages = {**PLUGINS, **selection.recorded}
    installed = {plugin.name for plugin in found}
    absent: dict[str, list[str]] = {}
    for name, source in [
        *((name, selection.source) for name in selection.names or ()),
        *((name, "--no-plugin or APT_DISABLE_PLUGINS") for name in selection.excluded),
    ]:
        if ENTRY_POINTS.get(name, name) in installed:
            continue
        if name not in packages:
            near = did_you_mean(name, installed | set(PLUGINS), cutoff=HINT)
            known = ", ".join(sorted(installed - {BUILTIN})) or "none"
            raise PluginError(
                f"{source}: there is no plugin {name!r}",
                hint=f"did you mean {near!r}?" if near else f"installed: {known}",
            )
        if name not in selection.excluded:
            absent.setdefault(packages[name], []).append(name)
    for package, names in absent.items():
        one, fix = len(names) == 1, how_to_restore(package) if "==" in package else how_to_install(package)
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
            plugin.refuse("disabled", "left out by --no-plugin or APT_DISABLE_PLUGINS", "take its name out of there")
        elif wanted is not None and plugin.name not in wanted:
            none = selection.source == NO_PLUGINS
            reason = f"left out by {NO_PLUGINS}" if none else f"not among {selection.source}"
            plugin.refuse("disabled", reason, f"leave {NO_PLUGINS} out" if none else f"add it to {selection.source}")
    return tuple(package.partition("==")[0] for package in absent)


def load(found: list[Plugin], *, refresh: bool = False) -> Plugins:
    """Register what the selected plugins bring, importing none but core's own.

    Args:
        refresh: look into every plugin again, whatever is known of it.
    """
    plugins = Plugins(found)
    chosen = [plugin for plugin in found if plugin.status == "ok"]
    for plugin in chosen:
        if plugin.name == BUILTIN:
            contents, plugin.module = examine(plugin.name, plugin.module_name, plugin.distribution)
            _take(plugin, contents, plugins.registry)
    if others := [plugin for plugin in chosen if plugin.name != BUILTIN]:
        from apt.core.scan import contents_of  # here: start-up is measured, and not everyone has plugins

        for plugin, contents in zip(others, contents_of(others, refresh=refresh), strict=True):
            if not contents.portable:
                contents, plugin.module = examine(plugin.name, plugin.module_name, plugin.distribution)
            _take(plugin, contents, plugins.registry)
    _mark_contested(plugins)
    return plugins


def discover(selection: Selection | None = None, *, strict: bool = False) -> Plugins:
    """Find, select and load. With `strict`, a selected plugin that does not load is an error.

    Raises:
        PluginError: see `select`; with `strict`, for any selected plugin that cannot be used.
    """
    found = find_plugins()
    absent = select(found, selection if selection is not None else choose(), strict=strict)
    plugins = load(found)
    plugins.absent, plugins.strict = absent, strict
    for plugin in plugins.found:
        if not plugin.loaded and plugin.status != "disabled":
            _complain(plugin, strict)
    return plugins


def load_installed(registry: Registry) -> None:
    """Fill the global registry with what the environment selects."""
    registry.merge(discover().registry)


def _take(plugin: Plugin, contents: Contents, registry: Registry) -> None:
    """Let a plugin have become what looking into it came to."""
    plugin.import_ms, plugin.hooks = contents.import_ms, tuple(contents.hooks)
    for text in contents.warnings:
        warnings.warn(text, AptWarning, stacklevel=4)
    if contents.status != "ok":
        plugin.refuse(contents.status, contents.reason or "", contents.fix)
        return
    with registry.owned_by(plugin.name, plugin.distribution, plugin.version):
        for provider in contents.providers:
            registry.register(**provider)
    plugin.loaded = True


def _mark_contested(plugins: Plugins) -> None:
    """Say of plugins that claim one provider that they do: of them nobody gets it, and what else they bring stays."""
    claims: dict[str, list[Registration]] = {}
    for claim in plugins.registry.claims():
        claims.setdefault(claim.slot, []).append(claim)
    by_name = {plugin.name: plugin for plugin in plugins.found if plugin.loaded}
    for slot, rivals in claims.items():
        for claim in rivals if len(rivals) > 1 else ():
            plugin = by_name[claim.plugin]
            others = " and ".join(by_name[rival.plugin].label for rival in rivals if rival is not claim)
            reason = f"{slot} is claimed by {others} too, so nobody gets it"
            leave = plugin.name if plugin.name != BUILTIN else next(r.plugin for r in rivals if r is not claim)
            plugin.refuse("conflict", f"{plugin.reason}; {reason}" if plugin.reason else reason, f"--no-plugin {leave}")


def _complain(plugin: Plugin, strict: bool) -> None:
    """Say that a plugin that was to be used is not."""
    message = f"{plugin.label} is not used: {plugin.status}: {plugin.reason}"
    if strict:
        raise PluginError(message, hint=plugin.fix)
    warnings.warn(message + (f" (to mend it: {plugin.fix})" if plugin.fix else ""), AptWarning, stacklevel=3)


def _describe(point: Any) -> Plugin:
    plugin = Plugin(point.name, point.value, metadata=point.dist)
    if point.dist is not None:
        plugin.distribution, plugin.version = name_and_version(point.dist)
        path = editable_path(point.dist)
        plugin.source = plugin.source if path is None else f"editable: {path}"
    return plugin


def _all_of(names: list[str]) -> str:
    return " and ".join(map(repr, dict.fromkeys(names)))


def _split(names: str) -> tuple[str, ...]:
    return tuple(names.replace(",", " ").split())
