"""What a layer's router asked for, counted on the device."""

from __future__ import annotations

from torch import Tensor

from apt_plugin_moe.capacity import Assignment


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

    def _count(self, what: str, count: Tensor) -> None:
        self._counts[what] = self._counts[what] + count if what in self._counts else count

    def _share(self, what: str) -> Tensor | float:
        return self._counts[what] / self.choices if what in self._counts else 0.0
