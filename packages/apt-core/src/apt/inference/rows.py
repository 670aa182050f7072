"""Texts in the making, one by one, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from apt.core.providers.voter import Candidate
from apt.inference.sampling import Draws
from apt.inference.text import TextStream

Ended = Literal["end", "stop", "length"]
"""Why a text ends: the end of the document, a stop string, or because it is as long as it may be."""


@dataclass(frozen=True, slots=True)
class Vote:
    """One vote."""

    place: int
    """Before which new token of its text it was held, from 0."""
    answers: tuple[str | None, ...]
    """What each candidate answers; None where it has no answer."""
    winner: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The continuation of one prompt."""

    prompt: str
    text: str
    tokens: tuple[int, ...]
    """Without the token that ended the document; with those of a stop string."""
    ended: Ended
    votes: tuple[Vote, ...] = ()


class Row:
    """One text in the making.

    Args:
        text: what its tokens say.
        draws: the numbers that chance decides by.
        limit: tokens after which it ends.
        eos_id: the token that ends it.
    """

    def __init__(self, text: TextStream, draws: Draws, limit: int, eos_id: int | None) -> None:
        self.text, self.draws, self.stream, self.limit, self.eos_id = text, draws, 0, limit, eos_id
        self.tokens: list[int] = []
        self.logprob = 0.0
        self.votes: list[Vote] = []
        self.ended: Ended | None = None

    def push(self, token: int, logprob: float = 0.0) -> None:
        """Add a token."""
        self.logprob += logprob
        if token == self.eos_id:
            self.end("end")
            return
        self.tokens.append(token)
        self.text.push(token)
        if self.text.stopped:
            self.end("stop")
        elif len(self.tokens) >= self.limit:
            self.end("length")

    def end(self, why: Ended) -> None:
        """It ends here."""
        self.ended = why
        self.text.finish()

    def fork(self, stream: int) -> Row:
        """A candidate that goes on from here, by chances of its own."""
        other = Row(self.text.fork(), self.draws, self.limit, self.eos_id)
        other.tokens, other.stream, other.votes = self.tokens.copy(), stream, self.votes
        return other

    def beyond(self, other: Row) -> Candidate:
        """What this one, a fork of `other`, has beyond it."""
        text = self.text.fork()
        text.finish()
        return Candidate(tuple(self.tokens[len(other.tokens) :]), text.text[len(other.text.text) :], self.logprob)
