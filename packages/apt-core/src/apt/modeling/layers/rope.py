"""Rotary position embedding: a query and a key that are n positions apart meet at an angle that depends on n alone.

Su et al., "RoFormer" (2021), section 3.2, with interleaved pairs: dimensions 2i and 2i+1 are one complex number, which
position p turns by p * theta^(-2i/d).
"""

from __future__ import annotations

import torch
from torch import Tensor

LONGEST_TABLE = 1 << 17
"""Positions from here on that a caller gives are computed each time: a stray huge one must not become a huge table."""


class RotaryEmbedding:
    """The turns of each position.

    The table is a plain attribute and no buffer: `.to(dtype)` would round it, and `to_empty`, after a construction on
    the meta device, would leave it without content. It is rebuilt wherever it does not fit the tensor to be turned.

    Args:
        dim: how many dimensions are turned, an even number d.
        theta: base of the angles.
    """

    def __init__(self, dim: int, theta: float) -> None:
        assert dim % 2 == 0, dim
        self.dim = dim
        self.theta = theta
        self._table_Pd2 = torch.empty(0, dim // 2, 2)

    def turns(self, positions: Tensor | None, start: int, stop: int, like: Tensor) -> Tensor:
        """The turns for `positions` (int64 [T] or [B, T]), or for start to stop - 1 where that is None.

        Returns:
            (cos, sin) as [T, d/2, 2] or [B, T, d/2, 2], on the device of `like`; float64 if `like` is, else float32.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        if positions is None and torch.compiler.is_exporting():
            # How long a table must be is not known there.
            positions = torch.arange(start, stop, device=like.device)
        if positions is None:
            return self._table(stop, like.device, dtype)[start:stop]
        if positions.is_cpu and not torch.compiler.is_compiling():
            # Here it costs nothing to ask how far they reach, and looking them up is 20 times as fast.
            low, high = (int(bound) for bound in positions.aminmax())
            if low >= 0 and high < LONGEST_TABLE:
                table = self._table(high + 1, like.device, dtype)
                looked_up: Tensor = torch.embedding(table.flatten(1), positions).unflatten(-1, (-1, 2))
                return looked_up
        return self._compute(positions, dtype)

    def _table(self, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        table = self._table_Pd2
        if table.shape[0] < length or table.device != device or table.dtype != dtype:
            # A table made in inference mode could not take part in training later.
            with torch.inference_mode(False):
                size = 1 << max(length - 1, 63).bit_length()
                table = self._table_Pd2 = self._compute(torch.arange(size, device=device), dtype)
        return table

    def _compute(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        # In float32 the angle at position 100,000 is off by 0.01; Apple's GPUs have nothing better.
        exact = torch.float32 if positions.device.type == "mps" else torch.float64
        pair_d = torch.arange(0, self.dim, 2, device=positions.device, dtype=exact)
        angles = positions[..., None].to(exact) * self.theta ** (-pair_d / self.dim)
        return torch.stack((angles.cos(), angles.sin()), -1).to(dtype)


def rotate(x_BTHd: Tensor, turns: Tensor) -> Tensor:
    """`x_BTHd` with its pairs turned, computed in the dtype of `turns`, [T, d/2, 2] or [B, T, d/2, 2]."""
    pairs, turns = x_BTHd.to(turns.dtype).unflatten(-1, (-1, 2)), turns.unsqueeze(-3)
    if torch.compiler.is_compiling():
        # The compiler fuses these, and has no code for complex numbers.
        (a, b), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    else:
        # One complex product is 3 to 5 times as fast as the six real operations one by one.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
    return turned.flatten(-2).to(x_BTHd.dtype)


__all__ = ["RotaryEmbedding", "rotate"]
