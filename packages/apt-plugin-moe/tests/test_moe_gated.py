"""Gated experts on a CPU: what the grouped products compute, forward and in every gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apt.modeling.layers.config import FFNConfig
from apt.modeling.layers.ffn import GatedFeedForward
from apt_plugin_moe.dispatch import sort_by_expert
from apt_plugin_moe.experts import StackedExperts
from apt_plugin_moe.gated import gated_experts, is_gated

E, D = 4, 8


def experts(dtype: torch.dtype = torch.float64) -> StackedExperts:
    torch.manual_seed(0)
    stack = StackedExperts(GatedFeedForward(D, 12, FFNConfig()).to(dtype), E)
    for p in stack.parameters():
        nn.init.normal_(p, std=0.4)
    return stack


def test_it_is_the_grouped_products_with_idle_experts_too() -> None:
    chosen_Nk = torch.tensor([[0, 3], [3, 0], [0, 3], [0, 0], [3, 3]])  # experts 1 and 2 have no rows
    results: list[list[Tensor]] = []
    for gated in (True, False):
        stack = experts()
        stack.gated = gated
        to = sort_by_expert(chosen_Nk, None, E)
        x = torch.randn(10, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = stack(x, to)[0]
        # An expanded gradient, whose strides are zero.
        y.sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in stack.parameters())])
    for ours, grouped in zip(*results, strict=True):
        torch.testing.assert_close(ours, grouped)
    assert all(bool((grad[1:3] == 0).all()) for grad in results[0][2:])


def test_its_gradient_is_that_of_its_output() -> None:
    stack = experts()
    x = torch.randn(6, D, dtype=torch.float64).requires_grad_()

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        holder = nn.Module()
        for name, weight in zip(("w_gate", "w_up", "w_down"), weights, strict=True):
            holder.add_module(name, nn.Module())
            holder.get_submodule(name)._parameters["weight"] = weight
        return gated_experts(x, holder, [1, 3, 0, 2])

    assert torch.autograd.gradcheck(run, (x, *stack.parameters()))


def test_what_does_more_than_the_gate_goes_the_general_way() -> None:
    assert is_gated(GatedFeedForward(D, 12, FFNConfig()))
    assert not is_gated(GatedFeedForward(D, 12, FFNConfig(), dropout=0.1))
    assert not is_gated(GatedFeedForward(D, 12, FFNConfig(bias=True)))
    assert not is_gated(type("Other", (GatedFeedForward,), {})(D, 12, FFNConfig()))


def test_autocast_goes_the_general_way() -> None:
    stack = experts(torch.float32)
    to = sort_by_expert(torch.tensor([[0], [1], [2], [3]]), None, E)
    x = torch.randn(4, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = stack(x, to)[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), stack(x, to)[0], atol=0.1, rtol=0.1)
