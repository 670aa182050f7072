"""The two losses against plain loops written from their definitions, and what their definitions promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from apt_plugin_align.losses import contrast, kl_divergence

B, T, V, D = 3, 5, 7, 4


@pytest.fixture
def states() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits, the stable ones, hidden, the stable ones, targets with three that take no part."""
    g = torch.Generator().manual_seed(0)
    targets_BT = torch.randint(0, V, (B, T), generator=g)
    targets_BT[0, 0] = targets_BT[1, 3] = targets_BT[2, 4] = -100
    wide, narrow = (torch.randn(2, B, T, n, generator=g) for n in (V, D))
    return wide[0], wide[1], narrow[0], narrow[1], targets_BT


def softmax(values: list[float]) -> list[float]:
    exponentials = [math.exp(value) for value in values]
    return [e / sum(exponentials) for e in exponentials]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def contrast_by_loops(
    hidden_BTD: Tensor, stable_BTD: Tensor, targets_BT: Tensor, tau: float, group_size: int
) -> tuple[float, int]:
    queries, keys = hidden_BTD.flatten(0, 1).tolist(), stable_BTD.flatten(0, 1).tolist()
    taking_part = (targets_BT.flatten() != -100).tolist()
    groups = math.ceil(len(queries) / group_size)
    losses = []
    for group in range(groups):
        members = [i for i in range(len(queries)) if i % groups == group and taking_part[i]]
        assert len(members) <= group_size
        for i in members:
            found = softmax([cosine(queries[i], keys[j]) / tau for j in members])
            target = softmax([cosine(keys[i], keys[j]) / tau for j in members])
            losses.append(kl(target, found))
    return sum(losses) / len(losses), len(losses)


def test_kl_divergence_is_that_of_plain_loops(states: tuple[Tensor, ...]) -> None:
    logits, stable, _, _, targets = states
    losses = [
        kl(softmax(stable[b, t].tolist()), softmax(logits[b, t].tolist()))
        for b in range(B)
        for t in range(T)
        if targets[b, t] != -100
    ]
    assert len(losses) == B * T - 3
    assert kl_divergence(logits, stable, targets).item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("group_size", [2, 4, 7, 14, 15, 1000])
def test_contrast_is_that_of_plain_loops(states: tuple[Tensor, ...], group_size: int) -> None:
    _, _, hidden, stable, targets = states
    expected, tokens = contrast_by_loops(hidden, stable, targets, 0.15, group_size)
    assert tokens == B * T - 3
    assert contrast(hidden, stable, targets, 0.15, group_size).item() == pytest.approx(expected, rel=1e-4)


def test_both_vanish_with_their_gradients_where_the_states_agree(states: tuple[Tensor, ...]) -> None:
    logits, _, hidden, _, targets = states
    for loss, x in ((kl_divergence, logits), (contrast, hidden)):
        x = x.clone().requires_grad_()
        options = (0.15, 1000) if loss is contrast else ()
        value = loss(x, x.detach(), targets, *options)
        value.backward()
        assert value.item() == pytest.approx(0, abs=1e-6)
        assert x.grad is not None
        assert x.grad.abs().max() < 1e-6


def test_contrast_finds_a_token_at_its_own_position_first(states: tuple[Tensor, ...]) -> None:
    """Of all ways to deal the stable states out to the positions, the loss prefers the right one."""
    _, _, _, stable, _ = states
    everywhere = torch.zeros(B, T, dtype=torch.int64)
    for shift in range(1, T):
        assert contrast(stable.roll(shift, 1), stable, everywhere, 0.15, 1000) > 0.01


def test_what_takes_no_part_is_neither_query_nor_key(states: tuple[Tensor, ...]) -> None:
    logits, stable_logits, hidden, stable_hidden, targets = states
    out = targets == -100
    before = kl_divergence(logits, stable_logits, targets), contrast(hidden, stable_hidden, targets, 0.15, 4)
    for x in (logits, stable_logits, hidden, stable_hidden):
        x[out] = 1e3 * torch.randn_like(x[out])
    after = kl_divergence(logits, stable_logits, targets), contrast(hidden, stable_hidden, targets, 0.15, 4)
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("group_size", [4, 1000])
def test_a_batch_without_targets_costs_nothing_and_stays_finite(states: tuple[Tensor, ...], group_size: int) -> None:
    logits, stable_logits, hidden, stable_hidden, targets = states
    logits.requires_grad_()
    hidden.requires_grad_()
    nothing = torch.full_like(targets, -100)
    loss = kl_divergence(logits, stable_logits, nothing) + contrast(hidden, stable_hidden, nothing, 0.15, group_size)
    loss.backward()
    assert loss.item() == 0
    for x in (logits, hidden):
        assert x.grad is not None
        assert not x.grad.any()


def test_gradients_are_those_of_finite_differences(states: tuple[Tensor, ...]) -> None:
    _, _, hidden, stable, targets = states
    hidden.requires_grad_()
    contrast(hidden, stable, targets, 0.5, 8).backward()
    assert hidden.grad is not None
    epsilon = 1e-3
    with torch.no_grad():
        for index in ((0, 1, 0), (1, 1, 2), (2, 0, 3)):
            there, back = hidden.clone(), hidden.clone()
            there[index] += epsilon
            back[index] -= epsilon
            up, down = (contrast_by_loops(x, stable, targets, 0.5, 8)[0] for x in (there, back))
            assert hidden.grad[index].item() == pytest.approx((up - down) / (2 * epsilon), rel=2e-2, abs=1e-4)


def test_bf16_is_computed_in_fp32_under_autocast(states: tuple[Tensor, ...]) -> None:
    logits, stable_logits, hidden, stable_hidden, targets = (
        x.bfloat16() if x.is_floating_point() else x for x in states
    )
    with torch.autocast("cpu", torch.bfloat16):
        inside = kl_divergence(logits, stable_logits, targets), contrast(hidden, stable_hidden, targets, 0.15, 8)
    assert {x.dtype for x in inside} == {torch.float32}
    outside = (
        kl_divergence(logits.float(), stable_logits.float(), targets),
        contrast(hidden.float(), stable_hidden.float(), targets, 0.15, 8),
    )
    torch.testing.assert_close(inside, outside)
