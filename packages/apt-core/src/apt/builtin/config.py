"""The section of core's voters."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator

from apt.core.config import Section


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
