"""The interface of stores: a folder on disk, or a schema of a PostgreSQL server."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray

from apt.api import DataError
from apt.core.providers.retrieval import Passage
from apt_plugin_rag.contents import Document, Fit, Floats, Integers

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a store is: who wrote it, with which settings, and whose vectors it holds."""

    retriever: str
    version: str
    """Of the retriever."""
    settings: dict[str, Any]
    embeddings: dict[str, Any] | None = None
    """Where the vectors come from, with a "fingerprint" that differs wherever vectors would; None where the store has
    none, or has them from its own terms."""

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> Manifest:
        """Raises DataError if it is none, or of another format."""
        if data.get("format") != FORMAT:
            raise DataError(
                f"{where} is a store of format {data.get('format')!r}, and this version reads format {FORMAT}",
                hint="index the texts again, into another store",
            )
        try:
            return cls(data["retriever"], data["version"], dict(data["settings"]), data["embeddings"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(where, f"its manifest lacks {error}") from error


class Size(NamedTuple):
    """How much a store holds."""

    documents: int
    passages: int
    terms: int
    """Different ones."""
    vectors: int
    dimensions: int


class Neighbours(NamedTuple):
    """What lies nearest to one query, nearest first."""

    passages: Integers
    """[k], ids of the passages that own the points."""
    values: Integers
    """[k], what the points stand for."""
    distances: Floats
    """[k], squared Euclidean."""


class Store(ABC):
    """Documents, and the two ways of finding their passages."""

    where: str
    """Its path or address, without a password."""

    @property
    @abstractmethod
    def manifest(self) -> Manifest | None:
        """None for a store that was never written."""

    @abstractmethod
    def documents(self) -> Mapping[str, str]:
        """{name: SHA-256 of its content}."""

    @abstractmethod
    def size(self) -> Size:
        """How much it holds."""

    @abstractmethod
    def update(
        self, manifest: Manifest, removed: Collection[str], added: Iterable[Document], fit: Fit | None = None
    ) -> None:
        """Take documents out and put others in, wholly or not at all.

        Args:
            removed: names.
            added: each takes the place of its namesake.
            fit: makes the vectors out of the terms of all passages.
        """

    @abstractmethod
    def match(self, terms: Sequence[str], k: int, *, k1: float, b: float) -> list[tuple[int, float]]:
        """The ids and scores of the `k` passages that match best, by BM25; those alone that hold one of the terms.

        Robertson et al. 1994 with Lucene's idf: per term log(1 + (N - n + 1/2) / (n + 1/2)) tf / (tf + k1 (1 - b + b
        length / mean length)). A term that is given twice counts twice.
        """

    @abstractmethod
    def nearest(self, queries_QD: Floats, k: int) -> list[Neighbours]:
        """The `k` points nearest to each query, exactly."""

    @abstractmethod
    def sample(self, count: int) -> Floats:
        """Up to `count` of its points, evenly spread over the documents."""

    @abstractmethod
    def read(self, ids: Sequence[int]) -> list[Passage]:
        """The passages of these ids, in that order."""

    @abstractmethod
    def array(self, name: str) -> NDArray[Any] | None:
        """An array that `fit` made; None where it has made none."""

    def close(self) -> None:
        """Give back what it holds open."""
        return None


def open_store(where: str | None, *, create: bool = False) -> Store:
    """Open a store.

    Args:
        where: a folder, or postgresql://...#SCHEMA; None for one in memory.
        create: whether it may be new.

    Raises:
        DataError: there is none, or it is damaged.
        ProviderError: the library that it needs is not installed.
    """
    if where is not None and where.startswith(("postgresql://", "postgres://")):
        from apt_plugin_rag.postgres import PostgresStore

        return PostgresStore(where, create=create)
    from apt_plugin_rag.folder import FolderStore

    return FolderStore(where, create=create)


def damaged(where: str, what: str) -> DataError:
    """The error for a store that is not as it was written."""
    return DataError(f"the store {where} is damaged: {what}", hint="index the texts again, into another store")


def missing(where: str) -> DataError:
    """The error for a store that is not there."""
    return DataError(f"there is no store in {where}", hint=f"make one with: apt rag index PATH --store {where}")
