"""The retrievers that need no run under the conformance kit of core, over a store in memory and one in a folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from apt.testing import cases, parametrize_with_checks

pytest.importorskip("bm25s", reason="bm25s is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from apt_plugin_rag.retrievers import BM25Retriever, DenseRetriever, HybridRetriever

# Stems would need one package more, and change nothing in what is checked.
PLAIN = {"language": "none"}


@parametrize_with_checks("retrieval", lambda: BM25Retriever(PLAIN), at_least=13, name="bm25")
def test_bm25(check: Any) -> None:
    check()


@parametrize_with_checks("retrieval", lambda: DenseRetriever(PLAIN), at_least=13, name="dense")
def test_dense(check: Any) -> None:
    check()


@parametrize_with_checks("retrieval", lambda: HybridRetriever(PLAIN), at_least=13, name="hybrid")
def test_hybrid(check: Any) -> None:
    check()


def test_over_a_store_in_a_folder(tmp_path: Path) -> None:
    def build() -> BM25Retriever:
        return BM25Retriever({**PLAIN, "store": tempfile.mkdtemp(dir=tmp_path) + "/store"})

    results = [case.run() for case in cases("retrieval", build, name="bm25")]
    assert [(r.check.name, r.outcome, r.message) for r in results if r.outcome != "ok"] == []
