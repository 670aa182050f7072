"""What a layer's router asked for, counted on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from apt_plugin_moe.capacity import Assignment

REFUSALS = ("overflow", "dropped")
"""What is counted beside the demand: choices without room, and choices without an expert."""


class Load:
    """Counts since the last `clear`; nothing waits for the device until they are read, and nothing grows where nobody
    reads them."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.choices = 0
        self._counts: dict[str, Tensor] = {}

    def add(self, assigned: Assignment) -> None:
        """One more batch."""
        self.choices += assigned.experts_Nk.numel()
        self._count("demand", assigned.demand_E)
        if assigned.overflow is not None:
            self._count("overflow", assigned.overflow)
        if assigned.kept_Nk is not None:
            self._count("dropped", (~assigned.kept_Nk).sum())

    def __bool__(self) -> bool:
        return self.choices > 0

    @property
    def demand_E(self) -> Tensor:
        """int64 [E]: how many tokens wanted each expert."""
        return self._counts["demand"]

    @property
    def overflow(self) -> Tensor | float:
        """The share of the choices that their expert had no room for."""
        return self._share("overflow")

    @property
    def dropped(self) -> Tensor | float:
        """The share of the choices that no expert served."""
        return self._share("dropped")

    def count(self, what: str) -> Tensor:
        """0-d int64: one of `REFUSALS`."""
        return self._counts.get(what, self.demand_E.new_zeros(()))

    def replace(self, demand_E: Tensor, refusals: dict[str, Tensor]) -> None:
        """Take these counts in place of one's own."""
        self._counts = {"demand": demand_E, **refusals}

    def _count(self, what: str, count: Tensor) -> None:
        self._counts[what] = self._counts[what] + count if what in self._counts else count

    def _share(self, what: str) -> Tensor | float:
        return self._counts[what] / self.choices if what in self._counts else 0.0


def add_up(loads: Sequence[Load], total: Callable[[Tensor], Tensor], processes: int) -> None:
    """Make the counts of several layers those of all processes, which have seen as many tokens each.

    Args:
        loads: of the layers, in the same order in every process.
        total: sums a tensor over the processes.
        processes: how many there are.
    """
    counted = [load for load in loads if load]
    if processes == 1 or not counted:
        return
    rows = [torch.cat([load.demand_E, *(load.count(what)[None] for what in REFUSALS)]) for load in counted]
    for load, row in zip(counted, total(torch.stack(rows)).unbind(), strict=True):
        load.replace(row[: -len(REFUSALS)], dict(zip(REFUSALS, row[-len(REFUSALS) :].unbind(), strict=True)))
        load.choices *= processes
