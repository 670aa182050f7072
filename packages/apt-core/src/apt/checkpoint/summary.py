"""What a store of checkpoints holds, told from their manifests and headers: no model is built, and torch not needed."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apt.checkpoint.manifest import DAMAGE, STRUCTURE, folders_of, is_of_weights, parts_in, verify
from apt.core.errors import CheckpointError, in_a_line


@dataclass(slots=True)
class Summary:
    """One checkpoint."""

    step: int
    folder: Path
    bytes: int
    """Of all that lies in its folder."""
    problem: str | None = None
    """What is wrong with it; None where every file is as its manifest says."""
    epoch: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    """The effects that the run went on without."""
    states: list[str] = field(default_factory=list)
    """Whose state it holds: plugins, and providers as "kind.name"."""


@dataclass(frozen=True, slots=True)
class TensorShape:
    """One tensor of the model."""

    name: str
    dtype: str
    """As safetensors names it: F32, BF16, ..."""
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def summaries(store: Path) -> list[Summary]:
    """Every checkpoint in ascending order, each of its files verified.

    Raises:
        CheckpointError: `store` cannot be read.
    """
    return [_summary(step, folder) for step, folder in sorted(folders_of(store).items())]


def best_of(found: list[Summary]) -> Summary | None:
    """The whole checkpoint with the lowest finite "val_loss", the first of several; None if there is none."""
    measured = [s for s in found if s.problem is None and math.isfinite(s.metrics.get("val_loss", math.nan))]
    return min(measured, key=lambda summary: summary.metrics["val_loss"], default=None)


def tensors_of(folder: Path) -> list[TensorShape]:
    """The model's tensors in a checkpoint, from the headers of their files; what is in them is not read.

    Raises:
        CheckpointError: a file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, TensorShape] = {}
    for path in sorted(path for path in folder.iterdir() if is_of_weights(path.name)):
        try:
            with safe_open(path, framework="np") as file:
                parts = parts_in(file.metadata())
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(name)
                    shape = parts[name]["shape"] if name in parts else tensor.get_shape()
                    found[name] = TensorShape(name, tensor.get_dtype(), tuple(shape))
        except (OSError, SafetensorError, *DAMAGE) as error:
            raise CheckpointError(f"{path} cannot be read: {error}", hint="look at another step") from error
    return [found[name] for name in sorted(found, key=_counted)]


def _counted(name: str) -> list[tuple[int, str]]:
    """Sorts blocks.2 before blocks.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _summary(step: int, folder: Path) -> Summary:
    summary = Summary(step, folder, sum(path.stat().st_size for path in folder.iterdir() if path.is_file()))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            manifest = verify(folder, step)
        except CheckpointError as error:
            summary.problem = error.message
            return summary
    for warning in told:  # a file beside those of the manifest
        warnings.warn(warning.message, stacklevel=3)
    summary.epoch, summary.dropped = manifest["epoch"], manifest["dropped"]
    try:
        summary.metrics = {name: _number(value) for name, value in manifest["metrics"].items()}
        summary.states = sorted(_plain(json.loads((folder / STRUCTURE).read_bytes())["plugins"]))
    except DAMAGE as error:
        summary.problem = f"{folder} is damaged ({in_a_line(error)})"
    return summary


def _number(value: Any) -> float:
    """A number as the codec writes it: JSON has none that is not finite."""
    return float(value["$float"] if isinstance(value, Mapping) else value)


def _plain(names: Mapping[str, Any]) -> list[str]:
    """The keys of a mapping as the codec writes it: as pairs, where one of them is no plain text."""
    return [str(key) for key, _ in names["$dict"]] if "$dict" in names else list(names)
