"""Dataset: where the text comes from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from apt.core.registry import Provider


class Piece(NamedTuple):
    """A document, or a part of one that is too long to hold in memory at once."""

    text: str
    """Without NUL characters, which stand between documents where a vocabulary has no better sign."""
    continues: bool = False
    """Whether it goes on with the document of the piece before."""


class DatasetProvider(Provider):
    """Yields documents, the same ones in the same order each time it is asked."""

    pairs: ClassVar[bool] = False
    """Whether the documents are a source and its target in turn, none of them empty: what an encoder-decoder learns."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """The documents in order; one that fits in memory is one piece: `yield Piece(text)`.

        Raises:
            DataError: a file is missing, unreadable, or not text.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A string that changes whenever the documents do: tokens are cached under it."""

    def size_hint(self) -> int | None:
        """About how many bytes of UTF-8 `pieces` will yield in all, for progress; None if unknown."""
        return None


__all__ = ["DatasetProvider", "Piece"]
