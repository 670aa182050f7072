"""Voter: chooses among several continuations."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apt.core.registry import Provider

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Candidate:
    """One continuation that was sampled."""

    tokens: tuple[int, ...]
    text: str
    """What they say, without a stop string and what comes after it."""
    logprob: float
    """Sum of the log-probabilities that the model gives its tokens, in nats."""


class VoterProvider(Provider):
    """Decides when to vote, and which candidate wins.

    Before each token the generator asks `should_vote`. If so, it samples `k` candidates of `length` tokens, keeps the
    one that `vote` chooses, and goes on behind it.
    """

    k: int = 3
    """How many candidates there are."""
    length: int | None = None
    """Tokens of a candidate; None: to the end of the text."""
    threshold: float | None = None
    """What `schedules.vote_threshold` sets; None where there is no such thing."""

    @abstractmethod
    def should_vote(self, logits: Tensor) -> bool:
        """Whether this next-token distribution (logits [V], -inf for what cannot be) asks for candidates."""

    def answer(self, candidate: Candidate) -> str | None:
        """What candidates agree or differ in; None for one that has no answer, and so no vote."""
        return candidate.text

    def vote(self, candidates: Sequence[Candidate]) -> int:
        """The index of the winning candidate; `candidates` is not empty.

        The answer that most of them give wins, and of several such the one whose candidate is the most likely; that is
        the candidate that is kept.
        """
        answers = [self.answer(candidate) for candidate in candidates]
        votes: Counter[str | None] = Counter(answer for answer in answers if answer is not None)
        return max(range(len(candidates)), key=lambda i: (votes[answers[i]], candidates[i].logprob))


__all__ = ["Candidate", "VoterProvider"]
