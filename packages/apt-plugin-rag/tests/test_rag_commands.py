"""`apt rag` as a user calls it, with what is wrong said in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apt.core.providers.retrieval import RetrievalProvider
from apt.core.registry import registry

Apt = Callable[..., Any]
PLAIN = ("--language", "none")


def fails(result: Any, said: str) -> None:
    """It is one line, a fix, and exit code 2."""
    assert result.code == 2
    lines = [line for line in result.err.splitlines() if not line.startswith("warning:")]
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert len(lines) == 2
    assert lines[1].startswith("  fix: ")


def test_what_is_unchanged_is_not_indexed_again(apt: Apt, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = apt("rag", "index", "docs", "--store", "s", *PLAIN)
    assert made.out.startswith("3 new, 0 changed, 0 removed, 0 unchanged files in ")
    assert "bm25 store s: 3 documents, 4 passages" in made.out
    before = (Path("s") / "manifest.json").read_bytes()
    assert apt("rag", "index", "docs", "--store", "s").out.startswith("0 new, 0 changed, 0 removed, 3 unchanged")
    assert (Path("s") / "manifest.json").read_bytes() == before

    (folder / "bears.txt").write_text("Bears dance.\n")
    (folder / "notes.jsonl").unlink()
    (folder / "new.md").write_text("Zebras!\n")
    read: list[str] = []
    from apt_plugin_rag import commands

    def cut_file(path: Path, *rest: Any) -> Any:
        read.append(path.name)
        return original(path, *rest)

    original = commands.cut_file
    monkeypatch.setattr(commands, "cut_file", cut_file)
    assert apt("rag", "index", "docs", "--store", "s").out.startswith("1 new, 1 changed, 1 removed, 1 unchanged")
    assert read == ["bears.txt", "new.md"]
    found = json.loads(apt("rag", "query", "bears salmon honey", "--store", "s", "--json").out)
    assert [(p["text"], p["source"]) for p in found] == [("Bears dance.\n", f"{folder}/bears.txt:1")]


def test_one_path_leaves_what_came_from_another(apt: Apt, folder: Path) -> None:
    apt("rag", "index", "docs/bears.txt", "--store", "s", *PLAIN)
    assert "2 documents" in apt("rag", "index", "docs/deep", "--store", "s").out
    shutil.rmtree(folder / "deep")
    gone = apt("rag", "index", "docs/deep", "--store", "s")
    assert gone.out.startswith("0 new, 0 changed, 1 removed, 0 unchanged files")
    assert "1 document, 1 passage, 10 terms" in gone.out


def test_a_store_among_the_texts_is_not_indexed(apt: Apt, folder: Path) -> None:
    apt("rag", "index", "docs", "--store", "docs/store", *PLAIN)
    assert apt("rag", "index", "docs", "--store", "docs/store").out.startswith("0 new, 0 changed, 0 removed, 3 unch")


@pytest.mark.parametrize("retriever", ["bm25", "dense", "hybrid"])
def test_a_query_shows_passages_with_their_sources(apt: Apt, folder: Path, retriever: str) -> None:
    assert apt("rag", "index", "docs", "--store", "s", "--retriever", retriever, *PLAIN).code == 0
    asked = apt("rag", "query", "swallows fly south", "--store", "s", "-k", "1")
    assert asked.out.startswith(f"1. {folder}/deep/birds.md:1  (")
    assert "# Birds Swallows fly south in autumn." in asked.out
    assert asked.out.endswith("1 of 4 passages\n")
    assert apt("rag", "query", "zebra", "--store", "s").out == "0 of 4 passages\n"
    told = json.loads(apt("rag", "info", "--store", "s", "--json").out)
    assert told["retriever"] == f"{retriever} 1.0.0"
    assert (told["documents"], told["passages"]) == (3, 4)
    assert "retriever   " in apt("rag", "info", "--store", "s").out


def test_what_is_passed_over_is_said(apt: Apt, folder: Path) -> None:
    (folder / "a.png").write_bytes(b"\x89PNG")
    (folder / "empty.txt").write_text(" \n")
    made = apt("rag", "index", "docs", "--store", "s", *PLAIN)
    assert "warning: files that are not .jsonl, .md, .rst, .txt are left out: 1 .png" in made.err
    assert ", 1 empty files in" in made.out


def test_bad_input_gets_one_line(apt: Apt, folder: Path) -> None:
    index = ("rag", "index", "docs", "--store", "s", *PLAIN)
    fails(apt("rag", "query", "x", "--store", "s"), "there is no store in s")
    fails(apt("rag", "info", "--store", "docs"), "there is no store in docs")
    fails(apt("rag", "index", "nothing", "--store", "s", *PLAIN), "nothing does not exist")
    fails(apt(*index, "--retriever", "bm52"), "retrieval:bm52 is not installed")
    fails(apt(*index, "--model", "m"), "the retriever bm25 has no --model")
    fails(apt(*index, "--retriever", "dense", "--model", "m"), "the model m is no folder")
    fails(apt(*index, "--retriever", "knn_lm"), "the retriever knn_lm has no --language")
    fails(apt("rag", "index", "docs", "--store", "s", "--retriever", "knn_lm"), "knn_lm needs the run")
    fails(apt(*index, "--text-field", "body"), "notes.jsonl:1: no text in a field 'body'")
    fails(apt("rag", "index", "docs", "--store", "docs", *PLAIN), "docs exists and is not a store")
    assert not Path("s/manifest.json").exists()
    Path("empty").mkdir()
    fails(apt("rag", "index", "empty", "--store", "s", *PLAIN), "there is no text to index in empty")

    assert apt(*index).code == 0
    fails(apt(*index, "--retriever", "hybrid"), "the store s is one of bm25, not of hybrid")
    fails(apt(*index, "--passage-words", "7"), "the store s was made with passage_words 100, not 7")
    (folder / "bears.txt").write_bytes(b"\x00\x01")
    fails(apt(*index), "bears.txt is not text: it has a NUL byte at offset 0")
    for call in (("-k", "0"), ("-k", "many")):
        assert apt("rag", "query", "x", "--store", "s", *call).code == 2


def test_an_interrupt_leaves_the_store_as_it_was(apt: Apt, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt("rag", "index", "docs", "--store", "s", *PLAIN)
    (folder / "bears.txt").write_text("Bears dance.\n")
    before = sorted(Path("s").rglob("*"))
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("apt_plugin_rag.folder._write", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert apt("rag", "index", "docs", "--store", "s").code == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path for path in sorted(Path("s").rglob("*")) if path.name != ".lock"] == [
        path for path in before if path.name != ".lock"
    ]


def test_a_retriever_of_somebody_else_that_keeps_no_store_is_named(apt: Apt, folder: Path) -> None:
    class Elsewhere(RetrievalProvider):
        def get_name(self) -> str:
            return "elsewhere"

        def get_version(self) -> str:
            return "1"

        def add(self, passages: Any) -> None: ...
        def retrieve(self, query: str, k: int = 5) -> Any: ...

    registry.register("retrieval", "elsewhere", Elsewhere)
    fails(apt("rag", "index", "docs", "--store", "s", "--retriever", "elsewhere"), "elsewhere keeps no store")
