"""What a store holds: documents, their passages, and what each is found by: terms, vectors, or both."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apt.core.providers.retrieval import Passage

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

BLOCK = 1 << 16
"""Vectors that are compared with a query at a time."""


@dataclass(frozen=True)
class Vectors:
    """Points in the order of the passages that own them; a passage may own none, one or many."""

    points: Floats
    """[M, D]."""
    owners: Integers
    """[M], ascending: the index of the passage."""
    values: Integers
    """[M]: what a point stands for beside its passage, a token id; zeros where it stands for nothing else."""

    @classmethod
    def of(cls, points: Floats, owners: Integers, values: Integers | None = None) -> Vectors:
        none = np.zeros(len(points), np.int64)
        return cls(np.ascontiguousarray(points, np.float32), owners, none if values is None else values)

    def part(self, first: int, count: int) -> Vectors:
        """The points of `count` passages from `first` on, whose owners then count from 0."""
        start, end = np.searchsorted(self.owners, [first, first + count])
        return Vectors(self.points[start:end], self.owners[start:end] - first, self.values[start:end])

    @classmethod
    def join(cls, parts: Sequence[tuple[Vectors, int]]) -> Vectors:
        """One after the other; beside each how many passages it is about."""
        starts = np.cumsum([0, *(count for _, count in parts)])
        return cls(
            np.concatenate([part.points for part, _ in parts]),
            np.concatenate([part.owners + start for (part, _), start in zip(parts, starts, strict=False)]),
            np.concatenate([part.values for part, _ in parts]),
        )


@dataclass(frozen=True)
class TermCounts:
    """How often each term occurs in each passage, as a sparse matrix in compressed rows."""

    vocabulary: list[str]
    """[V], sorted."""
    starts: Integers
    """[N + 1]: row i is [starts[i], starts[i + 1])."""
    terms: Integers
    """[nonzeros], ascending in each row: columns."""
    counts: Integers
    """[nonzeros]."""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, int]]) -> TermCounts:
        vocabulary = sorted(set().union(*rows))
        number = {term: index for index, term in enumerate(vocabulary)}
        cells = [sorted((number[term], count) for term, count in row.items()) for row in rows]
        flat = np.array([cell for row in cells for cell in row], np.int64).reshape(-1, 2)
        starts = np.cumsum([0, *map(len, cells)], dtype=np.int64)
        return cls(vocabulary, starts, np.ascontiguousarray(flat[:, 0]), np.ascontiguousarray(flat[:, 1]))

    def row(self, index: int) -> dict[str, int]:
        cells = slice(int(self.starts[index]), int(self.starts[index + 1]))
        pairs = zip(self.terms[cells].tolist(), self.counts[cells].tolist(), strict=True)
        return {self.vocabulary[term]: count for term, count in pairs}


@dataclass(frozen=True)
class Document:
    """A file that is to be indexed, or whatever else has a name and passages."""

    name: str
    sha256: str
    """Of its content: another one makes it another document."""
    passages: Sequence[Passage]
    terms: Sequence[Mapping[str, int]] | None = None
    """For each passage how often each term occurs; None where the store is not searched by terms."""
    vectors: Vectors | None = None
    """None where it is not searched by vectors, or where they come from all passages together."""


Fit = Callable[[TermCounts], tuple[Vectors, dict[str, NDArray[Any]]]]
"""Makes vectors out of the terms of all passages, and the arrays that a query is then made into a vector with."""


@dataclass(frozen=True)
class Contents:
    """Everything in a store, in the order of the documents' names."""

    documents: dict[str, tuple[str, int]] = field(default_factory=dict)
    """{name: (SHA-256 of its content, its number of passages)}, sorted."""
    passages: Sequence[Passage] = ()
    terms: TermCounts | None = None
    vectors: Vectors | None = None
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    """What the retriever has fitted to them."""

    def changed(self, removed: Collection[str], added: Iterable[Document], fit: Fit | None = None) -> Contents:
        """The contents without some documents and with others; an added one takes the place of its namesake.

        They are the same as if what is left had been indexed at once.
        """
        new = {document.name: document for document in added}
        passages: list[Passage] = []
        rows: list[Mapping[str, int]] = []
        points: list[tuple[Vectors, int]] = []
        documents: dict[str, tuple[str, int]] = {}
        starts = np.cumsum([0, *(count for _, count in self.documents.values())]).tolist()
        first = dict(zip(self.documents, starts, strict=False))
        for name in sorted(new.keys() | (self.documents.keys() - set(removed))):
            if (document := new.get(name)) is not None:
                count = len(document.passages)
                documents[name] = (document.sha256, count)
                passages += document.passages
                rows += document.terms or ()
                points += [(document.vectors, count)] if document.vectors is not None else []
                continue
            documents[name] = self.documents[name]
            count, start = self.documents[name][1], first[name]
            passages += [self.passages[i] for i in range(start, start + count)]
            rows += [self.terms.row(i) for i in range(start, start + count)] if self.terms is not None else []
            if self.vectors is not None and fit is None:
                points.append((self.vectors.part(start, count), count))
        terms = TermCounts.of(rows) if rows else None
        vectors = Vectors.join(points) if points else None
        arrays: dict[str, NDArray[Any]] = {}
        if fit is not None and terms is not None and terms.vocabulary:
            vectors, arrays = fit(terms)
        return Contents(documents, passages, terms, vectors, arrays)


class NearestPoints:
    """Exact search for the nearest points, by squared Euclidean distance."""

    def __init__(self, points: Floats) -> None:
        self._points = points
        self._norms = np.concatenate(
            [np.einsum("nd,nd->n", block, block) for block in _blocks(points)] or [np.zeros(0, np.float32)]
        )

    def search(self, queries_QD: Floats, k: int) -> tuple[list[Integers], list[Floats]]:
        """The indices and squared distances of the `k` points nearest to each query, nearest first; of equally near
        ones those that come first."""
        found = [np.zeros(0, np.int64) for _ in queries_QD]
        distances = [np.zeros(0, np.float32) for _ in queries_QD]
        worst = [math.inf] * len(queries_QD)
        squares_Q1 = np.einsum("qd,qd->q", queries_QD, queries_QD)[:, None]
        for number, block in enumerate(_blocks(self._points)):
            start = number * BLOCK
            distances_QB = squares_Q1 + self._norms[start : start + len(block)] - 2 * (queries_QD @ block.T)
            for query, row in enumerate(distances_QB):
                # After the first blocks few points are near enough, and sorting them costs next to nothing.
                near = np.flatnonzero(row < worst[query])
                if not near.size:
                    continue
                both = np.concatenate([distances[query], row[near]])
                which = np.concatenate([found[query], near + start])
                if len(both) > k:
                    kept = np.sort(np.argpartition(both, k - 1)[:k])
                    both, which = both[kept], which[kept]
                found[query], distances[query] = which, both
                if len(both) == k:
                    worst[query] = float(both.max())
        order = [np.argsort(row, kind="stable") for row in distances]
        return (
            [row[by] for row, by in zip(found, order, strict=True)],
            [np.maximum(row[by], 0) for row, by in zip(distances, order, strict=True)],
        )


def _blocks(points: Floats) -> Iterable[Floats]:
    return [points[start : start + BLOCK] for start in range(0, len(points), BLOCK)]
