"""What a layer's router asked for, counted on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from apt_plugin_moe.capacity import Assignment


class Load:
    """Counts since the last `clear`; nothing waits for the device until they are read."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.choices = 0
        self._demand: list[Tensor] = []
        self._overflow: list[Tensor] = []
        self._dropped: list[Tensor] = []

    def add(self, assigned: Assignment) -> None:
        """One more batch."""
        self.choices += assigned.experts_Nk.numel()
        self._demand.append(assigned.demand_E)
        if assigned.overflow is not None:
            self._overflow.append(assigned.overflow)
        if assigned.kept_Nk is not None:
            self._dropped.append((~assigned.kept_Nk).sum())

    def __bool__(self) -> bool:
        return self.choices > 0

    @property
    def demand_E(self) -> Tensor:
        """int64 [E]: how many tokens wanted each expert."""
        return torch.stack(self._demand).sum(0)

    @property
    def overflow(self) -> Tensor | float:
        """The share of the choices that their expert had no room for."""
        return torch.stack(self._overflow).sum() / self.choices if self._overflow else 0.0

    @property
    def dropped(self) -> Tensor | float:
        """The share of the choices that no expert served."""
        return torch.stack(self._dropped).sum() / self.choices if self._dropped else 0.0
