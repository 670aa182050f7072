"""Core's own providers under the conformance kit, in the configurations that take other paths through their code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apt.builtin.plugin import apt_register_providers
from apt.builtin.voter import EntropyVoter, SelfConsistencyVoter
from apt.core.registry import Registry
from apt.data.pairs import PairsDataset
from apt.data.sources import FilesDataset, StdlibDataset
from apt.data.tokenizers import (
    BPETokenizerProvider,
    ByteTokenizerProvider,
    CharTokenizerProvider,
    FileTokenizerProvider,
)
from apt.modeling.layers.attention_mha import MHAAttention
from apt.modeling.layers.attention_tva import TVAAttention
from apt.modeling.layers.ffn import DefaultFFN, SwiGLU
from apt.testing import cases, parametrize_with_checks
from apt.training.trackers import TensorBoardTracker


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APT_CACHE_DIR", str(tmp_path / "cache"))


def mha_grouped() -> MHAAttention:
    return MHAAttention({"num_kv_heads": 2, "qk_norm": True, "bias": True})


def tva_wide() -> TVAAttention:
    return TVAAttention({"r": 2, "qk_norm": False})


def bpe() -> BPETokenizerProvider:
    return BPETokenizerProvider({"vocab_size": 300})


@parametrize_with_checks("attention", TVAAttention, at_least=65, name="tva_default")
def test_tva(check: Any) -> None:
    check()


@parametrize_with_checks("attention", tva_wide, at_least=65, name="tva_default")
def test_tva_wide(check: Any) -> None:
    check()


@parametrize_with_checks("attention", MHAAttention, at_least=69, name="mha")
def test_mha(check: Any) -> None:
    check()


@parametrize_with_checks("attention", mha_grouped, at_least=69, name="mha")
def test_mha_grouped(check: Any) -> None:
    check()


@parametrize_with_checks("ffn", DefaultFFN, at_least=31, name="default")
def test_default_ffn(check: Any) -> None:
    check()


@parametrize_with_checks("ffn", lambda: SwiGLU({"bias": True}), at_least=31, name="swiglu")
def test_swiglu(check: Any) -> None:
    check()


@parametrize_with_checks("dataset", lambda: StdlibDataset({"max_bytes": 100_000}), at_least=11, name="stdlib")
def test_stdlib(check: Any) -> None:
    check()


@parametrize_with_checks("tokenizer", ByteTokenizerProvider, at_least=14, name="byte")
def test_bytes(check: Any) -> None:
    check()


@parametrize_with_checks("tokenizer", CharTokenizerProvider, at_least=14, name="char")
def test_characters(check: Any) -> None:
    check()


@parametrize_with_checks("tokenizer", bpe, at_least=14, name="bpe")
def test_bpe(check: Any) -> None:
    check()


@parametrize_with_checks("voter", EntropyVoter, at_least=12, name="entropy")
def test_entropy_voter(check: Any) -> None:
    check()


@parametrize_with_checks(
    "voter", lambda: SelfConsistencyVoter({"pattern": r"\d+"}), at_least=12, name="self_consistency"
)
def test_self_consistency_voter(check: Any) -> None:
    check()


def test_files(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"document {number}, größer\n" * (number + 1), encoding="utf-8")
    every = cases("dataset", lambda: FilesDataset({"train_path": str(tmp_path)}), name="files")
    assert {
        result.check.name: result.message for result in (case.run() for case in every) if result.outcome != "ok"
    } == {}


def test_pairs(tmp_path: Path) -> None:
    (tmp_path / "0.txt").write_text("eins\tone\nzwei, größer\ttwo\n", encoding="utf-8")
    (tmp_path / "1.jsonl").write_text('{"source": "drei", "target": "three"}\n', encoding="utf-8")
    every = cases("dataset", lambda: PairsDataset({"train_path": str(tmp_path)}), name="pairs")
    assert {
        result.check.name: result.message for result in (case.run() for case in every) if result.outcome != "ok"
    } == {}


def test_a_tokenizer_from_a_file(tmp_path: Path) -> None:
    from apt.core.providers.dataset import Piece

    path = tmp_path / "kept.json"
    ByteTokenizerProvider().build(lambda: [Piece("some text")]).save(path)
    every = cases("tokenizer", lambda: FileTokenizerProvider({"path": str(path)}), name="file")
    assert {
        result.check.name: result.message for result in (case.run() for case in every) if result.outcome != "ok"
    } == {}


def test_tensorboard() -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    results = [case.run() for case in cases("tracker", TensorBoardTracker, name="tensorboard")]
    assert [(r.check.name, r.message) for r in results if r.outcome == "FAILED"] == []
    assert sum(r.outcome == "ok" for r in results) >= 10


def test_none_is_left_out() -> None:
    registry = Registry()
    apt_register_providers(registry)
    known = {claim.slot for claim in registry.claims()}
    source = Path(__file__).read_text(encoding="utf-8")
    assert {slot for slot in known if f'name="{slot.partition(":")[2]}"' not in source} == set()
