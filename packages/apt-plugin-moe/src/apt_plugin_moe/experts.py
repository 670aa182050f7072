"""E copies of one feed-forward layer, run over rows that are sorted by expert.

A layer whose weights all lie in `nn.Linear` modules is stacked: its own forward runs once over all rows, with each
linear map replaced by one that uses the weights of the row's expert. Any other module runs once per expert.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apt_plugin_moe.dispatch import Dispatch
from apt_plugin_moe.gated import gated_experts, is_gated

_ALIGNMENT = 16
"""Bytes that grouped_mm wants a row to be a multiple of."""


class _Rows:
    """Which expert each row belongs to, shared by the linear maps of one stack while it runs."""

    dispatch: Dispatch | None = None


class GroupedLinear(nn.Module):
    """E linear maps as one: row m gets the weights of its expert.

    Args:
        linear: the map to take E copies of.
        num_experts: E.
        rows: whose dispatch says where the experts' rows end.
    """

    def __init__(self, linear: nn.Linear, num_experts: int, rows: _Rows) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rows = rows
        self.weight = _stacked(linear.weight, num_experts)
        self.bias = None if linear.bias is None else _stacked(linear.bias, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """[1, M, in] to [1, M, out]."""
        to = self.rows.dispatch
        assert to is not None
        x_MI = x.flatten(0, -2)
        weight_EOI: Tensor = self.weight
        if torch.is_autocast_enabled(x.device.type):  # which knows nothing of grouped products
            dtype = torch.get_autocast_dtype(x.device.type)
            x_MI, weight_EOI = x_MI.to(dtype), weight_EOI.to(dtype)
        out_MO = grouped_product(x_MI, weight_EOI, to.ends_E)
        if self.bias is not None:
            out_MO = out_MO + self.bias.to(out_MO.dtype).index_select(0, to.expert_M)
        return out_MO.view(*x.shape[:-1], self.out_features)


def grouped_product(x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """[M, O]: the rows of each expert times its matrix, transposed; one kernel where torch has one for these."""
    aligned = all(size * x_MI.element_size() % _ALIGNMENT == 0 for size in weight_EOI.shape[1:])
    known = x_MI.dtype in (torch.float32, torch.bfloat16, torch.float16) and x_MI.dtype == weight_EOI.dtype
    if aligned and known and hasattr(F, "grouped_mm") and not torch.compiler.is_compiling():
        product: Tensor = F.grouped_mm(x_MI, weight_EOI.transpose(1, 2), offs=ends_E)
        if product.requires_grad:  # its backward refuses the strides of, say, an expanded gradient
            product.register_hook(torch.Tensor.contiguous)
        return product
    # `unbind`, not an index: the gradient of an index is a zero tensor as large as all experts, for each of them.
    pairs = zip(rows_by_expert(x_MI, ends_E), weight_EOI.unbind(), strict=True)
    return torch.cat([rows @ weight.t() for rows, weight in pairs])


def rows_by_expert(x_MD: Tensor, ends_E: Tensor) -> tuple[Tensor, ...]:
    """The rows of each expert, [M_e, D]."""
    rows: tuple[Tensor, ...] = x_MD.split(sizes(ends_E))
    return rows


def sizes(ends_E: Tensor) -> list[int]:
    """How many rows each expert has."""
    return [end - start for start, end in pairwise([0, *ends_E.tolist()])]


class StackedExperts(nn.Module):
    """The experts as one module, whose parameters are those of the base with E in front.

    Args:
        base: the layer to copy; see `can_be_stacked`.
        num_experts: E.
    """

    def __init__(self, base: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.rows = _Rows()
        self.stack = copy.deepcopy(base)
        self.gated = is_gated(base)
        for name, module in base.named_modules():
            if isinstance(module, nn.Linear):
                parent, _, attribute = name.rpartition(".")
                setattr(self.stack.get_submodule(parent), attribute, GroupedLinear(module, num_experts, self.rows))

    def forward(self, x_MD: Tensor, to: Dispatch) -> tuple[Tensor, Tensor | None]:
        """[M, D], rows sorted by expert, to [M, D]; a stack has no auxiliary loss of its own."""
        if self.gated and _plain_cpu(x_MD, self.stack):
            return gated_experts(x_MD, self.stack, sizes(to.ends_E)), None
        self.rows.dispatch = to
        try:
            return cast(Tensor, self.stack(x_MD[None])).squeeze(0), None
        finally:
            self.rows.dispatch = None

    def copies_of(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters that hold the copies of the base's parameter `name`: one, with E in front."""
        yield self.stack.get_parameter(name)

    def copy_of(self, name: str, expert: int) -> Tensor:
        """Expert number `expert`'s copy of it, a view."""
        return self.stack.get_parameter(name)[expert]


class SeparateExperts(nn.Module):
    """The experts as E modules, each called with its own rows."""

    def __init__(self, base: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.each = nn.ModuleList(copy.deepcopy(base) for _ in range(num_experts))

    def forward(self, x_MD: Tensor, to: Dispatch) -> tuple[Tensor, Tensor | None]:
        """As that of `StackedExperts`, with the experts' own auxiliary losses, weighted by their share of the rows."""
        outs: list[Tensor] = []
        aux_loss: Tensor | None = None
        for expert, rows in zip(self.each, rows_by_expert(x_MD, to.ends_E), strict=True):
            if len(rows):
                out, aux = split_output(expert(rows[None]))
                outs.append(out.squeeze(0))
                if aux is not None:
                    share = aux * (len(rows) / len(x_MD))
                    aux_loss = share if aux_loss is None else aux_loss + share
            elif torch.is_grad_enabled():
                outs.append(_no_rows(expert, x_MD))
        return (torch.cat(outs) if outs else x_MD), aux_loss

    def copies_of(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters that hold the copies of the base's parameter `name`, one per expert."""
        for expert in self.each:
            yield expert.get_parameter(name)

    def copy_of(self, name: str, expert: int) -> Tensor:
        """Expert number `expert`'s copy of it."""
        return self.each[expert].get_parameter(name)


def _no_rows(expert: nn.Module, x_MD: Tensor) -> Tensor:
    """[0, D], of which every parameter of the expert has a gradient, of zeros: as one of a stack has. Processes that
    share a model out sum the gradients of the same parameters, whichever experts their own tokens visit."""
    nothing = [parameter.flatten()[:0].sum() for parameter in expert.parameters() if parameter.requires_grad]
    return x_MD[:0] + sum(nothing) if nothing else x_MD[:0]


def _plain_cpu(x: Tensor, stack: nn.Module) -> bool:
    """Whether torch is to compute just what it is told: on a CPU, in one dtype, and not traced."""
    same = x.dtype == next(stack.parameters()).dtype and not torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and same and not torch.compiler.is_compiling()


def split_output(out: Any) -> tuple[Tensor, Tensor | None]:
    """What an FFN layer returns as (output, auxiliary loss or None)."""
    return out if isinstance(out, tuple) else (out, None)


def make_experts(base: nn.Module, num_experts: int) -> StackedExperts | SeparateExperts:
    """E copies of `base`, stacked where that computes the same."""
    return StackedExperts(base, num_experts) if can_be_stacked(base) else SeparateExperts(base, num_experts)


def can_be_stacked(base: nn.Module) -> bool:
    """Whether every weight of `base` lies in an `nn.Linear` of its own, and stacking two copies computes what each does
    alone; tried out on a few rows, for a forward may use its weights in ways of its own."""
    linears = [module for module in base.modules() if type(module) is nn.Linear]
    own = {id(p) for linear in linears for p in linear.parameters()}
    if not linears or isinstance(base, nn.Linear) or next(base.buffers(), None) is not None:
        return False
    if own != {id(p) for p in base.parameters()} or len({id(linear.weight) for linear in linears}) != len(linears):
        return False
    if any(p.is_meta for p in base.parameters()):
        return True
    weight = linears[0].weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, int(cast(int, base.d_model)), generator=generator).to(weight.device, weight.dtype)
    expert = torch.tensor([0, 0, 1, 1, 1], device=weight.device)
    row = torch.arange(5, device=weight.device)
    to = Dispatch(row, row, expert, torch.tensor([2, 5], dtype=torch.int32, device=weight.device), row[:, None], None)
    try:
        with torch.no_grad():
            one, two = copy.deepcopy(base).eval(), copy.deepcopy(base).eval()
            # Not the weights of the base: a last matrix that starts near zero hides what comes before it.
            for p in (*one.parameters(), *two.parameters()):
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
            both = StackedExperts(one, 2)
            for name, p in two.named_parameters():
                next(both.copies_of(name))[1].copy_(p)
            expected = torch.cat([one(x[None, :2]), two(x[None, 2:])], dim=1)[0]
            return bool((both(x, to)[0] - expected).norm() <= 1e-2 * expected.norm())
    except Exception:
        return False  # it does something with its weights that a stack of them does not allow


def _stacked(parameter: Tensor, num_experts: int) -> nn.Parameter:
    stacked = nn.Parameter(parameter.detach().expand(num_experts, *parameter.shape).clone())
    # E vectors make a matrix, which would decay; and what marks the base's parameter marks its copies.
    stacked.__dict__.update(parameter.__dict__)
    if parameter.ndim < 2:
        stacked.no_weight_decay = True  # type: ignore[attr-defined]
    return stacked
