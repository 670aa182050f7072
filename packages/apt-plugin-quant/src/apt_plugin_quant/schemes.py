"""How a matrix is kept in fewer bits, and how it lies on disk.

    int8    one scale for each row:         W[o, i] ~ scale[o] q[o, i],          q in -128..127
    int4    one scale for each group of g:  W[o, i] ~ scale[o, i // g] q[o, i],  q in -8..7

The scales are those that put the largest weight of their row or group at the end of the range; there are no zero
points. torchao chooses them, rounds, and multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from apt_plugin_quant.ao import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow, QuantizeTensorToInt8Kwargs


@dataclass(frozen=True)
class Int8:
    """Eight bits, a scale for each row."""

    dynamic: bool = False
    """Whether inputs are rounded to eight bits too, with a scale for each token, and the product is one of integers."""

    def quantize(self, weight_OI: Tensor) -> Tensor:
        """The matrix as a tensor of torchao that `F.linear` takes."""
        inputs = QuantizeTensorToInt8Kwargs(PerRow()) if self.dynamic else None
        return cast(Tensor, Int8Tensor.from_hp(weight_OI, PerRow(), act_quant_kwargs=inputs))

    def rounded_inputs(self, x: Tensor) -> Tensor:
        """What a product sees of its inputs [..., I]."""
        return dequantized(Int8Tensor.from_hp(x, PerRow())) if self.dynamic else x

    def pack(self, q_OI: Tensor) -> Tensor:
        """The integers as they lie on disk."""
        return q_OI

    def unpack(self, packed: Tensor, inputs: int) -> Tensor:
        """What `pack` packed: int8 [O, I], I being `inputs`."""
        return packed


@dataclass(frozen=True)
class Int4:
    """Four bits, a scale for each group of a row. In memory each takes a byte, on disk two share one."""

    group: int
    """Weights of a row that share a scale; it divides the row."""

    def quantize(self, weight_OI: Tensor) -> Tensor:
        """As that of `Int8`."""
        return cast(Tensor, IntxUnpackedToInt8Tensor.from_hp(weight_OI, (1, self.group), torch.int4))  # type: ignore[attr-defined]

    def rounded_inputs(self, x: Tensor) -> Tensor:
        """As that of `Int8`: the inputs themselves."""
        return x

    def pack(self, q_OI: Tensor) -> Tensor:
        """uint8 [O, ceil(I / 2)]: column 2 j in the low half of a byte, column 2 j + 1 in the high one."""
        halves = F.pad(q_OI, (0, q_OI.shape[1] % 2)).view(torch.uint8) & 0xF
        return halves[:, ::2] | (halves[:, 1::2] << 4)

    def unpack(self, packed: Tensor, inputs: int) -> Tensor:
        """As that of `Int8`."""
        halves = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)[:, :inputs]
        return ((halves ^ 8) - 8).view(torch.int8)  # the half's highest bit is its sign


Scheme = Int8 | Int4


def dequantized(tensor: Any) -> Tensor:
    """What a quantised tensor stands for, in its own dtype."""
    return cast(Tensor, tensor.dequantize())


def plain_parts(tensor: Any, scheme: Scheme) -> dict[str, Tensor]:
    """A quantised matrix as plain tensors: "qdata", the packed integers, and "scale"."""
    return {"qdata": scheme.pack(tensor.qdata), "scale": tensor.scale}


def with_parts(like: Any, parts: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """The quantised matrix of these plain tensors; the rest (shape, dtype, zero points of zero) is as in `like`."""
    names, attributes = like.__tensor_flatten__()
    inner = {name: getattr(like, name) for name in names}
    device = inner["qdata"].device
    inner["qdata"] = scheme.unpack(parts["qdata"].to(device), like.shape[1])
    inner["scale"] = parts["scale"].to(device)
    return cast(Tensor, type(like).__tensor_unflatten__(inner, attributes, like.shape, like.stride()))


__all__ = ["Int4", "Int8", "Scheme", "dequantized", "plain_parts", "with_parts"]
