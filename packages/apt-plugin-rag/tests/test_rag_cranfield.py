"""The retrievers on the Cranfield collection, where APT_CRANFIELD names its folder."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "retrieval.py"


@pytest.fixture(scope="module")
def benchmark() -> object:
    if not BENCHMARK.is_file():
        pytest.skip("the benchmarks lie in the repository, not beside an installed package")
    spec = importlib.util.spec_from_file_location("apt_benchmark_retrieval", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_measure_is_what_it_is_said_to_be(benchmark: object) -> None:
    ndcg = benchmark.ndcg  # type: ignore[attr-defined]
    assert ndcg(["a", "b"], {"a", "b"}) == 1
    assert ndcg(["x", "a"], {"a"}) == pytest.approx(0.6309, abs=1e-4)
    assert ndcg(["a", *"xyz"], {"a", "b", "c"}) == pytest.approx(1 / (1 + 0.63093 + 0.5), abs=1e-4)
    assert ndcg([*"xxxxxxxxxx", "a"], {"a"}) == 0
    assert ndcg([str(n) for n in range(10)], {str(n) for n in range(30)}) == pytest.approx(1)


def test_bm25_reaches_its_figure_and_the_hybrid_is_above_both_parts(
    benchmark: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "APT_CRANFIELD" not in os.environ:
        pytest.skip("APT_CRANFIELD does not name the folder of the Cranfield collection")
    pytest.importorskip("Stemmer", reason="PyStemmer is not installed")
    monkeypatch.setattr(sys, "argv", ["retrieval.py", "--check"])
    assert benchmark.main() == 0  # type: ignore[attr-defined]
