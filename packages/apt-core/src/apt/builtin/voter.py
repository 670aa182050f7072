"""Voters: when a model is unsure, or always, several continuations are sampled and the majority is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apt.builtin.config import VotingConfig
from apt.core.providers.voter import Candidate, VoterProvider


class EntropyVoter(VoterProvider):
    """Votes on the next few tokens wherever the next one is uncertain."""

    Config = VotingConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.k, self.length, self.threshold = self.config.k, self.config.rollout, self.config.threshold

    def get_name(self) -> str:
        return "entropy"

    def get_version(self) -> str:
        return "1.0.0"

    def should_vote(self, logits: Tensor) -> bool:
        assert self.threshold is not None
        return entropy(logits) > self.threshold


class SelfConsistencyVoter(VoterProvider):
    """Samples whole answers and keeps the one that most agree on (Wang et al. 2022, "Self-Consistency", section 2)."""

    Config = VotingConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.k = self.config.k

    def get_name(self) -> str:
        return "self_consistency"

    def get_version(self) -> str:
        return "1.0.0"

    def should_vote(self, logits: Tensor) -> bool:
        return True

    def answer(self, candidate: Candidate) -> str | None:
        answer: str | None = self.config.answer(candidate.text)
        return answer


def entropy(logits: Tensor) -> float:
    """The entropy, in nats, of the distribution with these logits [V]."""
    return float(torch.special.entr(logits.float().softmax(dim=-1)).sum())


__all__ = ["EntropyVoter", "SelfConsistencyVoter", "VotingConfig", "entropy"]
