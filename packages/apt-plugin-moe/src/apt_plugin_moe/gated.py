"""Gated experts on a CPU, one expert after the other.

A grouped product runs over all rows before the next operation begins, by when the first rows have left the cache. Here
an expert's rows go through the whole layer while they are in it. What the gate makes of them is computed again for the
gradient and not kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from apt.modeling.layers.ffn import GatedFeedForward


def is_gated(base: nn.Module) -> bool:
    """Whether `base` computes W_down (silu(W_gate x) * W_up x) and nothing else."""
    return type(base) is GatedFeedForward and base.w_down.bias is None and base.dropout.p == 0


def gated_experts(x_MD: Tensor, stack: nn.Module, sizes_E: list[int]) -> Tensor:
    """[M, D]: the rows of each expert, sorted and `sizes_E` in number, through its own matrices.

    Args:
        stack: holds w_gate and w_up, weights [E, F, D], and w_down, weight [E, D, F].
    """
    weights = (stack.get_parameter(f"{name}.weight") for name in ("w_gate", "w_up", "w_down"))
    out: Tensor = _GatedExperts.apply(x_MD, *weights, sizes_E)  # type: ignore[no-untyped-call]
    return out


class _GatedExperts(torch.autograd.Function):
    """In each step x [m, D], gate, up and their product h [m, F], y [m, D], of the m rows of one expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, sizes: list[int]) -> Tensor:
        gate, up, y = x.new_empty(len(x), w_gate.shape[1]), x.new_empty(len(x), w_up.shape[1]), torch.empty_like(x)
        ctx.save_for_backward(x, gate, up, w_gate, w_up, w_down)
        ctx.sizes = sizes
        rows = zip(*(tensor.split(sizes) for tensor in (x, gate, up, y)), strict=True)
        weights = zip(w_gate.unbind(), w_up.unbind(), w_down.unbind(), strict=True)
        for (x, gate, up, y_e), (w_gate, w_up, w_down) in zip(rows, weights, strict=True):
            torch.mm(x, w_gate.t(), out=gate)
            torch.mm(x, w_up.t(), out=up)
            torch.mm(F.silu(gate).mul_(up), w_down.t(), out=y_e)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, *weights = ctx.saved_tensors
        grad_x, grad_weights = torch.empty_like(x), [torch.empty_like(weight) for weight in weights]
        rows = zip(*(tensor.split(ctx.sizes) for tensor in (x, gate, up, grad_y, grad_x)), strict=True)
        experts = zip(*(weight.unbind() for weight in (*weights, *grad_weights)), strict=True)
        for (x, gate, up, grad_y, grad_x_e), expert in zip(rows, experts, strict=True):
            w_gate, w_up, w_down, grad_w_gate, grad_w_up, grad_w_down = expert
            silu = F.silu(gate)
            torch.mm(grad_y.t(), silu * up, out=grad_w_down)
            grad_h = grad_y @ w_down
            grad_up = silu.mul_(grad_h)
            grad_gate = torch.ops.aten.silu_backward(grad_h.mul_(up), gate)
            torch.mm(grad_gate.t(), x, out=grad_w_gate)
            torch.mm(grad_up.t(), x, out=grad_w_up)
            torch.mm(grad_gate, w_gate, out=grad_x_e).addmm_(grad_up, w_up)
        return grad_x, *grad_weights, None
