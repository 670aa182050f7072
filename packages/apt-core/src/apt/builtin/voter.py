"""Voters: when a model is unsure, or always, several continuations are sampled and the majority is kept."""

from __future__ import annotations

import re
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from apt.core.config import Section
from apt.core.providers.voter import Candidate, VoterProvider


class VotingConfig(Section):
    """The section `model.voting`."""

    threshold: Annotated[float, Field(ge=0)] = 2.2
    """`entropy` votes where the entropy of the next token, in nats, is above this."""
    k: Annotated[int, Field(gt=0)] = 3
    """Candidates of a vote."""
    rollout: Annotated[int, Field(gt=0)] = 8
    """Tokens of each candidate of `entropy`, the uncertain one included."""
    temperature: Annotated[float, Field(gt=0)] = 0.7
    """Of the candidates with which the questions of `data.answers_path` are answered."""
    pattern: str | None = None
    """A regular expression that finds the answer in a text: its last match, or the group in it; the whole text, without
    the blanks around it, if left out."""

    @field_validator("pattern")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None) -> str | None:
        try:
            compiled = re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        if compiled.groups > 1:
            raise ValueError("more than one group: write (?:...) for those that are not the answer")
        return pattern

    def answer(self, text: str) -> str | None:
        """The answer in `text`; None if there is none."""
        if self.pattern is None:
            return text.strip()
        found = re.findall(self.pattern, text)
        return found[-1].strip() if found else None


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
