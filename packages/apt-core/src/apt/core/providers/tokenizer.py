"""Tokenizer: text to token ids and back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from apt.core.providers.dataset import Piece
from apt.core.registry import Provider


class Tokenizer(Protocol):
    """A tokenizer that is ready for use."""

    vocab_size: int
    """Ids are 0 to vocab_size - 1."""
    eos_id: int | None
    """The id that ends a document; None if the vocabulary has none."""

    def encode(self, text: str) -> Sequence[int]:
        """The ids of `text`, without an end-of-document id. Raises DataError for text outside the vocabulary."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""

    def save(self, path: Path) -> None:
        """Write everything that `TokenizerProvider.load` needs to the one file `path`."""


class TokenizerProvider(Provider):
    """Builds tokenizers."""

    @abstractmethod
    def build(self, pieces: Callable[[], Iterable[Piece]]) -> Tokenizer:
        """A tokenizer for these documents, trained on them where it has to be. `pieces()` starts a fresh pass."""

    @abstractmethod
    def load(self, path: Path) -> Tokenizer:
        """The tokenizer that `Tokenizer.save` wrote to `path`."""


__all__ = ["Tokenizer", "TokenizerProvider"]
