"""Stores on disk: whole or refused, old or new, and never a pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apt.api import DataError
from apt.core.providers.retrieval import Passage
from apt_plugin_rag import folder as module
from apt_plugin_rag.folder import FolderStore
from apt_plugin_rag.retrievers import HybridRetriever
from apt_plugin_rag.store import Manifest, open_store

SETTINGS = {"language": "none", "dimensions": 2}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    made = HybridRetriever({**SETTINGS, "store": str(tmp_path / "store")})
    made.add([Passage("ant bee\n", "a:1"), Passage("bee cat", "b:1"), Passage("d\xe9j\xe0 vu", "c:1")])
    return tmp_path / "store"


def files_of(store: Path) -> list[Path]:
    return sorted(file for file in store.rglob("*") if file.is_file() and file.name != ".lock")


def answer(store: Path) -> list[Passage]:
    return list(HybridRetriever({**SETTINGS, "store": str(store)}).retrieve("bee cat"))


def test_a_store_answers_as_the_one_in_memory_did(store: Path) -> None:
    memory = HybridRetriever(SETTINGS)
    memory.add([Passage("ant bee\n", "a:1"), Passage("bee cat", "b:1"), Passage("d\xe9j\xe0 vu", "c:1")])
    assert answer(store) == memory.retrieve("bee cat")
    assert [passage.text for passage in open_store(str(store)).read([2, 0])] == ["d\xe9j\xe0 vu", "ant bee\n"]


def test_no_byte_may_differ(store: Path) -> None:
    for file in files_of(store):
        whole = file.read_bytes()
        middle = len(whole) // 2
        for wrong in (whole[:-1], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], b"", None):
            if wrong is None:
                file.unlink()
            else:
                file.write_bytes(wrong)
            with pytest.raises(DataError, match=r"damaged|there is no store"):
                open_store(str(store))
        file.write_bytes(whole)
    assert len(answer(store)) == 3


def test_nothing_in_a_store_is_a_pickle(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was read")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert len(answer(store)) == 3
    for file in files_of(store):
        if file.suffix == ".npy":
            assert not np.load(file, allow_pickle=False).dtype.hasobject
        else:
            assert file.suffix in (".json", ".jsonl")
            json.loads(file.read_text().partition("\n")[0] if file.suffix == ".jsonl" else file.read_text())


def test_a_change_that_is_cut_short_leaves_the_old_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = answer(store)
    for name in ("replace", "fsync"):
        with monkeypatch.context() as patched:

            def fail(*_: Any) -> None:
                raise OSError(28, "No space left on device")

            patched.setattr(os, name, fail)
            writer = HybridRetriever({**SETTINGS, "store": str(store)})
            with pytest.raises(DataError, match=r"cannot write the store .*: No space left"):
                writer.add([Passage("bee", "new")])
        assert answer(store) == writer.retrieve("bee cat") == before
    assert len(list(store.glob("data-*"))) == 1


def test_an_interrupted_change_leaves_the_old_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = answer(store)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "_write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            HybridRetriever({**SETTINGS, "store": str(store)}).add([Passage("bee", "new")])
    assert answer(store) == before
    assert len(list(store.glob("data-*"))) == 1


def test_two_writers_do_not_harm_each_other(store: Path) -> None:
    one, two = (HybridRetriever({**SETTINGS, "store": str(store)}) for _ in range(2))
    assert one.store.size() == two.store.size()
    one.add([Passage("gnu", "one")])
    with pytest.raises(DataError, match="was changed by another process"):
        two.add([Passage("hen", "two")])
    assert isinstance(one.store, FolderStore)
    with one.store._locked(), pytest.raises(DataError, match="is being written by another process"):
        HybridRetriever({**SETTINGS, "store": str(store)}).add([Passage("hen", "two")])
    assert set(open_store(str(store)).documents()) == {"a:1", "b:1", "c:1", "one"}


def test_a_reader_goes_on_with_what_it_has_opened(store: Path) -> None:
    reader = HybridRetriever({**SETTINGS, "store": str(store)})
    before = reader.retrieve("bee cat")
    HybridRetriever({**SETTINGS, "store": str(store)}).update(["a:1", "b:1"], ())
    assert reader.retrieve("bee cat") == before
    assert answer(store) == []


def test_an_old_or_new_format_is_named(store: Path) -> None:
    path = store / "manifest.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "format": 2}))
    with pytest.raises(DataError, match="is a store of format 2, and this version reads format 1"):
        open_store(str(store))
    with pytest.raises(DataError, match="its manifest lacks 'retriever'"):
        Manifest.from_json({"format": 1}, "x")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for where in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(DataError, match="exists and is not a store"):
            open_store(str(where), create=True)
        with pytest.raises(DataError, match="there is no store"):
            open_store(str(where))


def test_a_store_whose_first_writing_was_cut_short_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever = HybridRetriever({**SETTINGS, "store": str(tmp_path / "store")})
    with monkeypatch.context() as patched:

        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr(os, "replace", fail)
        with pytest.raises(DataError, match="No space left"):
            retriever.add([Passage("bee", "new")])
    (tmp_path / "store" / "data-0123").mkdir()
    with pytest.raises(DataError, match="there is no store"):
        open_store(str(tmp_path / "store"))
    HybridRetriever({**SETTINGS, "store": str(tmp_path / "store")}).add([Passage("bee cat", "new")])
    assert len(answer(tmp_path / "store")) == 1


def test_texts_without_words_are_kept_and_not_found(tmp_path: Path) -> None:
    settings = {**SETTINGS, "store": str(tmp_path / "store")}
    HybridRetriever(settings).add([Passage("!!!", "a")])
    assert HybridRetriever(settings).retrieve("bee") == []
    HybridRetriever(settings).add([Passage("bee", "b")])
    assert [passage.source for passage in HybridRetriever(settings).retrieve("bee")] == ["b"]
    HybridRetriever(settings).update(["b"], ())
    assert HybridRetriever(settings).retrieve("bee") == []


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the store"):
        HybridRetriever({**SETTINGS, "store": str(tmp_path / "file" / "store")}).add([Passage("bee", "new")])
