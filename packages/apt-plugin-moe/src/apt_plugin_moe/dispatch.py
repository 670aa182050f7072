"""Rows to their experts and back: one gather each way, forward and backward.

Written as functions of their own because autograd's would add row by row where a gather does: each token's k rows are
known, so the gradient of a gather is the sum of k rows, which `embedding_bag` does in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Where the rows of N tokens with k choices each lie when they are sorted by expert; M <= N k rows."""

    token_M: Tensor
    """int64 [M]: the token of each row."""
    slot_M: Tensor
    """int64 [M]: the choice (token * k + rank) of each row."""
    expert_M: Tensor
    """int64 [M], ascending."""
    ends_E: Tensor
    """int32 [E]: where the rows of each expert end."""
    row_Nk: Tensor
    """int64 [N, k]: the row of each choice; 0 where it has none."""
    kept_Nk: Tensor | None
    """bool [N, k]: whether a choice has a row; None where all have."""


def sort_by_expert(experts_Nk: Tensor, kept_Nk: Tensor | None, num_experts: int) -> Dispatch:
    """Sort the choices by expert, and within an expert by token."""
    n, k = experts_Nk.shape
    flat = experts_Nk.flatten()
    if kept_Nk is not None:
        flat = flat.masked_fill(~kept_Nk.flatten(), num_experts)
    expert_M, slot_M = flat.sort(stable=True)
    counts = flat.bincount(minlength=num_experts)
    if kept_Nk is not None:
        rows = int(kept_Nk.sum())
        expert_M, slot_M, counts = expert_M[:rows], slot_M[:rows], counts[:num_experts]
    row = torch.zeros_like(flat)
    row[slot_M] = torch.arange(len(slot_M), device=flat.device)
    ends = counts.cumsum(0, dtype=torch.int32)
    return Dispatch(slot_M // k, slot_M, expert_M, ends, row.view(n, k), kept_Nk)


def gather(x_ND: Tensor, to: Dispatch) -> Tensor:
    """The rows [M, D], sorted by expert."""
    rows: Tensor = _Gather.apply(x_ND, to)  # type: ignore[no-untyped-call]
    return rows


def combine(y_MD: Tensor, weights_Nk: Tensor, to: Dispatch) -> Tensor:
    """[N, D]: each token's rows, weighted and added up. The weight of a choice without a row must be 0."""
    out: Tensor = _Combine.apply(y_MD, weights_Nk.to(y_MD.dtype), to)  # type: ignore[no-untyped-call]
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, to: Dispatch) -> Tensor:
        ctx.to = to
        return x_ND.index_select(0, to.token_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:
        to = ctx.to
        shares = None if to.kept_Nk is None else to.kept_Nk.to(grad_MD.dtype)
        return _sum_rows(grad_MD, to.row_Nk, shares), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, weights_Nk: Tensor, to: Dispatch) -> Tensor:
        ctx.save_for_backward(y_MD, weights_Nk)
        ctx.to = to
        return _sum_rows(y_MD, to.row_Nk, weights_Nk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        y_MD, weights_Nk = ctx.saved_tensors
        to = ctx.to
        if not len(y_MD):  # every choice was dropped
            return torch.zeros_like(y_MD), torch.zeros_like(weights_Nk), None
        grad_MD = grad_ND.index_select(0, to.token_M)
        grad_weights = torch.linalg.vecdot(grad_MD, y_MD).index_select(0, to.row_Nk.flatten()).view_as(weights_Nk)
        if to.kept_Nk is not None:
            grad_weights = grad_weights * to.kept_Nk
        return grad_MD.mul_(weights_Nk.flatten().index_select(0, to.slot_M)[:, None]), grad_weights, None


def _sum_rows(y_MD: Tensor, row_Nk: Tensor, weights_Nk: Tensor | None) -> Tensor:
    if not len(y_MD):  # every choice was dropped
        return y_MD.new_zeros(len(row_Nk), y_MD.shape[1])
    out: Tensor = F.embedding_bag(row_Nk, y_MD, mode="sum", per_sample_weights=weights_Nk)
    return out
