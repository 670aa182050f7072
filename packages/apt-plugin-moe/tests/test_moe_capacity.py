"""Who gets which expert, against a plain loop over tokens; and rows to their experts and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from apt_plugin_moe.capacity import assign, places
from apt_plugin_moe.config import MoEConfig
from apt_plugin_moe.dispatch import combine, gather, sort_by_expert

torch.set_num_threads(1)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Scores [B, T, E], k and a limit; some skewed towards the first experts, some full of ties."""
    experts = draw(st.integers(2, 9))
    top_k = draw(st.integers(1, experts))
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randn(batch, length, experts, generator=generator)
    scores = scores - draw(st.sampled_from([0.0, 0.5, 5.0])) * torch.arange(experts)
    if draw(st.booleans()):
        scores = scores.round()
    return scores, top_k, draw(st.integers(1, batch * length + 1))


def in_turn(scores_BTE: Tensor):
    """(row of [B T], scores of its experts) in the order of choosing: by position, then by sequence."""
    batch, length, _ = scores_BTE.shape
    for t in range(length):
        for b in range(batch):
            yield b * length + t, scores_BTE[b, t].tolist()


def served(assigned, row: int) -> list[int]:
    experts = assigned.experts_Nk[row].tolist()
    kept = [True] * len(experts) if assigned.kept_Nk is None else assigned.kept_Nk[row].tolist()
    return [expert for expert, has_place in zip(experts, kept, strict=True) if has_place]


@settings(max_examples=250, deadline=None)
@given(batches())
def test_each_token_in_turn_takes_the_best_experts_that_have_room(drawn) -> None:
    """Scores are compared, not experts: which of two equals a token takes is free."""
    scores_BTE, top_k, limit = drawn
    assigned = assign(scores_BTE, top_k, limit, "next")
    room = [limit] * scores_BTE.shape[2]
    for row, scores in in_turn(scores_BTE):
        got = served(assigned, row)
        best = sorted((s for s, left in zip(scores, room, strict=True) if left), reverse=True)[:top_k]
        assert [scores[expert] for expert in got] == best
        assert len(set(got)) == len(got)
        for expert in got:
            room[expert] -= 1
    assert min(room) >= 0
    if limit * len(room) >= scores_BTE[..., 0].numel() * top_k:
        assert assigned.kept_Nk is None or bool(assigned.kept_Nk.any(1).all())


@settings(max_examples=150, deadline=None)
@given(batches())
def test_dropping_keeps_the_first_that_ask(drawn) -> None:
    scores_BTE, top_k, limit = drawn
    assigned = assign(scores_BTE, top_k, limit, "drop")
    free = assign(scores_BTE, top_k, None, "drop")
    assert torch.equal(assigned.experts_Nk, free.experts_Nk)
    room = [limit] * scores_BTE.shape[2]
    for row, scores in in_turn(scores_BTE):
        asked = assigned.experts_Nk[row].tolist()
        assert [scores[expert] for expert in asked] == sorted(scores, reverse=True)[:top_k]
        assert served(assigned, row) == [expert for expert in asked if room[expert]]
        for expert in served(assigned, row):
            room[expert] -= 1


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from(["next", "drop"]), st.integers(0, 8))
def test_what_comes_later_changes_nothing_before_it(drawn, overflow: str, t: int) -> None:
    scores_BTE, top_k, limit = drawn
    batch, length, experts = scores_BTE.shape
    t = min(t, length - 1)
    other_BTE = scores_BTE.clone()
    other_BTE[:, t + 1 :] = torch.randn(batch, length - t - 1, experts, generator=torch.Generator().manual_seed(1))
    one, two = (assign(scores, top_k, limit, overflow) for scores in (scores_BTE, other_BTE))
    for b in range(batch):
        for row in range(b * length, b * length + t + 1):
            assert served(one, row) == served(two, row)


@settings(max_examples=100, deadline=None)
@given(batches(), st.sampled_from(["next", "drop"]))
def test_counts(drawn, overflow: str) -> None:
    scores_BTE, top_k, limit = drawn
    experts = scores_BTE.shape[2]
    free, held = assign(scores_BTE, top_k, None, overflow), assign(scores_BTE, top_k, limit, overflow)
    demand = [0] * experts
    for expert in free.experts_Nk.flatten().tolist():
        demand[expert] += 1
    assert free.demand_E.tolist() == held.demand_E.tolist() == demand
    assert free.kept_Nk is None and free.overflow is None
    over = sum(max(wanted - limit, 0) for wanted in demand)
    assert (0 if held.overflow is None else int(held.overflow)) == over
    if not over:
        assert held.kept_Nk is None and torch.equal(held.experts_Nk, free.experts_Nk)
    elif overflow == "drop":
        assert held.kept_Nk is not None and int((~held.kept_Nk).sum()) == over


def test_places_are_a_multiple_of_the_even_share() -> None:
    assert places(64, 2, 8, 1.25) == 20
    assert places(64, 2, 8, 1.0) == 16
    assert places(10, 1, 8, 1.0) == 2, "rounded up, or some token goes without"
    assert places(1, 1, 64, 0.5) == 1


# Rows to their experts and back


def choices(n: int, k: int, experts: int, kept: str) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(n)
    experts_Nk = torch.rand(n, experts, generator=generator).topk(k).indices
    if kept == "all":
        return experts_Nk, None
    return experts_Nk, torch.rand(n, k, generator=generator) < (0.6 if kept == "some" else 0.0)


@pytest.mark.parametrize("kept", ["all", "some", "none"])
@pytest.mark.parametrize(("n", "k", "experts"), [(1, 1, 2), (7, 2, 3), (6, 3, 16)])
def test_rows_there_and_back(n: int, k: int, experts: int, kept: str) -> None:
    experts_Nk, kept_Nk = choices(n, k, experts, kept)
    to = sort_by_expert(experts_Nk, kept_Nk, experts)
    has_row = torch.ones(n, k) if kept_Nk is None else kept_Nk.double()
    pairs = sorted(
        (int(experts_Nk[i, j]), i * k + j) for i in range(n) for j in range(k) if has_row[i, j]
    )  # by expert, then by token
    assert to.expert_M.tolist() == [expert for expert, _ in pairs]
    assert to.slot_M.tolist() == [slot for _, slot in pairs]
    assert to.token_M.tolist() == [slot // k for _, slot in pairs]
    assert to.ends_E.tolist() == [sum(expert <= e for expert, _ in pairs) for e in range(experts)]
    assert to.ends_E.dtype == torch.int32

    x_ND = torch.randn(n, 4, dtype=torch.float64, requires_grad=True)
    y_MD = torch.randn(len(pairs), 4, dtype=torch.float64, requires_grad=True)
    weights_Nk = torch.rand(n, k, dtype=torch.float64, requires_grad=True)
    assert torch.equal(gather(x_ND, to), x_ND[[slot // k for _, slot in pairs]])
    out_ND = [torch.zeros(4, dtype=torch.float64) for _ in range(n)]
    for m, (_, slot) in enumerate(pairs):
        out_ND[slot // k] = out_ND[slot // k] + weights_Nk[slot // k, slot % k] * y_MD[m]
    torch.testing.assert_close(combine(y_MD, weights_Nk * has_row, to), torch.stack(out_ND))

    assert torch.autograd.gradcheck(lambda x: gather(x, to), (x_ND,))
    assert torch.autograd.gradcheck(lambda y, w: combine(y, w * has_row, to), (y_MD, weights_Nk))


def test_a_gradient_of_no_rows_is_zero_and_not_missing() -> None:
    to = sort_by_expert(*choices(5, 2, 3, "none"), 3)
    x_ND = torch.randn(5, 4, requires_grad=True)
    combine(gather(x_ND, to), torch.zeros(5, 2), to).sum().backward()
    assert x_ND.grad is not None and not x_ND.grad.any()


def test_the_weight_of_a_choice_without_a_row_has_no_gradient() -> None:
    experts_Nk, kept_Nk = choices(7, 2, 3, "some")
    weights_Nk = kept_Nk.double().requires_grad_()
    y_MD = torch.randn(int(kept_Nk.sum()), 4, dtype=torch.float64)
    combine(y_MD, weights_Nk, sort_by_expert(experts_Nk, kept_Nk, 3)).sum().backward()
    assert torch.equal(weights_Nk.grad != 0, kept_Nk)


# The section


@pytest.mark.parametrize(
    "options",
    [
        {"experts": 4, "top_k": 5},
        {"capacity": 0.9},
        {"capacity": 0.0, "overflow": "drop"},
        {"capacity": math.inf},
        {"experts": 1},
        {"top_k": 0},
        {"overflow": "last"},
        {"jitter": 1.0},
        {"expert": 8},
        {"balance_loss": -0.1},
    ],
)
def test_options_that_do_not_fit(options) -> None:
    with pytest.raises(ValidationError):
        MoEConfig(**options)


def test_options_that_fit() -> None:
    assert MoEConfig(capacity=0.5, overflow="drop").capacity == 0.5
    assert MoEConfig(capacity=None).capacity is None
    assert MoEConfig(experts=4, top_k=4, capacity=1).top_k == 4
