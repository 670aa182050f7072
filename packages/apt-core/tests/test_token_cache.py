"""Tokens on disk: stored once, verified on opening, written whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.core.errors import AptWarning, DataError, ProviderError
from apt.core.providers.dataset import Piece
from apt.data import token_store
from apt.data.token_store import Tokens, load_or_tokenize
from apt.data.tokenizers import ByteTokenizer

KEY = bytes(range(32))


class Numbers:
    """Reads numbers between blanks as their own ids."""

    def __init__(self, vocab_size: int, eos_id: int | None = None) -> None:
        self.vocab_size, self.eos_id = vocab_size, eos_id

    def encode(self, text: str) -> Sequence[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def save(self, path: Path) -> None:
        path.write_text(f"{self.vocab_size} {self.eos_id}")


def never() -> Iterable[Piece]:
    raise AssertionError("the text is read again")


def of(*texts: str) -> Callable[[], Iterable[Piece]]:
    return lambda: [Piece(text) for text in texts]


@settings(max_examples=50, deadline=None)
@given(
    documents=st.lists(
        st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=4)), max_size=6
    ),
    eos=st.booleans(),
)
def test_the_stream_is_the_documents_joined(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[str]], eos: bool
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    tokenizer = ByteTokenizer()
    tokenizer.eos_id = 0 if eos else None
    pieces = [Piece(text, continues=i > 0) for document in documents for i, text in enumerate(document)]
    texts = [text for text in ("".join(document) for document in documents) if text]
    if not texts:
        with pytest.raises(DataError, match="holds no text"):
            load_or_tokenize(folder, KEY, lambda: pieces, tokenizer)
        assert os.listdir(folder) == []
        return
    expected = ("\0" if eos else "").join(texts).encode()
    for source in (lambda: pieces, never):
        tokens = load_or_tokenize(folder, KEY, source, tokenizer)
        assert tokens.ids.tobytes() == expected and len(tokens) == len(expected)
        gap = 1 if eos else 0
        lengths = [len(text.encode()) + gap for text in texts]
        assert tokens.starts.tolist() == np.cumsum([0, *lengths[:-1]]).tolist()


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4"), (1 << 32, "u4")]
)
def test_ids_take_the_fewest_bytes(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    tokens = load_or_tokenize(
        tmp_path, KEY, of(f"0 {vocab_size - 1} 3", "7"), Numbers(vocab_size, eos_id=vocab_size - 1)
    )
    assert tokens.ids.dtype == dtype
    assert tokens.ids.tolist() == [0, vocab_size - 1, 3, vocab_size - 1, 7]
    assert not tokens.ids.flags.writeable
    assert type(tokens.ids) is np.ndarray


@pytest.mark.parametrize("word", ["-1", "10"])
def test_ids_outside_the_vocabulary_are_the_tokenizers_fault(tmp_path: Path, word: str) -> None:
    with pytest.raises(ProviderError, match="its vocabulary has 10"):
        load_or_tokenize(tmp_path, KEY, of(f"1 {word}"), Numbers(10))
    assert os.listdir(tmp_path) == []


def _stored(folder: Path) -> Path:
    load_or_tokenize(folder, KEY, of("hello", "world"), ByteTokenizer())
    (path,) = folder.iterdir()
    return path


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        *(
            pytest.param(lambda path, at=at: _flip(path, at), id=f"flip {at}")
            for at in (0, 9, 10, 12, 16, 24, 32, 64, 70, -1)
        ),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), id="cut short"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:64]), id="header alone"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes() + b"x"), id="longer"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(
            lambda path: path.write_text("another program's file, longer than the header is" * 3), id="foreign"
        ),
    ],
)
def test_a_damaged_file_is_noticed_and_made_again(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    path = _stored(tmp_path)
    good = path.read_bytes()
    damage(path)
    assert path.read_bytes() != good
    with pytest.warns(AptWarning, match="unusable"):
        tokens = load_or_tokenize(tmp_path, KEY, of("hello", "world"), ByteTokenizer())
    assert tokens.ids.tobytes() == b"hello\0world" and path.read_bytes() == good


def test_every_single_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = _stored(tmp_path)
    for at in range(path.stat().st_size):
        _flip(path, at)
        with pytest.raises(ValueError, match=r"."):
            token_store._open(path, KEY)
        _flip(path, at)
    token_store._open(path, KEY)


def test_another_key_is_another_file(tmp_path: Path) -> None:
    path = _stored(tmp_path)
    other = load_or_tokenize(tmp_path, bytes(32), of("other"), ByteTokenizer())
    assert other.ids.tobytes() == b"other" and len(os.listdir(tmp_path)) == 2
    path.rename(tmp_path / f"{bytes(32).hex()}.tokens")
    with pytest.warns(AptWarning, match="written for another text"):
        load_or_tokenize(tmp_path, bytes(32), of("other"), ByteTokenizer())


def test_opening_marks_a_file_as_used(tmp_path: Path) -> None:
    path = _stored(tmp_path)
    os.utime(path, (0, 0))
    load_or_tokenize(tmp_path, KEY, never, ByteTokenizer())
    assert path.stat().st_mtime > 0


def test_what_interrupts_tokenizing_leaves_nothing(tmp_path: Path) -> None:
    def pieces() -> Iterable[Piece]:
        yield Piece("hello")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_or_tokenize(tmp_path, KEY, pieces, ByteTokenizer())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "hint"), [(errno.ENOSPC, "free space there, or set"), (errno.EIO, "set data.cache_dir")]
)
def test_a_disk_that_fails_is_told_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, hint: str
) -> None:
    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match=os.strerror(code)) as caught:
        load_or_tokenize(tmp_path, KEY, of("hello"), ByteTokenizer())
    assert str(tmp_path) in caught.value.message and str(caught.value.hint).startswith(hint)
    assert os.listdir(tmp_path) == []


BUILDER = """
import sys, time, warnings
from pathlib import Path
from apt.core.providers.dataset import Piece
from apt.data.token_store import load_or_tokenize
from apt.data.tokenizers import ByteTokenizer

folder, ready = Path(sys.argv[1]), Path(sys.argv[2])

def pieces():
    yield Piece("x" * 1000)
    (ready / sys.argv[3]).touch()
    while len(list(ready.iterdir())) < 2:  # both are in the middle of their files
        time.sleep(0.01)
    yield Piece("y" * 1000)

warnings.simplefilter("error")
print(load_or_tokenize(folder, bytes(32), pieces, ByteTokenizer()).ids.sum())
"""


def test_processes_that_build_the_same_file_at_once_do_not_clash(tmp_path: Path) -> None:
    folder, ready = tmp_path / "tokens", tmp_path / "ready"
    folder.mkdir()
    ready.mkdir()
    command = [sys.executable, "-c", BUILDER, str(folder), str(ready)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    builders = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, env=environment) for n in range(2)]
    expected = 1000 * (ord("x") + ord("y"))
    assert [int(builder.communicate(timeout=60)[0]) for builder in builders] == [expected, expected]
    assert len(os.listdir(folder)) == 1


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    piece = "0123456789abcde\n" * 4096
    tracemalloc.start()
    try:
        tokens = load_or_tokenize(
            tmp_path, KEY, lambda: (Piece(piece, continues=i > 0) for i in range(128)), ByteTokenizer()
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(tokens) == 128 * len(piece) == 1 << 23
    assert peak < 32 * len(piece) < len(tokens) / 3


@settings(max_examples=50, deadline=None)
@given(starts=st.sets(st.integers(1, 29)), bounds=st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted))
def test_a_slice_keeps_the_documents_it_holds(starts: set[int], bounds: list[int]) -> None:
    low, high = bounds
    tokens = Tokens(np.arange(30, dtype=np.uint8), np.array(sorted(starts | {0})))
    part = tokens.slice(low, high)
    assert part.ids.tolist() == list(range(low, high))
    assert part.starts.tolist() == sorted({0} | {start - low for start in starts if low <= start < high})
