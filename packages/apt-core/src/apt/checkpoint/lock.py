"""A run's `plugins.lock.json`: which providers it was built with, and whether it may go on with others."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Container, Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import nn

from apt.checkpoint.durable import replace
from apt.core.errors import AptWarning, CheckpointError
from apt.core.in_use import Slot

LOCK_FILE = "plugins.lock.json"
FORMAT = 1

ONLOOKERS = frozenset({"tracker"})
"""Kinds that only look: a run goes on as before without them, or with others."""

MODEL_KINDS = frozenset({"attention", "ffn", "router"})
"""Kinds that a model is made of: all that matters where it is only used."""


def write_lock(
    path: Path, slots: Iterable[Slot], model: nn.Module, modules: Mapping[tuple[str, str], Iterable[str]] | None = None
) -> None:
    """Record the providers in effect.

    Args:
        path: the file to write.
        slots: what the run asked for and what it got.
        model: whose state_dict the weights' keys and shapes are taken from.
        modules: {(kind, name of the provider in effect): qualified names of the modules it built}; a slot that is not
            in it has no weights.

    Raises:
        CheckpointError: it cannot be written.
    """
    shapes = {key: list(value.shape) for key, value in model.state_dict().items() if hasattr(value, "shape")}
    built = modules or {}
    records = [_record(slot, _under(shapes, built.get((slot.kind, slot.name or ""), ()))) for slot in slots]
    text = json.dumps({"format": FORMAT, "slots": records}, indent=2, default=str)
    replace(path, text.encode() + b"\n")


def read_lock(path: Path) -> dict[str, Any]:
    """What `write_lock` recorded.

    Raises:
        CheckpointError: it is missing, unreadable, or of another format.
    """
    try:
        lock = json.loads(path.read_bytes())
        known = lock["format"] == FORMAT and isinstance(lock["slots"], list)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", hint="restore it from a copy") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged", hint="restore it from a copy") from error
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
    distribution, version = was["distribution"], was["distribution_version"]
    install = f': pip install "{distribution}=={version}"' if distribution and version else ""
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
