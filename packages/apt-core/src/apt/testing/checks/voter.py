"""Voter: decides when to ask for candidates, and which one wins."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch

from apt.core.providers.voter import Candidate
from apt.testing.check import check
from apt.testing.compare import require
from apt.testing.subjects import Subject, describe


def candidates(*texts_and_logprobs: tuple[str, float]) -> list[Candidate]:
    """Candidates with these texts and log-probabilities."""
    return [
        Candidate(tuple(range(index, index + len(text))), text, logprob)
        for index, (text, logprob) in enumerate(texts_and_logprobs)
    ]


DOMINATED = candidates(("42", -1.0), ("17", -6.0), ("42", -1.5), ("99", -7.0), ("42", -2.0))
"""One answer that most give and that is the likeliest too: whatever a voter goes by, it wins."""


def winner(provider: Any, of: list[Candidate]) -> Candidate:
    """The candidate that wins."""
    index: Any = provider.vote(of)
    is_index = isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(of)
    require(is_index, f"vote returns {describe(index)} for {len(of)} candidates: return an index from 0")
    won: Candidate = of[index]
    return won


@check("voter")
def the_winner_is_a_candidate(subject: Subject) -> None:
    """`vote` returns the index of one of the candidates, for one as for many, equal ones, ones without text and
    impossible ones: the text goes on with what stands there."""
    provider = subject.provider()
    odd = candidates(("", float("-inf")), ("", 0.0), ("?", -1e30), ("\n", -2.0))
    for group in (DOMINATED[:1], DOMINATED, candidates(*[("same", -1.0)] * 4), odd, odd[:1]):
        winner(provider, group)


@check("voter")
def the_answer_of_most_and_likeliest_wins(subject: Subject) -> None:
    """An answer that most candidates give, and that is the likeliest too, wins: whether a voter counts or weighs, both
    say the same here."""
    won = winner(subject.provider(), DOMINATED)
    require(won.text == "42", f"42 is given by 3 of 5 and is the likeliest, and {won.text!r} wins")


@check("voter")
def the_order_does_not_decide(subject: Subject) -> None:
    """The winning answer is the same in whatever order the candidates come: which one was sampled first says
    nothing."""
    provider = subject.provider()
    group = candidates(("a", -3.0), ("b", -1.0), ("b", -2.5), ("c", -4.0))
    won = {winner(provider, list(order)).text for order in itertools.permutations(group)}
    require(len(won) == 1, f"in other orders other answers win: {sorted(won)}; use the index to break ties alone")


@check("voter")
def voting_changes_nothing(subject: Subject) -> None:
    """The same candidates have the same winner, vote after vote, and the list is left as it is: a voter that remembers
    makes an answer depend on the questions before it."""
    provider, group = subject.provider(), copy.deepcopy(DOMINATED)
    others = candidates(("x", -1.0), ("x", -1.0), ("42", -9.0))
    first = winner(provider, group)
    for _ in range(3):
        winner(provider, others)
    again = winner(provider, group)
    require(again == first, f"{first.text!r} wins, and after other votes {again.text!r}")
    require(group == DOMINATED, "vote changes the list of candidates: work on a copy")


@check("voter")
def uncertainty_is_judged(subject: Subject) -> None:
    """`should_vote` gives a bool for any next-token distribution, impossible tokens, low precision and large
    vocabularies included, and leaves the logits as they are: it is asked before each token."""
    provider = subject.provider()
    generator = torch.Generator().manual_seed(0)
    peaked = torch.full((50,), -1e4)
    peaked[7] = 0
    partly = torch.randn(50, generator=generator)
    partly[::2] = float("-inf")
    for what, logits in (
        ("uniform", torch.zeros(50)),
        ("certain", peaked),
        ("partly impossible", partly),
        ("in bfloat16", torch.randn(50, generator=generator).bfloat16()),
        ("over 100,000 tokens", torch.randn(100_000, generator=generator)),
    ):
        before = logits.clone()
        decided = provider.should_vote(logits)
        require(isinstance(decided, bool), f"for logits {what}, should_vote gives {describe(decided)}: return a bool")
        require(torch.equal(logits, before), f"for logits {what}, should_vote changes them in place")


@check("voter")
def doubt_asks_for_no_fewer_votes(subject: Subject) -> None:
    """Where a certain distribution is voted on, an uncertain one is too: the other way round candidates are sampled
    where they all agree, and not where they would differ."""
    provider = subject.provider()
    decided = []
    for sharpness in (50.0, 8.0, 2.0, 0.5, 0.0):
        logits = torch.zeros(1000)
        logits[3] = sharpness
        decided.append(bool(provider.should_vote(logits)))
    require(
        decided == sorted(decided),
        f"from certain to uniform, should_vote says {decided}: vote where the entropy is above the threshold",
    )


@check("voter")
def it_asks_for_some_candidates(subject: Subject) -> None:
    """`k` is how many candidates it wants and `length` how many tokens of each, where it says so: positive, or None for
    as long as a text is."""
    provider = subject.provider()
    for name, may_be_none in (("k", False), ("length", True)):
        value = getattr(provider, name, None if may_be_none else 1)
        fits = (value is None and may_be_none) or (isinstance(value, int) and value > 0)
        require(fits, f"{name} is {value!r}: a positive int" + (" or None" if may_be_none else ""))
