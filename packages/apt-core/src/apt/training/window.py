"""The steps since the last record: their losses and the time they took, as one record of the metrics."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from apt.core.errors import AptWarning
from apt.training.step import Loss, free_name


class Window:
    """Gathers steps without waiting for the device; only `close` does that.

    Args:
        tokens_per_step: tokens that one step is trained on.
    """

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self.losses: list[Loss] = []
        """Those of the steps gathered."""
        self._norm: Tensor | None = None
        self._started = time.perf_counter()

    def __bool__(self) -> bool:
        return bool(self.losses)

    def add(self, loss: Loss, norm: Tensor | None) -> None:
        """One more step, with the norm of its gradients."""
        self.losses.append(loss)
        self._norm = norm

    def is_finite(self) -> bool:
        """Whether the losses gathered are; waits for the device."""
        return not self.losses or bool(torch.isfinite(torch.stack([loss.total for loss in self.losses])).all())

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """What happens inside this block does not count as training time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - started

    def close(self) -> dict[str, float]:
        """The means over the steps gathered, the last gradient norm, and the speed; starts anew."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        record = {
            "loss": _mean([loss.total for loss in self.losses]),
            "tokens_per_second": round(self.tokens / seconds),
        }
        if self._norm is not None:
            record["grad_norm"] = self._norm.item()
        for name in dict.fromkeys(name for loss in self.losses for name in loss.parts):
            parts = [loss.parts[name] for loss in self.losses if name in loss.parts]
            record[free_name(record, name)] = _mean(parts)
        self._clear()
        return record

    @property
    def tokens(self) -> int:
        """How many tokens the steps gathered were trained on."""
        return len(self.losses) * self._tokens_per_step

    def _clear(self) -> None:
        self.losses, self._norm = [], None
        self._started = time.perf_counter()


def plain_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """What of `values` is a number, as plain numbers; what is not is passed over with a warning."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            value = value.item()
        if isinstance(value, Integral):
            numbers[name] = int(value)
        elif isinstance(value, Real):
            numbers[name] = float(value)
        else:
            kind = type(value).__name__
            warnings.warn(f"the metric {name!r} is passed over: it is no number but {kind}", AptWarning, stacklevel=2)
    return numbers


def not_finite(record: Mapping[str, Any]) -> list[str]:
    """The entries that are NaN or infinite."""
    return [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]


def _mean(scalars: list[Tensor]) -> float:
    # One wait for the device; the rest is done sooner in Python than by another operation of torch.
    numbers: list[float] = torch.stack(scalars).tolist()
    return sum(numbers) / len(numbers)
