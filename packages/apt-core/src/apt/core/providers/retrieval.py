"""Retrieval: finds passages for a query."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from apt.core.registry import Provider


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text that was found, or is to be indexed."""

    text: str
    source: str
    """Where it comes from, in words a reader can follow: a path and a line, a URL."""
    score: float = 0.0
    """Larger is better; comparable only between results of one query."""


class RetrievalProvider(Provider):
    """Indexes passages and finds them again."""

    @abstractmethod
    def add(self, passages: Iterable[Passage]) -> None:
        """Index passages; their scores are ignored. Those of a source that was indexed before take the place of what
        was there."""

    @abstractmethod
    def retrieve(self, query: str, k: int = 5) -> Sequence[Passage]:
        """The best `k` passages for `query`, best first."""


__all__ = ["Passage", "RetrievalProvider"]
