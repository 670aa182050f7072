"""Sampling: each setting against its definition, and chance that depends on seed and place alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.core.errors import ConfigError
from apt.inference.sampling import Draws, Sampling, sample, seed_of_row


def shares(sampling: Sampling, logits: list[float], tokens: list[int] | None = None) -> torch.Tensor:
    """The share of [0, 1) that falls on each token."""
    count = 4000
    draws = [(i + 0.5) / count for i in range(count)]
    before = None if tokens is None else torch.tensor([tokens]).expand(count, -1)
    chosen = sample(torch.tensor([logits], dtype=torch.float64).expand(count, -1), sampling, draws, before)
    return torch.bincount(chosen, minlength=len(logits)) / count


def plain(logits: list[float], sampling: Sampling, tokens: list[int]) -> list[float]:
    """The distribution as each setting's paper writes it down, token by token."""
    scores = list(logits)
    for token in set(tokens):
        scores[token] *= sampling.repetition_penalty if scores[token] < 0 else 1 / sampling.repetition_penalty
    weights = [math.exp((score - max(scores)) / sampling.temperature) for score in scores]
    ranked = sorted(range(len(weights)), key=lambda i: -weights[i])
    kept = set(ranked[: sampling.top_k])
    total = sum(weights[i] for i in kept)
    if sampling.top_p is not None:
        running, nucleus = 0.0, set()
        for i in ranked:
            if i in kept and running < sampling.top_p:
                nucleus.add(i)
                running += weights[i] / total
        kept = nucleus
    if sampling.min_p is not None:
        kept = {i for i in kept if weights[i] >= sampling.min_p * weights[ranked[0]]}
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-4, 4), min_size=2, max_size=7, unique_by=lambda x: round(x, 2)),
    st.floats(0.3, 3),
    st.one_of(st.none(), st.integers(1, 9)),
    st.one_of(st.none(), st.floats(0.05, 1)),
    st.one_of(st.none(), st.floats(0.01, 1)),
    st.floats(0.5, 2),
    st.data(),
)
def test_each_setting_is_what_its_definition_says(
    logits: list[float],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    penalty: float,
    data: st.DataObject,
) -> None:
    tokens = data.draw(st.lists(st.integers(0, len(logits) - 1), min_size=1, max_size=4))
    sampling = Sampling(temperature, top_k, top_p, min_p, penalty)
    expected = plain(logits, sampling, tokens)
    found = shares(sampling, logits, tokens).tolist()
    if max(abs(e - f) for e, f in zip(expected, found, strict=True)) > 2e-3:
        # On the very edge of p, rounding decides; then one step to either side gives what was found.
        near = [
            plain(logits, Sampling(temperature, top_k, p, m, penalty), tokens)
            for p in ([None] if top_p is None else [max(top_p - 1e-5, 1e-9), min(top_p + 1e-5, 1.0)])
            for m in ([None] if min_p is None else [min_p * (1 - 1e-5), min(min_p * (1 + 1e-5), 1.0)])
        ]
        assert any(found == pytest.approx(other, abs=2e-3) for other in near)


def test_temperature_zero_takes_the_likeliest_after_the_penalty() -> None:
    logits = torch.tensor([[0.1, 2.0, 1.9]])
    assert sample(logits, Sampling(0.0), []).tolist() == [1]
    assert sample(logits, Sampling(0.0, repetition_penalty=1.2), [], torch.tensor([[1, 1]])).tolist() == [2]
    assert sample(logits, Sampling(0.0, repetition_penalty=1.2), [], torch.tensor([[0, 0]])).tolist() == [1]


def test_the_ends_of_the_distribution_fall_on_tokens_that_can_be() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]]).expand(2, -1)
    assert sample(logits, Sampling(), [0.0, np.nextafter(1.0, 0.0)]).tolist() == [1, 2]
    certain = torch.full((1, 50_000), -math.inf)
    certain[0, 49_999] = 3.0
    for draw in (0.0, 0.5, float(np.nextafter(1.0, 0.0))):
        assert sample(certain, Sampling(), [draw]).tolist() == [49_999]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1},
        {"min_p": 2.0}, {"repetition_penalty": 0.0}, {"repetition_penalty": math.inf},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_chance_depends_on_seed_stream_and_place_alone() -> None:
    one, other = Draws(7), Draws(7)
    forward = [one.at(place) for place in range(200)]
    assert [other.at(place) for place in reversed(range(200))] == forward[::-1]
    assert (
        len({*forward, *(one.at(place, stream=1) for place in range(200)), *(Draws(8).at(p) for p in range(200))})
        == 600
    )


def test_neighbouring_seeds_are_as_even_as_one(  # rows of a batch take them
) -> None:
    firsts = np.array([Draws(seed).at(0) for seed in range(2000)])
    counts = np.histogram(firsts, bins=20, range=(0, 1))[0]
    assert ((counts - 100) ** 2 / 100).sum() < 43.8, "chi-squared, 19 degrees of freedom, 0.1 %"
    assert abs(np.corrcoef(firsts[:-1], firsts[1:])[0, 1]) < 0.08


def test_seeds_of_rows() -> None:
    assert [seed_of_row(3, row) for row in range(3)] == [3, 4, 5]
    assert seed_of_row(None, 0) != seed_of_row(None, 0)
    for wrong in (-1, 2**63):
        with pytest.raises(ConfigError, match="the seed is"):
            seed_of_row(wrong, 0)
