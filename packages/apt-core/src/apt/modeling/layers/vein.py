"""The past of TVA's vein: what a layer remembers of it, and over which positions it reaches."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from apt.core.errors import ProviderError
from apt.modeling.layers.kv_cache import PositionCache

TAPS = 2
"""How many earlier positions the vein regenerates from."""

REWIND = 32
"""How many positions a cache can be truncated by: beyond the raw vein of the last two it keeps that of so many more."""


class VeinCache(PositionCache):
    """What a TVA layer remembers: the regenerated vein c~, not rotated, and the last of the raw c."""

    recent_BPDc: Tensor | None = None
    """The raw vein of the last P positions: at least two, where there are so many, and at most two and `REWIND`."""

    def write_recent(self, c_BTDc: Tensor) -> None:
        """Add the raw vein of the new positions."""
        new = c_BTDc[:, -(TAPS + REWIND) :]
        kept = self.recent_BPDc if self.recent_BPDc is not None else new[:, :0]
        surplus = max(kept.shape[1] + new.shape[1] - (TAPS + REWIND), 0)
        self.recent_BPDc = torch.cat((kept[:, surplus:], new), 1)

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            ProviderError: that is further back than the raw vein is kept, so what follows could not be regenerated.
        """
        if length <= 0:
            self.recent_BPDc = None
        elif self.recent_BPDc is not None and length < self.length:
            kept = self.recent_BPDc.shape[1] - (self.length - length)
            if kept < min(TAPS, length):
                raise ProviderError(
                    f"a cache of tva_default cannot be truncated from {self.length} to {length}, by {REWIND} at most",
                    hint="truncate it to 0 and feed the text again",
                )
            self.recent_BPDc = self.recent_BPDc[:, :kept]
        super().truncate(length)

    def select_rows(self, rows_B: Tensor) -> None:
        """Keep the batch rows `rows_B` (int64 [B']), in that order; a row may be repeated."""
        super().select_rows(rows_B)
        if self.recent_BPDc is not None:
            self.recent_BPDc = self.recent_BPDc[rows_B]


def unbroken_steps(
    start: int, stop: int, positions: Tensor | None, documents_BS: Tensor | None, padded_BS: Tensor | None
) -> Tensor | None:
    """Whether each position from start - 1 to stop - 1 continues the one before it: its number is one higher, both are
    of one document, and neither is padding.

    Args:
        positions: int64 [stop] or [B, stop]; None: consecutive.
        documents_BS: int64 [B, stop]; None: one document.
        padded_BS: bool [B, stop]; None: no padding.

    Returns:
        bool [B or 1, stop - start + 1], False where there is no position before; None if nothing breaks the row.
    """
    first = max(start - TAPS, 0)
    conditions = []
    if positions is not None:
        conditions.append(torch.atleast_2d(positions)[:, first:stop].diff() == 1)
    if documents_BS is not None:
        conditions.append(documents_BS[:, first:stop].diff() == 0)
    if padded_BS is not None:
        real_BL = ~padded_BS[:, first:stop]
        conditions.append(real_BL[:, 1:] & real_BL[:, :-1])
    if not conditions:
        return None
    unbroken = reduce(torch.logical_and, conditions)
    return F.pad(unbroken, (stop - start + 1 - unbroken.shape[1], 0))


__all__ = ["REWIND", "TAPS", "VeinCache", "unbroken_steps"]
