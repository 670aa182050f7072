"""Voter: chooses among several continuations."""

from __future__ import annotations

from abc import abstractmethod
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
    logprob: float
    """Sum of the log-probabilities of its tokens, in nats."""


class VoterProvider(Provider):
    """Decides when to vote, and which candidate wins."""

    def should_vote(self, logits: Tensor) -> bool:
        """Whether this next-token distribution (logits [V]) is uncertain enough to ask for candidates."""
        return True

    @abstractmethod
    def vote(self, candidates: Sequence[Candidate]) -> int:
        """The index of the winning candidate; `candidates` is not empty."""


__all__ = ["Candidate", "VoterProvider"]
