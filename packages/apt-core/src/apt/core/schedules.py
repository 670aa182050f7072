"""Schedules: what is switched on in mid-run, and values that change over it. Pure functions of epoch and step.

    schedules:
      enable_moe_at_epoch: 2            # or enable_moe_at_step: 500
      aux_weight: 0.01                  # a constant
      route_temp: {start: 1.5, end: 0.8, by: epoch}
      moe_capacity: {start: 1.5, end: 1.25, by: step, curve: cosine, from_step: 100, to_step: 900}

A value goes from `start` to `end` while t goes from 0 to 1, and stays at either outside:

    t = (position - from - warmup) / (to - from - warmup)

`by` says what the position is, the epoch (the default) or the step. `from_*` is 0 and `to_*` the length of the run
unless they are given (`from_epoch` and `to_epoch`, or `from_step` and `to_step`, as `by` says). During the warm-up
(`warmup_epochs` or `warmup_steps`, counted from `from_*`) the value is held at `start`.

    linear       start + (end - start) t
    cosine       start + (end - start) (1 - cos(pi t)) / 2
    exponential  start (end / start)^t
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from apt.core.errors import HINT, ConfigError, did_you_mean

if TYPE_CHECKING:
    from apt.core.config import RunConfig

Unit = Literal["epoch", "step"]
UNITS: tuple[Unit, ...] = ("epoch", "step")
CURVES = ("linear", "cosine", "exponential")

_ENABLE = re.compile(r"enable_(?P<name>.+)_at_(?P<unit>epoch|step)")
_MAX = 2**53
"""Positions up to here are exact as floats."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something in the section `schedules` that cannot be used."""

    path: tuple[str, ...]
    """Keys below `schedules`."""
    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Anneal:
    """A value that changes over the run; the fields are those of the module's formula."""

    start: float
    end: float
    by: Unit = "epoch"
    curve: str = "linear"
    begin: int = 0
    """`from_*` and the warm-up together: the value leaves `start` here."""
    to: int | None = None
    """The value reaches `end` here; None for the end of the run."""

    def value(self, position: float, to: float) -> float:
        """The value at `position`, `to` being where it reaches `end`. Exactly `start` and `end` outside."""
        if position <= self.begin:
            return self.start
        if position >= to:
            return self.end
        t = (position - self.begin) / (to - self.begin)
        if self.curve == "exponential":
            size = math.exp((1 - t) * math.log(abs(self.start)) + t * math.log(abs(self.end)))
            between = math.copysign(size, self.start)
        else:
            share = t if self.curve == "linear" else (1 - math.cos(math.pi * t)) / 2
            between = (1 - share) * self.start + share * self.end
        # Rounding must not carry the value past its ends.
        return min(max(between, min(self.start, self.end)), max(self.start, self.end))


class Schedule:
    """The schedules of one run.

    Args:
        config: a `RunConfig`, or a plain dict with `schedules` and `training` (`max_epochs`, `max_steps`).

    Raises:
        ConfigError: `schedules` holds something that cannot be used, or `training.max_epochs` is missing.
    """

    def __init__(self, config: RunConfig | Mapping[str, Any]) -> None:
        if isinstance(config, Mapping):
            section, training = config.get("schedules") or {}, config.get("training") or {}
            if "max_epochs" not in training:
                raise ConfigError("training.max_epochs is missing", hint="a schedule needs the length of the run")
            self.max_epochs: int = training["max_epochs"]
            self.max_steps: int | None = training.get("max_steps")
        else:
            section = config.schedules
            self.max_epochs, self.max_steps = config.training.max_epochs, config.training.max_steps
        for fault in faults(section):
            raise ConfigError(".".join(("schedules", *fault.path)) + ": " + fault.message, hint=fault.hint)
        self.steps_per_epoch: int | None = None
        """Optimizer steps in one epoch; whoever knows it sets it before a schedule that goes by step is read."""
        self.total_steps: int | None = None
        """The step that the run ends with, where it is another one than its epochs come to: a run that goes on with
        another batch size has had epochs of another length."""
        self._constants: dict[str, float] = {}
        self._anneals: dict[str, Anneal] = {}
        self._enables: dict[str, tuple[Unit, int]] = {}
        for key, value in section.items():
            match = _ENABLE.fullmatch(key)
            if match:
                self._enables[match["name"]] = ("epoch" if match["unit"] == "epoch" else "step", value)
            elif isinstance(value, Mapping):
                self._anneals[key] = _anneal(value)
            else:
                self._constants[key] = value
        self._read: set[str] = set()

    @property
    def params(self) -> tuple[str, ...]:
        """The names that `get_param` knows."""
        return (*self._anneals, *self._constants)

    @property
    def plugins(self) -> tuple[str, ...]:
        """The plugins that are switched on in the course of the run."""
        return tuple(self._enables)

    def should_enable_plugin(self, name: str, epoch: int, step: int | None = None) -> bool:
        """Whether a plugin is on at this point; one that no schedule names always is.

        Args:
            epoch: counted from 0.
            step: the global step; needed by `enable_NAME_at_step` alone, which else goes by the epoch's first step.

        Raises:
            ValueError: the schedule goes by step and neither `step` nor `steps_per_epoch` is known.
        """
        if name not in self._enables:
            return True
        unit, at = self._enables[name]
        self._read.add(f"enable_{name}_at_{unit}")
        return self._position(name, unit, epoch, step) >= at

    def get_param(self, name: str, epoch: int | None = None, step: int | None = None) -> float | None:
        """The value of a scheduled parameter at this point; None if no schedule names it.

        Give the epoch, the step or both: the one that the schedule goes by is used, or worked out from the other.

        Raises:
            ValueError: what the schedule goes by is neither given nor, for lack of `steps_per_epoch`, to be worked out.
        """
        if name in self._constants:
            self._read.add(name)
            return self._constants[name]
        anneal = self._anneals.get(name)
        if anneal is None:
            return None
        self._read.add(name)
        position = self._position(name, anneal.by, epoch, step)
        to = anneal.to if anneal.to is not None else self._length(anneal.by)
        if to is None:
            raise ValueError(f"schedules.{name} goes by step: set steps_per_epoch before reading it")
        return anneal.value(position, to)

    def unread(self) -> list[str]:
        """The keys of `schedules` that nothing has asked for yet."""
        keys = [*self.params, *(f"enable_{name}_at_{unit}" for name, (unit, _) in self._enables.items())]
        return [key for key in keys if key not in self._read]

    def unreached(self) -> list[str]:
        """The keys of `schedules` whose moment lies at or beyond the end of the run: they change nothing in it."""
        starts = {name: (anneal.by, anneal.begin) for name, anneal in self._anneals.items()}
        starts |= {f"enable_{name}_at_{unit}": (unit, at) for name, (unit, at) in self._enables.items()}
        lengths = {unit: self._length(unit) for unit in UNITS}
        if self.max_steps is not None and self.steps_per_epoch is not None:
            lengths["epoch"] = min(self.max_epochs, -(-self.max_steps // self.steps_per_epoch))
        return [key for key, (unit, at) in starts.items() if (length := lengths[unit]) is not None and at >= length]

    def _length(self, unit: Unit) -> int | None:
        """The length of the run; in steps, None while it is unknown."""
        if unit == "epoch":
            return self.max_epochs
        if self.total_steps is not None:
            return self.total_steps
        ends = [self.max_epochs * self.steps_per_epoch] if self.steps_per_epoch is not None else []
        return min([*ends, self.max_steps] if self.max_steps is not None else ends, default=None)

    def _position(self, name: str, unit: Unit, epoch: int | None, step: int | None) -> int:
        given, other = (epoch, step) if unit == "epoch" else (step, epoch)
        if given is not None:
            return given
        if other is None or self.steps_per_epoch is None:
            raise ValueError(f"the schedule of {name!r} goes by {unit}: give the {unit}")
        return other // self.steps_per_epoch if unit == "epoch" else other * self.steps_per_epoch


def faults(section: Any) -> Iterator[Fault]:
    """Everything in the section `schedules` that cannot be used."""
    if not isinstance(section, Mapping):
        yield Fault((), f"expected a mapping, got {section!r}")
        return
    for key, value in section.items():
        match = _ENABLE.fullmatch(key)
        if match:
            if not _is_count(value):
                yield Fault((key,), f"expected a whole number, 0 or greater, got {value!r}")
            if match["unit"] == "step" and f"enable_{match['name']}_at_epoch" in section:
                yield Fault((key,), f"enable_{match['name']}_at_epoch is given too", "keep one of them")
        elif near := _near_enable(key):
            yield Fault((key,), "unknown key", f"did you mean {near!r}?")
        elif isinstance(value, Mapping):
            yield from (Fault((key, *fault.path), fault.message, fault.hint) for fault in _anneal_faults(value))
        elif not _is_number(value):
            yield Fault((key,), f"expected a number, or a mapping with 'start' and 'end', got {value!r}")


def _anneal_faults(config: Mapping[str, Any]) -> Iterator[Fault]:
    by = config.get("by", "epoch")
    if by not in UNITS:
        yield Fault(("by",), f"expected 'epoch' or 'step', got {by!r}")
        return
    counts = (f"from_{by}", f"to_{by}", f"warmup_{by}s")
    other = "step" if by == "epoch" else "epoch"
    found = []
    for key in ("start", "end"):
        if key not in config:
            found.append(Fault((), f"{key!r} is missing", "write {start: ..., end: ...}"))
        elif not _is_number(config[key]):
            found.append(Fault((key,), f"expected a number, got {config[key]!r}"))
    for key, value in config.items():
        if key in counts:
            if not _is_count(value):
                found.append(Fault((key,), f"expected a whole number, 0 or greater, got {value!r}"))
        elif key in (f"from_{other}", f"to_{other}", f"warmup_{other}s"):
            found.append(Fault((key,), f"this schedule goes by {by}", f"write 'by: {other}'"))
        elif key not in ("start", "end", "by", "curve"):
            near = did_you_mean(key, ("start", "end", "by", "curve", *counts), cutoff=HINT)
            found.append(Fault((key,), "unknown key", f"did you mean {near!r}?" if near else None))
    curve = config.get("curve", "linear")
    if curve not in CURVES:
        near = did_you_mean(str(curve), CURVES)
        hint = f"did you mean {near!r}?" if near else f"the curves are {', '.join(CURVES)}"
        found.append(Fault(("curve",), f"unknown curve {curve!r}", hint))
    yield from found
    if found:
        return
    anneal = _anneal(config)
    if curve == "exponential" and min(anneal.start, anneal.end) <= 0 <= max(anneal.start, anneal.end):
        yield Fault((), "an exponential needs a start and an end of the same sign, neither zero", "use 'curve: linear'")
    if anneal.to is not None and anneal.to <= anneal.begin:
        yield Fault((), f"to_{by} ({anneal.to}) does not lie after from_{by} and the warm-up ({anneal.begin})")


def _anneal(config: Mapping[str, Any]) -> Anneal:
    """The schedule that a mapping without faults describes."""
    by: Unit = config.get("by", "epoch")
    begin = config.get(f"from_{by}", 0) + config.get(f"warmup_{by}s", 0)
    return Anneal(config["start"], config["end"], by, config.get("curve", "linear"), begin, config.get(f"to_{by}"))


def _near_enable(key: str) -> str | None:
    """The switch that `key` is a slip of, as are `enabel_moe_at_epoch` and `enable_moe`; None if it is none."""
    first, *words = key.split("_")
    unit = did_you_mean(words[-1], UNITS) if words else None
    if unit:
        words.pop()
    at = bool(words) and words[-1] in ("at", "att", "ta", "a")
    if at:
        words.pop()
    if not (words or at or unit) or not did_you_mean(first, ("enable",), cutoff=0.6 if at and unit else 0.75):
        return None
    return f"enable_{'_'.join(words) or 'NAME'}_at_{unit or 'epoch'}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX
