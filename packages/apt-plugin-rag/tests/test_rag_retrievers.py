"""Retrievers beside what their definitions say, and stores that change beside stores made at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.core.providers.retrieval import Passage
from apt_plugin_rag import contents
from apt_plugin_rag.contents import Document, NearestPoints, Vectors
from apt_plugin_rag.retrievers import BM25Retriever, DenseRetriever, HybridRetriever, StoredRetriever, fuse

WORDS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]
PLAIN = {"language": "none"}


def texts(count: int, seed: int = 0) -> list[str]:
    drawn = np.random.default_rng(seed)
    return [" ".join(drawn.choice(WORDS, drawn.integers(2, 12))) for _ in range(count)]


def filled(cls: type[StoredRetriever], corpus: Sequence[str], **more: Any) -> StoredRetriever:
    retriever = cls({**PLAIN, **more})
    retriever.add(Passage(text, f"{number:03}") for number, text in enumerate(corpus))
    return retriever


def found(retriever: StoredRetriever, query: str, k: int = 5) -> list[tuple[str, float]]:
    return [(passage.source, passage.score) for passage in retriever.retrieve(query, k)]


def test_bm25_is_what_its_formula_says() -> None:
    corpus = texts(30)
    retriever = filled(BM25Retriever, corpus, k1=1.2, b=0.6)
    split = [text.split() for text in corpus]
    mean = sum(map(len, split)) / len(split)
    query = ["cat", "fox", "cat"]

    def score(words: list[str]) -> float:
        total = 0.0
        for term in query:
            n, tf = sum(term in other for other in split), words.count(term)
            idf = math.log(1 + (len(split) - n + 0.5) / (n + 0.5))
            total += idf * tf / (tf + 1.2 * (1 - 0.6 + 0.6 * len(words) / mean))
        return total

    expected = sorted(
        ((f"{i:03}", score(words)) for i, words in enumerate(split)), key=lambda pair: (-pair[1], pair[0])
    )
    assert found(retriever, "Cat fox, cat!", 10) == [
        (source, pytest.approx(s, rel=1e-5)) for source, s in expected[:10]
    ]


def test_lsi_is_the_cosine_of_truncated_singular_vectors() -> None:
    corpus = texts(30)
    retriever = filled(DenseRetriever, corpus, dimensions=4)
    counts_NV = np.array([[text.split().count(word) for word in WORDS] for text in corpus], float)
    idf_V = np.log((1 + len(corpus)) / (1 + (counts_NV > 0).sum(axis=0))) + 1

    def weigh(counts: Any) -> Any:
        weights = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf_V
        return weights / np.linalg.norm(weights, axis=-1, keepdims=True)

    basis_KV = np.linalg.svd(weigh(counts_NV))[2][:4]
    vectors_NK = weigh(counts_NV) @ basis_KV.T
    query_K = weigh(np.array([WORDS.index(w) == np.arange(8) for w in ("cat", "cat", "hen")]).sum(axis=0)) @ basis_KV.T
    cosines = vectors_NK @ query_K / np.linalg.norm(vectors_NK, axis=1) / np.linalg.norm(query_K)
    best = np.argsort(-cosines)[:5]
    assert found(retriever, "cat cat hen") == [(f"{i:03}", pytest.approx(cosines[i], abs=1e-5)) for i in best]


def test_where_there_are_few_passages_lsi_keeps_what_there_is() -> None:
    retriever = filled(DenseRetriever, ["ant bee", "cat dog"])
    assert found(retriever, "bee")[0] == ("000", pytest.approx(1, abs=1e-3))
    assert found(filled(DenseRetriever, ["ant"]), "ant") == [("000", pytest.approx(1, abs=1e-5))]


def test_fusion_is_what_its_formula_says() -> None:
    lists = [[(7, 9.0), (3, 8.0), (5, 1.0)], [(3, 0.9), (8, 0.8)]]
    assert fuse(lists, 60) == [(3, 1 / 62 + 1 / 61), (7, 1 / 61), (8, 1 / 62), (5, 1 / 63)]


def test_hybrid_fuses_the_lists_of_its_parts() -> None:
    corpus = texts(30)
    ranked = [
        [(int(source), score) for source, score in found(filled(cls, corpus), "dog eel", 100)]
        for cls in (BM25Retriever, DenseRetriever)
    ]
    expected = [(f"{i:03}", score) for i, score in fuse(ranked, 60)[:7]]
    assert found(filled(HybridRetriever, corpus), "dog eel", 7) == expected


@pytest.mark.parametrize("cls", [BM25Retriever, DenseRetriever, HybridRetriever])
def test_nothing_is_found_where_nothing_is(cls: type[StoredRetriever]) -> None:
    assert cls(PLAIN).retrieve("ant") == []
    assert found(filled(cls, ["ant bee", "!"]), "zebra") == []
    assert [source for source, _ in found(filled(cls, ["ant bee", "!"]), "ant", 9)] == ["000"]


@pytest.mark.parametrize("cls", [BM25Retriever, DenseRetriever, HybridRetriever])
def test_a_store_that_changed_is_the_one_made_at_once(cls: type[StoredRetriever], tmp_path: Path) -> None:
    corpus = {f"{number:03}": text for number, text in enumerate(texts(20, seed=1))}
    passages = {name: [Passage(text, f"{name}:1"), Passage(text[::-1], f"{name}:2")] for name, text in corpus.items()}
    at_once = cls({**PLAIN, "dimensions": 5} if cls is not BM25Retriever else PLAIN)
    at_once.update((), [(name, "new", passages[name]) for name in corpus])

    changing = cls({**at_once.config.model_dump(), "store": str(tmp_path / "store")})
    names = sorted(corpus)
    changing.update((), [(name, "old", [Passage("quite another", name)]) for name in [*names[5:15], "gone"]])
    changing.update((), [(name, "new", passages[name]) for name in names[:10]])
    again = cls(changing.config)  # from the disk
    again.update(["gone"], [(name, "new", passages[name]) for name in names[10:]])
    reopened = cls(changing.config)
    assert reopened.store.documents() == at_once.store.documents()
    assert reopened.store.size() == at_once.store.size()
    for query in ("ant bee", "gnu", "hen hen fox"):
        assert found(reopened, query) == [
            (source, pytest.approx(score, abs=1e-5)) for source, score in found(at_once, query)
        ]


def test_a_source_that_is_added_again_takes_the_place_of_what_was_there() -> None:
    retriever = filled(BM25Retriever, ["ant bee", "cat"])
    retriever.add([Passage("dog", "000"), Passage("eel", "000")])
    assert found(retriever, "ant") == []
    assert {passage.text for passage in retriever.retrieve("eel dog cat")} == {"cat", "dog", "eel"}
    assert retriever.store.size().passages == 3


@given(st.integers(0, 40), st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_nearest_points_are_those_of_the_definition(count: int, k: int, seed: int) -> None:
    drawn = np.random.default_rng(seed)
    points = drawn.integers(-2, 3, (count, 3)).astype(np.float32)  # with ties, and exact in fp32
    queries = drawn.integers(-2, 3, (4, 3)).astype(np.float32)
    whole = np.square(points - queries[:, None]).sum(axis=-1)
    before, contents.BLOCK = contents.BLOCK, 7
    try:
        which, distances = NearestPoints(points).search(queries, k)
    finally:
        contents.BLOCK = before
    for row, indices, found_distances in zip(whole, which, distances, strict=True):
        assert sorted(found_distances.tolist()) == sorted(row.tolist())[:k]
        assert found_distances.tolist() == row[indices].tolist() == sorted(found_distances.tolist())
        assert len(set(indices.tolist())) == len(indices) == min(k, count)


def test_points_stay_with_their_passages() -> None:
    one = Vectors.of(np.eye(3, dtype=np.float32), np.array([0, 0, 2]), np.array([5, 6, 7]))
    both = Vectors.join([(one, 4), (one.part(1, 2), 2)])
    assert both.owners.tolist() == [0, 0, 2, 5]
    assert both.values.tolist() == [5, 6, 7, 7]
    document = Document("a", "", [Passage("", "")] * 4, vectors=one)
    assert contents.Contents().changed((), [document]).vectors is not None


@pytest.mark.parametrize(
    "wrong",
    [{"k1": -1}, {"b": 2}, {"k2": 1}, {"passage_words": 0}, {"rank_constant": 0}, {"dimensions": 0}, {"depth": 0}],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        HybridRetriever(wrong)
