"""The voters of core: when they vote, what they compare, and who wins."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt.builtin.config import VotingConfig
from apt.builtin.voter import EntropyVoter, SelfConsistencyVoter, entropy
from apt.core.errors import ConfigError
from apt.core.providers.voter import Candidate
from apt.core.registry import registry


def candidates(*answers: tuple[str, float]) -> list[Candidate]:
    return [Candidate((), text, logprob) for text, logprob in answers]


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
def test_entropy_is_minus_the_mean_log_probability(weights: list[float]) -> None:
    p = [weight / sum(weights) for weight in weights]
    logits = torch.tensor(p, dtype=torch.float64).log() + 3
    with_none = torch.cat([logits, torch.tensor([-math.inf])])
    expected = -sum(x * math.log(x) for x in p)
    assert entropy(logits) == pytest.approx(expected, abs=1e-5)
    assert entropy(with_none) == pytest.approx(expected, abs=1e-5)


def test_the_entropy_voter_votes_above_its_threshold_alone() -> None:
    voter = EntropyVoter({"threshold": 1.0, "rollout": 4, "k": 5})
    assert (voter.k, voter.length, voter.threshold) == (5, 4, 1.0)
    assert not voter.should_vote(torch.zeros(2))  # ln 2
    assert voter.should_vote(torch.zeros(3))  # ln 3
    voter.threshold = 1.2
    assert not voter.should_vote(torch.zeros(3))
    assert EntropyVoter().threshold == 2.2 and EntropyVoter().k == 3


def test_the_majority_wins_and_among_equals_the_likeliest() -> None:
    voter = EntropyVoter()
    assert voter.vote(candidates(("a", -9.0), ("b", -1.0), ("a", -8.0))) == 2
    assert voter.vote(candidates(("a", -9.0), ("b", -1.0), ("c", -8.0))) == 1
    assert voter.vote(candidates(("a", -9.0), ("b", -7.0), ("a", -8.0), ("b", -10.0))) == 1
    assert voter.vote(candidates(("a", -9.0))) == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(-9, 0)), min_size=1, max_size=7))
def test_no_other_answer_has_more_votes_or_as_many_and_is_likelier(made: list[tuple[str, float]]) -> None:
    winner = EntropyVoter().vote(candidates(*made))
    answer, logprob = made[winner]
    counts = {letter: sum(other == letter for other, _ in made) for letter in "abc"}
    assert counts[answer] == max(counts.values())
    assert all(counts[other] < counts[answer] or theirs <= logprob for other, theirs in made)


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (None, "  all of it \n", "all of it"), (None, "", ""), (r"\d+", "12;34;56 so", "56"), (r"\d+", "none", None),
        (r"= *(-?\d+)", "3 = -4 or 5", "-4"), (r"(?:a|b)c", "ac bc", "bc"),
    ],
)  # fmt: skip
def test_what_the_answer_in_a_text_is(pattern: str | None, text: str, answer: str | None) -> None:
    assert VotingConfig(pattern=pattern).answer(text) == answer
    assert SelfConsistencyVoter({"pattern": pattern}).answer(candidates((text, 0.0))[0]) == answer


def test_texts_without_an_answer_do_not_vote() -> None:
    voter = SelfConsistencyVoter({"pattern": r"\d+"})
    assert voter.should_vote(torch.zeros(2)) and voter.length is None
    assert voter.vote(candidates(("x", -1.0), ("y", -1.0), ("7", -50.0))) == 2
    assert voter.vote(candidates(("x", -3.0), ("y", -1.0))) == 1


@pytest.mark.parametrize(
    "section", [{"k": 0}, {"threshold": -1}, {"rollout": 0}, {"pattern": "("}, {"pattern": "(a)(b)"}, {"treshold": 1}]
)
def test_a_section_that_does_not_fit_is_refused(section: dict[str, object]) -> None:
    for name in ("entropy", "self_consistency"):
        with pytest.raises(ConfigError, match=next(iter(section))):
            registry.view().get("voter", name, section)


def test_they_are_registered_as_any_providers_are() -> None:
    assert {"entropy", "self_consistency"} <= set(registry.view().list_providers("voter")["voter"])
    for name in ("entropy", "self_consistency"):
        info = registry.view().get_info("voter", name)
        assert (info["plugin"], info["section"]) == ("builtin", "voting")
        assert registry.view().get("voter", name).get_name() == name
        assert registry.view().get("voter", name).get_version() == info["version"]


def test_a_voter_of_a_stranger_needs_one_method() -> None:
    from apt.core.providers.voter import VoterProvider

    class Always(VoterProvider):
        def get_name(self) -> str:
            return "always"

        def get_version(self) -> str:
            return "1"

        def should_vote(self, logits: torch.Tensor) -> bool:
            return True

    made: Sequence[Candidate] = candidates(("a", -9.0), ("b", -1.0), ("a", -8.0))
    assert Always().vote(made) == 2 and Always().threshold is None
