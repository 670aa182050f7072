"""`apt plugin-list`, `apt plugin-info` and `apt profile`: what there is to use."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt.core.catalogue import KINDS
from apt.core.errors import HINT, ConfigError, did_you_mean

if TYPE_CHECKING:
    from apt.core.discovery import Plugin, Plugins
    from apt.core.registry import Registration, Registry

SLOW_MS = 200
"""An import that takes so long is shown: a plugin module that registers import strings takes a few milliseconds."""


def load_profile(profile_path: str | Path) -> dict[str, Any]:
    """A profile as plain data, what it extends merged in, without defaults.

    Args:
        profile_path: its path, or the name of one that ships.

    Raises:
        ConfigError: it cannot be found or read.
    """
    from apt.core.profiles import find_profile, load_profile_data

    return load_profile_data(find_profile(profile_path))[0]


def run_plugin_list_command(args: Namespace) -> int:
    """List the plugins with their status and the providers by kind, or the providers of `args.kind` alone."""
    from apt.cli.screen import heading

    if args.kind is not None:
        _check_kind(args.kind)
    plugins = look_at_plugins(refresh=getattr(args, "refresh", False))
    if getattr(args, "json", False):
        _print_json(_listing(plugins, args.kind))
        return 0
    if args.kind is None:
        print(heading("Plugins"))
        print("\n".join(plugin_lines(plugins)))
        print(f"\n{heading('Providers')}")
    print("\n".join(_provider_lines(plugins.registry, args.kind)))
    return 0


def run_plugin_info_command(args: Namespace) -> int:
    """Show what is known of the provider `args.kind`:`args.name`."""
    from apt.cli.screen import columns, heading
    from apt.core.discovery import discover
    from apt.testing.record import read

    _check_kind(args.kind)
    registry = discover().registry_of_a_run()
    info = registry.get_info(args.kind, args.name)
    info["section"] = f"{KINDS[args.kind]}.{info['section']}"
    checked = read(args.kind, args.name)
    never = f"not checked yet: apt plugin-check {args.kind}:{args.name}"
    info["conformance"] = checked.summary(info["version"]) if checked else never
    print(heading(f"{args.kind}:{args.name}"))
    rows = [(key.replace("_", " "), _readable(value)) for key, value in info.items() if key not in ("kind", "name")]
    print("\n".join(columns(rows)))
    return 0


def run_profile_list_command(args: Namespace) -> int:
    """List the profiles that ship."""
    from apt.cli.screen import columns
    from apt.core.profiles import list_profiles

    print("\n".join(columns(list_profiles(), indent=0)))
    return 0


def run_profile_show_command(args: Namespace) -> int:
    """Print the profile `args.profile` with every key, as YAML."""
    from apt.cli.overrides import parse_overrides
    from apt.core.profiles import dump_yaml, resolve
    from apt.training.choice import choose_plugins

    profile = resolve(args.profile, parse_overrides(args.overrides))
    choose_plugins(profile)  # for what it says
    print(dump_yaml(profile.config.model_dump(mode="json")), end="")
    return 0


def run_profile_schema_command(args: Namespace) -> int:
    """Print the JSON Schema of profiles."""
    from apt.core.discovery import discover
    from apt.core.profiles import schema

    _print_json(schema(discover().registry))
    return 0


def look_at_plugins(*, refresh: bool = False) -> Plugins:
    """Every plugin that is installed, loaded if it is selected; those that fail have their status and raise nothing.

    Args:
        refresh: look into each again, whatever is known of it.
    """
    from apt.core.discovery import choose, find_plugins, load, select

    found = find_plugins()
    select(found, choose())
    plugins = load(found, refresh=refresh)
    plugins.registry = plugins.registry_of_a_run()
    return plugins


def plugin_lines(plugins: Plugins) -> list[str]:
    """One line for each plugin, and below it why it is not used, if it is not."""
    from apt.cli.screen import columns

    rich = {claim.plugin for claim in plugins.registry.claims()}
    rows = [
        (
            p.name,
            p.status,
            _package(p),
            "" if p.source == "installed" else p.source,
            "  ".join(_remarks(p, p.name in rich)),
        )
        for p in plugins.found
    ]
    lines = []
    for plugin, row, line in zip(plugins.found, rows, columns([row[:4] for row in rows]), strict=True):
        lines.append(f"{line}  {row[4]}".rstrip() if plugin.loaded else line)
        if plugin.reason:
            lines.append(f"    {plugin.reason}")
        if plugin.fix:
            lines.append(f"    fix: {plugin.fix}")
    return lines


def _remarks(plugin: Plugin, has_providers: bool) -> list[str]:
    slow = plugin.import_ms is not None and plugin.import_ms >= SLOW_MS
    return ([] if has_providers else ["no providers"]) + ([f"{plugin.import_ms:,.0f} ms to import"] if slow else [])


def _provider_lines(registry: Registry, kind: str | None) -> list[str]:
    from apt.cli.screen import columns

    claims = [claim for claim in registry.claims() if kind in (None, claim.kind)]
    if not claims:
        return [f"  no provider of kind {kind} is installed"]
    rows = [
        (claim.name, _version(claim), claim.distribution or claim.plugin, _mark(claim, registry)) for claim in claims
    ]
    lines: list[str] = []
    for claim, before, line in zip(claims, [None, *claims], columns(rows, indent=4), strict=False):
        if before is None or before.kind != claim.kind:
            lines.append(f"  {claim.kind}")
        lines.append(line)
    return lines


def _listing(plugins: Plugins, kind: str | None) -> dict[str, Any]:
    """What `plugin-list --json` prints."""
    registry, by_name = plugins.registry, {plugin.name: plugin for plugin in plugins.found}
    providers: dict[str, list[dict[str, Any]]] = {kind: []} if kind else {}
    brought: dict[str, list[str]] = {}
    for claim in registry.claims():
        brought.setdefault(claim.plugin, []).append(claim.slot)
        if kind in (None, claim.kind):
            plugin, contested = by_name.get(claim.plugin), _is_contested(claim, registry)
            providers.setdefault(claim.kind, []).append(
                {
                    "kind": claim.kind,
                    "name": claim.name,
                    "version": _version(claim),
                    "default": registry.default_of(claim.kind) == claim.name,
                    "plugin": claim.plugin,
                    "distribution": claim.distribution,
                    "source": plugin.source if plugin else "script",
                    "status": "conflict" if contested else "ok",
                    "import_ms": plugin.import_ms if plugin else None,
                    "contested": contested,
                }
            )
    if kind is not None:
        return {"providers": providers}
    fields = ("name", "status", "reason", "fix", "distribution", "version", "source", "import_ms")
    return {
        "plugins": [
            {field: getattr(plugin, field) for field in fields}
            | {"hooks": list(plugin.hooks), "providers": brought.get(plugin.name, []) if plugin.loaded else []}
            for plugin in plugins.found
        ],
        "providers": providers,
    }


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        near = did_you_mean(kind, KINDS, cutoff=HINT)
        hint = f"did you mean {near}?" if near else f"the kinds are {', '.join(KINDS)}"
        raise ConfigError(f"there is no provider kind {kind!r}", hint=hint)


def _package(plugin: Plugin) -> str:
    return " ".join(part for part in (plugin.distribution, plugin.version) if part)


def _version(claim: Registration) -> str:
    return claim.version or claim.distribution_version or "unknown"


def _is_contested(claim: Registration, registry: Registry) -> bool:
    return sum(other.slot == claim.slot for other in registry.claims()) > 1


def _mark(claim: Registration, registry: Registry) -> str:
    if _is_contested(claim, registry):
        return f"claimed twice, so not used; leave one out: --no-plugin {claim.plugin}"
    return "default" if registry.default_of(claim.kind) == claim.name else ""


def _readable(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "none" if value is None else str(value)


def _print_json(data: Any) -> None:
    import json

    print(json.dumps(data, indent=2, ensure_ascii=False))
