"""`plugins.lock.json`: which providers and plugins a run was built with, and whether it may go on with others.

`apt plugin-lock` writes such a file for a profile, before there is a run; `apt train --frozen` holds a run to one.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Container, Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from apt.checkpoint.durable import replace
from apt.core.errors import AptWarning, CheckpointError, PluginError
from apt.core.files import read_file
from apt.core.in_use import Slot

if TYPE_CHECKING:
    from torch import nn

    from apt.core.discovery import Plugin

LOCK_FILE = "plugins.lock.json"
FORMAT = 1

ONLOOKERS = frozenset({"tracker"})
"""Kinds that only look: a run goes on as before without them, or with others."""

MODEL_KINDS = frozenset({"attention", "ffn", "router"})
"""Kinds that a model is made of: all that matters where it is only used."""


class _SlotRecord(BaseModel):
    model_config = ConfigDict(strict=True)

    kind: str
    requested: str | None
    name: str | None
    version: str | None
    distribution: str | None
    distribution_version: str | None
    weights_layout: str | None
    weights: dict[str, list[int]]
    fallback: bool
    reason: str | None


class _PluginRecord(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    distribution: str | None
    version: str | None
    sha256: str | None


class _Lock(BaseModel):
    """What of a lock is relied on."""

    slots: list[_SlotRecord]
    plugins: list[_PluginRecord]


def write_lock(
    path: Path,
    slots: Iterable[Slot],
    model: nn.Module,
    modules: Mapping[tuple[str, str], Iterable[str]] | None = None,
    plugins: Iterable[Plugin] = (),
    absent: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Record the providers in effect, and the plugins in use.

    Args:
        path: the file to write.
        slots: what the run asked for and what it got.
        model: whose state_dict the weights' keys and shapes are taken from.
        modules: {(kind, name of the provider in effect): qualified names of the modules it built}; a slot that is not
            in it has no weights.
        plugins: those that the run calls on.
        absent: what an earlier lock recorded of plugins that are not here and whose state is carried along.

    Raises:
        CheckpointError: it cannot be written.
    """
    shapes = {key: list(value.shape) for key, value in model.state_dict().items() if hasattr(value, "shape")}
    built = modules or {}
    records = [_record(slot, _under(shapes, built.get((slot.kind, slot.name or ""), ()))) for slot in slots]
    owners = [*(_plugin_record(plugin) for plugin in plugins), *absent]
    text = json.dumps({"format": FORMAT, "slots": records, "plugins": owners}, indent=2, default=str)
    replace(path, text.encode() + b"\n")


def read_lock(path: Path) -> dict[str, Any]:
    """What `write_lock` recorded.

    Raises:
        CheckpointError: it is missing, unreadable, or of another format.
    """
    try:
        lock = json.loads(read_file(path))
        lock.setdefault("plugins", [])  # the first locks had none
        known = lock["format"] == FORMAT
        if known:
            _Lock.model_validate(lock)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", hint="restore it from a copy") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path) from error
    if not known:
        raise CheckpointError(
            f"{path} is of format {lock['format']}, and this version of APT reads {FORMAT}",
            hint="use the version of APT that wrote it",
        )
    return dict(lock)


def recorded_layouts(lock: Mapping[str, Any]) -> dict[str, str]:
    """{kind: the layout of its weights} of the parts of a recorded model, where the provider names one."""
    return {
        record["kind"]: record["weights_layout"]
        for record in lock["slots"]
        if record["kind"] in MODEL_KINDS and record["weights_layout"]
    }


def check_lock(old: Mapping[str, Any], slots: Iterable[Slot], kinds: Container[str] | None = None) -> list[str]:
    """Whether a run may go on with these providers.

    A provider may give way to another one whose layers share its weights' layout, with an AptWarning; so may a version
    of it to another version. Kinds in `ONLOOKERS` are not looked at.

    Args:
        old: what `read_lock` returned.
        slots: what the run would go on with.
        kinds: compare these alone; None for all but the onlookers.

    Returns:
        The sentences that were warned of.

    Raises:
        CheckpointError: another provider is in effect for a kind than the one recorded.
    """

    def compared(record: dict[str, Any]) -> bool:
        kind = record["kind"]
        return bool(record["name"]) and (kind in kinds if kinds is not None else kind not in ONLOOKERS)

    recorded = [record for record in old["slots"] if compared(record)]
    present = [record for slot in slots if compared(record := _record(slot, {}))]
    notes: list[str] = []
    for kind in dict.fromkeys(record["kind"] for record in (*recorded, *present)):
        before = {record["name"]: record for record in recorded if record["kind"] == kind}
        now = {record["name"]: record for record in present if record["kind"] == kind}
        gone = [record for name, record in before.items() if name not in now]
        come = [record for name, record in now.items() if name not in before]
        for was, new in zip_longest(gone, come):
            if was is None and kind == "dataset":
                continue  # a model that was made elsewhere gets its first text
            if not (was and new and was["weights_layout"] and was["weights_layout"] == new["weights_layout"]):
                raise _refusal(kind, was, new)
            notes.append(
                f"this run used {_title(was)} and goes on with {_title(new)}, whose weights have the same layout"
            )
        for name in before.keys() & now.keys():
            if before[name]["version"] != now[name]["version"]:
                notes.append(f"this run used {_title(before[name])} and goes on with version {now[name]['version']}")
    for note in notes:
        warnings.warn(note, AptWarning, stacklevel=2)
    return notes


def check_age(
    lock: Mapping[str, Any], slots: Iterable[Slot], plugins: Iterable[Plugin], states: Container[str]
) -> None:
    """Refuse distributions that are older than those a run was made with: they may not read what the newer ones kept.

    Args:
        lock: what `read_lock` returned.
        slots: the providers that the run would go on with.
        plugins: those that are here.
        states: the plugins that the run's checkpoint holds something of; what age the others are of is no matter.

    Raises:
        CheckpointError: one of them is older, or several.
    """
    claims = {(slot.kind, slot.name): slot.registration for slot in slots if slot.kind not in ONLOOKERS}
    here = {plugin.name: plugin for plugin in plugins if plugin.loaded}
    older: dict[str, str] = {}

    def compare(distribution: str | None, before: str | None, now: str | None) -> None:
        if before and now and _is_older(now, before):
            older[f'"{distribution}>={before}"'] = f"{distribution} {before}, and {now} is here, which is older"

    for record in lock["slots"]:
        claim = claims.get((record["kind"], record["name"]))
        if claim and claim.distribution == record["distribution"]:
            compare(claim.distribution, record["distribution_version"], claim.distribution_version)
    for record in lock["plugins"]:
        plugin = here.get(record["name"])
        if plugin and plugin.distribution == record["distribution"] and plugin.name in states:
            compare(plugin.distribution, record["version"], plugin.version)
    if older:
        raise CheckpointError(
            f"this run was made with {'; and with '.join(older.values())}",
            hint=f"pip install {' '.join(older)}, or start a new run; the weights alone can be used as they are",
        )


def _is_older(version: str, than: str) -> bool:
    from packaging.version import InvalidVersion, Version  # not at the top: listing plugins needs none

    try:
        return Version(version) < Version(than)
    except InvalidVersion:
        return False


def requirements_of(lock: Mapping[str, Any]) -> dict[tuple[str, str], str | None]:
    """{(kind, name): requirement} of the providers that a run cannot do without, such as "apt-plugin-moe==2.0.0"; None
    for one that no distribution brought."""
    needed = (record for record in lock["slots"] if record["name"] and record["kind"] not in ONLOOKERS)
    return {
        (record["kind"], record["name"]): _requirement(record["distribution"], record["distribution_version"])
        for record in needed
    }


def recorded_plugins(lock: Mapping[str, Any]) -> dict[str, str]:
    """{plugin: requirement} of the plugins that a run called on."""
    found = {record["name"]: _requirement(record["distribution"], record["version"]) for record in lock["plugins"]}
    return {name: requirement for name, requirement in found.items() if requirement}


def requirement_of_listener(lock: Mapping[str, Any], name: str) -> str | None:
    """The requirement that brings what listened to the run as `name`: a plugin, or a provider as "kind.name"."""
    found = [_requirement(r["distribution"], r["version"]) for r in lock["plugins"] if r["name"] == name]
    slots = [record for record in lock["slots"] if f"{record['kind']}.{record['name']}" == name]
    found += [_requirement(record["distribution"], record["distribution_version"]) for record in slots]
    return next(filter(None, found), None)


def check_frozen(
    lock: Mapping[str, Any], path: Path, found: Iterable[Plugin], used: Iterable[Plugin], slots: Iterable[Slot]
) -> None:
    """Refuse what a lock does not hold.

    Args:
        lock: what `read_lock` returned.
        path: of the lock, for messages.
        found: the plugins that are installed, whatever became of them.
        used: those that the run would call on.
        slots: the providers that it would use.

    Raises:
        PluginError: a plugin, its version or its files are not those that the lock holds, or one that it holds is not
            here; or a provider is in effect that it does not hold. One line for each.
    """
    held = {record["name"]: record for record in lock["plugins"]}
    here = {plugin.name: plugin for plugin in found}
    problems: list[str] = []
    wanted: list[str] = []
    force = ""
    for name, record in held.items():
        plugin = here.get(name)
        if plugin is None or not plugin.loaded:
            state = "is not installed" if plugin is None else f"cannot be used: {plugin.status}: {plugin.reason}"
            problems.append(f"{_plugin_title(record)}, which {path} holds, {state}")
            wanted.append(name)
    for plugin in used:
        record, now = held.get(plugin.name), _plugin_record(plugin)
        if record is None:
            problems.append(f"{_plugin_title(now)} is not in {path}")
            continue
        if (record["distribution"], record["version"]) != (plugin.distribution, plugin.version):
            problems.append(f"{_plugin_title(now)} is here, and {path} holds {_plugin_title(record)}")
        elif record["sha256"] != now["sha256"]:
            ours, theirs = (str(r["sha256"])[:12] for r in (now, record))
            problems.append(f"{_plugin_title(now)} has files with SHA-256 {ours}..., and {path} holds {theirs}...")
            force = "--force-reinstall --no-deps "  # pip leaves a version that is installed as it is
        else:
            continue
        wanted.append(plugin.name)
    known = {(record["kind"], record["name"], record["version"]) for record in lock["slots"]}
    for slot in slots:
        if (slot.kind, slot.name, slot.version) not in known:
            title = _title(_record(slot, {})) if slot.name else f"no {slot.kind}"
            problems.append(f"{title} is in effect, and {path} does not hold that")
    if problems:
        requirements = [_requirement(held[name]["distribution"], held[name]["version"]) for name in wanted]
        install = " ".join(f'"{requirement}"' for requirement in requirements if requirement)
        hint = f"pip install {force}{install}, or " if install else ""
        raise PluginError("\n".join(problems), hint=f"{hint}write the lock anew: apt plugin-lock -p PROFILE")


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is damaged", hint="restore it from a copy")


def _plugin_record(plugin: Plugin) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "sha256": plugin.sha256(),
    }


def _plugin_title(record: Mapping[str, Any]) -> str:
    """A plugin in words: "plugin 'moe' (apt-plugin-moe 2.0.0)"."""
    source = " ".join(filter(None, (record["distribution"], record["version"])))
    return f"plugin {record['name']!r}" + (f" ({source})" if source else "")


def _requirement(distribution: str | None, version: str | None) -> str | None:
    return f"{distribution}=={version}" if distribution and version else None


def _record(slot: Slot, weights: dict[str, list[int]]) -> dict[str, Any]:
    claim = slot.registration
    return {
        "kind": slot.kind,
        "requested": slot.requested,
        "name": slot.name,
        "version": slot.version,
        "distribution": claim.distribution if claim else None,
        "distribution_version": claim.distribution_version if claim else None,
        "config": slot.config,
        "weights_layout": getattr(slot.provider, "weights_layout", None),
        "weights": weights,
        "weights_sha256": hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest(),
        "fallback": slot.is_fallback,
        "reason": slot.reason,
    }


def _under(shapes: Mapping[str, list[int]], modules: Iterable[str]) -> dict[str, list[int]]:
    """The entries of a state_dict that lie under these modules."""
    prefixes = tuple(f"{module}." for module in modules)
    return {key: shape for key, shape in shapes.items() if key.startswith(prefixes)}


def _refusal(kind: str, was: dict[str, Any] | None, new: dict[str, Any] | None) -> CheckpointError:
    now = f"{_title(new)} is in effect" if new else f"no {kind} is in effect"
    if was is None:
        return CheckpointError(
            f"this run was built without a provider of kind {kind}, and now {now}",
            hint="leave it out (--no-plugin), or start a new run",
        )
    requirement = _requirement(was["distribution"], was["distribution_version"])
    install = f': pip install "{requirement}"' if requirement else ""
    layout = f", or one with weights_layout {was['weights_layout']!r}" if was["weights_layout"] else ""
    return CheckpointError(
        f"this run was built with {_title(was)}, and now {now}",
        hint=f"use {kind}:{was['name']} again{install}{layout}, leave out what names another one, or start a new run",
    )


def _title(record: Mapping[str, Any]) -> str:
    """A provider in words: "attention:flash_v2 2.0.0 (apt-plugin-flash 2.0.0)"."""
    title = f"{record['kind']}:{record['name']} {record['version']}"
    source = " ".join(filter(None, (record["distribution"], record["distribution_version"])))
    return f"{title} ({source})" if source else title
