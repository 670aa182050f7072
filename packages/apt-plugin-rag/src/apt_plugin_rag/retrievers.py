"""The retrievers that find passages by their words, by their meaning, and by both."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from apt.api import ConfigError
from apt.core.providers.retrieval import Passage, RetrievalProvider
from apt_plugin_rag.contents import Document, Fit, Vectors
from apt_plugin_rag.embeddings import Embedder
from apt_plugin_rag.lsi import ARRAYS, LSI, fit
from apt_plugin_rag.store import Manifest, Store, damaged, open_store
from apt_plugin_rag.terms import Analyzer

BATCH = 64
"""Passages that a model embeds at a time."""

Scored = tuple[int, float]
"""A passage's id and its score."""


class Settings(BaseModel):
    """What every retriever is told."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    store: str | None = None
    """A folder, or postgresql://...#SCHEMA; in memory if left out."""
    passage_words: Annotated[int, Field(ge=1)] = 100
    """Most words of a passage."""


class TermSettings(Settings):
    """How texts become terms."""

    language: str = "english"
    """Whose stems and function words; `none` for words as they are."""


class BM25Settings(TermSettings):
    """As bm25s and Lucene have them."""

    k1: Annotated[float, Field(ge=0)] = 1.5
    """How much further occurrences of a term count."""
    b: Annotated[float, Field(ge=0, le=1)] = 0.75
    """How much long passages are held back."""


class DenseSettings(TermSettings):
    """Whose vectors."""

    model: str | None = None
    """Folder of a model of sentence-transformers or model2vec; latent semantic indexing if left out."""
    dimensions: Annotated[int, Field(ge=1)] = 100
    """Of latent semantic indexing (scikit-learn recommends 100)."""


class HybridSettings(BM25Settings, DenseSettings):
    """Both, and how they are fused."""

    depth: Annotated[int, Field(ge=1)] = 100
    """How many results of each are fused."""
    rank_constant: Annotated[float, Field(gt=0)] = 60
    """Of reciprocal rank fusion (Cormack et al. 2009 use 60)."""


class StoredRetriever(RetrievalProvider):
    """A retriever over a store. A subclass says what a passage is found by, and how."""

    Config: ClassVar[type[Settings]]
    name: ClassVar[str]
    version: ClassVar[str] = "1.0.0"
    search_settings: ClassVar[frozenset[str]] = frozenset({"store"})
    """The settings that a store may be searched with whatever it was indexed with."""

    config: Any

    def get_name(self) -> str:
        return self.name

    def get_version(self) -> str:
        return self.version

    def add(self, passages: Iterable[Passage]) -> None:
        import hashlib

        by_source: dict[str, list[Passage]] = {}
        for passage in passages:
            by_source.setdefault(passage.source, []).append(passage)
        # The length of each beside it, so that no other passages have the same content.
        content = {
            source: hashlib.sha256("".join(f"{len(p.text)}:{p.text}" for p in own).encode()).hexdigest()
            for source, own in by_source.items()
        }
        self.update((), [(source, content[source], own) for source, own in by_source.items()])

    def retrieve(self, query: str, k: int = 5) -> Sequence[Passage]:
        self.check()
        found = self.search(query, k)
        return [
            Passage(passage.text, passage.source, score)
            for passage, (_, score) in zip(self.store.read([i for i, _ in found]), found, strict=True)
        ]

    def update(
        self,
        removed: Collection[str],
        added: Iterable[tuple[str, str, Sequence[Passage]]],
        progress: Callable[[int], None] = lambda passages: None,
    ) -> None:
        """Take documents out of the store and put others in, wholly or not at all.

        Args:
            removed: names.
            added: (name, SHA-256, passages); each takes the place of its namesake.
            progress: is told how many more passages are done.

        Raises:
            ConfigError, DataError: the store is another retriever's, or has other settings or embeddings.
        """
        self.check()
        documents = []
        for name, sha256, passages in added:
            documents.append(self.analyse(name, sha256, passages))
            progress(len(passages))
        self.store.update(self.manifest(), removed, documents, self.fit())

    def check(self) -> None:
        """Raise ConfigError if the store that is there is not this retriever's, with these settings and embeddings."""
        there = self.store.manifest
        if there is None:
            return
        own = self.manifest()
        if there.retriever != own.retriever:
            raise ConfigError(
                f"the store {self.store.where} is one of {there.retriever}, not of {own.retriever}",
                hint=f"leave --retriever {own.retriever} out, or name another store",
            )
        different = [
            f"{name} {there.settings.get(name)!r}, not {value!r}"
            for name, value in own.settings.items()
            if there.settings.get(name) != value and name not in self.search_settings
        ]
        if different:
            raise ConfigError(
                f"the store {self.store.where} was made with {', '.join(different)}",
                hint="leave these settings out, or name another store",
            )
        theirs, ours = ((m.embeddings or {}).get("fingerprint") for m in (there, own))
        if theirs != ours:
            raise ConfigError(
                f"the store {self.store.where} holds the embeddings of another model: "
                f"{_describe(there.embeddings)}, not of {_describe(own.embeddings)}",
                hint="use that one, or index the texts again into another store",
            )

    def manifest(self) -> Manifest:
        """What a store of this retriever says of itself."""
        settings = self.config.model_dump(mode="json", exclude=self.search_settings)
        return Manifest(self.name, self.version, settings, self.embeddings())

    @cached_property
    def store(self) -> Store:
        """The store of the settings, which may be new."""
        return open_store(self.config.store, create=True)

    @abstractmethod
    def analyse(self, name: str, sha256: str, passages: Sequence[Passage]) -> Document:
        """A document, with what its passages are found by."""

    @abstractmethod
    def search(self, query: str, k: int) -> list[Scored]:
        """The best `k` passages, best first."""

    def fit(self) -> Fit | None:
        """What makes the vectors of all passages out of their terms; None where each has its own."""
        return None

    def embeddings(self) -> dict[str, Any] | None:
        """Where the vectors come from, with a "fingerprint"; None where they come from the store's own terms."""
        return None


class BM25Retriever(StoredRetriever):
    """By words: BM25 over stemmed terms."""

    name = "bm25"
    Config = BM25Settings

    @cached_property
    def _analyzer(self) -> Analyzer:
        return Analyzer(self.config.language)

    def analyse(self, name: str, sha256: str, passages: Sequence[Passage]) -> Document:
        return Document(name, sha256, passages, [self._analyzer.counts(passage.text) for passage in passages])

    def search(self, query: str, k: int) -> list[Scored]:
        return self.store.match(self._analyzer.query(query), k, k1=self.config.k1, b=self.config.b)


class DenseRetriever(StoredRetriever):
    """By meaning: the cosine of vectors, of a model's or of latent semantic indexing."""

    name = "dense"
    Config = DenseSettings
    search_settings = StoredRetriever.search_settings | {"model"}

    @cached_property
    def _analyzer(self) -> Analyzer:
        return Analyzer(self.config.language)

    @cached_property
    def _model(self) -> Embedder | None:
        return Embedder(self.config.model) if self.config.model is not None else None

    def analyse(self, name: str, sha256: str, passages: Sequence[Passage]) -> Document:
        if self._model is None:
            return Document(name, sha256, passages, [self._analyzer.counts(passage.text) for passage in passages])
        texts = [passage.text for passage in passages]
        if not texts:
            return Document(name, sha256, passages)
        points = np.concatenate([self._model.embed(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)])
        owners = np.flatnonzero(np.any(points != 0, axis=1)).astype(np.int64)
        return Document(name, sha256, passages, vectors=Vectors.of(points[owners], owners))

    def fit(self) -> Fit | None:
        return partial(fit, dimensions=self.config.dimensions) if self._model is None else None

    def embeddings(self) -> dict[str, Any] | None:
        return self._model.description if self._model is not None else None

    def search(self, query: str, k: int) -> list[Scored]:
        vector_K = self._model.embed([query])[0] if self._model is not None else self._by_terms(query)
        if vector_K is None or not vector_K.any():
            return []
        [found] = self.store.nearest(vector_K[None], k)
        # Vectors have length one: |x - y|^2 = 2 - 2 cos(x, y).
        return list(zip(found.passages.tolist(), (1 - found.distances / 2).tolist(), strict=True))

    def _by_terms(self, query: str) -> Any:
        try:
            return self._lsi.embed(Counter(self._analyzer.query(query))) if self._lsi is not None else None
        except (ValueError, IndexError, TypeError) as error:
            raise damaged(self.store.where, f"its arrays do not fit each other ({error})") from error

    def update(self, *changes: Any, **more: Any) -> None:
        self.__dict__.pop("_lsi", None)
        super().update(*changes, **more)

    @cached_property
    def _lsi(self) -> LSI | None:
        """None for a store that is empty."""
        arrays = {name: array for name in ARRAYS if (array := self.store.array(name)) is not None}
        return LSI(arrays) if arrays else None


class HybridRetriever(DenseRetriever, BM25Retriever):
    """By both: BM25 and vectors, joined by reciprocal rank fusion.

    Cormack et al. 2009: a passage scores the sum of 1 / (60 + rank) over the lists that it is in.
    """

    name = "hybrid"
    Config = HybridSettings
    search_settings = DenseRetriever.search_settings | {"depth", "rank_constant"}

    def analyse(self, name: str, sha256: str, passages: Sequence[Passage]) -> Document:
        dense = DenseRetriever.analyse(self, name, sha256, passages)
        lexical = BM25Retriever.analyse(self, name, sha256, passages)
        return Document(name, sha256, passages, lexical.terms, dense.vectors)

    def search(self, query: str, k: int) -> list[Scored]:
        depth = max(k, self.config.depth)
        lists = (BM25Retriever.search(self, query, depth), DenseRetriever.search(self, query, depth))
        return fuse(lists, self.config.rank_constant)[:k]


def fuse(lists: Iterable[Sequence[Scored]], rank_constant: float) -> list[Scored]:
    """Reciprocal rank fusion of lists that are ordered best first; of equal scores the lower id comes first."""
    scores: dict[int, float] = {}
    for ranked in lists:
        for rank, (passage, _) in enumerate(ranked, start=1):
            scores[passage] = scores.get(passage, 0.0) + 1 / (rank_constant + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def _describe(embeddings: Mapping[str, Any] | None) -> str:
    return f"{embeddings['kind']} {embeddings['model']}" if embeddings else "latent semantic indexing of its own texts"
