"""The run's tokenizers as tokenizers of the library: the same ids, and the same text back."""

from __future__ import annotations

from pathlib import Path

import pytest
from export_samples import TEXT
from hypothesis import given
from hypothesis import strategies as st

from apt.core.providers.dataset import Piece
from apt.data.tokenizers import BPETokenizerProvider, ByteTokenizer, CharTokenizer
from apt_plugin_quant.export.tokenizer import as_library_tokenizer


@pytest.fixture(scope="module")
def library_bytes(tmp_path_factory: pytest.TempPathFactory) -> object:
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
    ByteTokenizer().save(path)
    return as_library_tokenizer(path)


@given(st.text())
def test_bytes(library_bytes: object, text: str) -> None:
    ids = library_bytes.encode(text, add_special_tokens=False).ids  # type: ignore[attr-defined]
    assert ids == list(text.encode())
    assert library_bytes.decode(ids) == text  # type: ignore[attr-defined]


@given(st.text(alphabet=TEXT + "\r\n\u0301 ", min_size=1))
def test_characters(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("characters") / "tokenizer.json"
    ours = CharTokenizer(TEXT + "\r\n\u0301 ")
    ours.save(path)
    theirs = as_library_tokenizer(path)
    assert theirs is not None
    ids = theirs.encode(text).ids
    assert ids == list(ours.encode(text))
    assert theirs.decode(ids) == text


def test_a_character_outside_the_vocabulary_is_refused_by_both(tmp_path: Path) -> None:
    CharTokenizer("abc").save(tmp_path / "tokenizer.json")
    theirs = as_library_tokenizer(tmp_path / "tokenizer.json")
    assert theirs is not None
    with pytest.raises(Exception, match="UNK"):
        theirs.encode("abd")


def test_bpe_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ours = BPETokenizerProvider({"vocab_size": 270}).build(lambda: [Piece(TEXT * 9)])
    ours.save(tmp_path / "tokenizer.json")
    theirs = as_library_tokenizer(tmp_path / "tokenizer.json")
    assert theirs is not None
    assert theirs.encode(TEXT).ids == list(ours.encode(TEXT))


@pytest.mark.parametrize("content", ['{"apt_tokenizer": "morse"}', '{"words": []}', "[1]", "words\nof mine", "\xff"])
def test_what_the_library_does_not_know(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    assert as_library_tokenizer(tmp_path / "tokenizer.json") is None
