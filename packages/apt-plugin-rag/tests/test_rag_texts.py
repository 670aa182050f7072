"""From files to passages to terms: nothing lost, everything found again at its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.api import ConfigError, DataError
from apt_plugin_rag.passages import CHARACTERS_PER_WORD, cut, cut_file, find_files, read
from apt_plugin_rag.terms import Analyzer

TEXTS = st.text(st.sampled_from("ab c.\n\u4e2d\t"), max_size=300)


def files_of(*paths: Path) -> list[str]:
    return [path.name for path in find_files(paths, skip=lambda folder: folder.name == "skipped")[0]]


@given(TEXTS, st.integers(1, 9))
def test_the_passages_are_the_text_and_stand_where_they_say(text: str, words: int) -> None:
    passages = list(cut(text, "name", words))
    assert "".join(passage.text for passage in passages) == (text if text.strip() else "")
    for passage in passages:
        assert passage.text.strip()
        assert len(passage.text.split()) <= words
        assert len(passage.text.strip()) <= words * (CHARACTERS_PER_WORD + 2)
        line = int(passage.source.removeprefix("name:"))
        first = passage.text.strip().split("\n")[0]
        assert first.strip() in text.split("\n")[line - 1]


def test_a_text_is_cut_at_paragraphs_then_lines_then_sentences() -> None:
    text = "One two three.\n\nFour five. Six seven eight nine.\nTen\n"
    assert [passage.text.strip() for passage in cut(text, "t", 5)] == [
        "One two three.\n\nFour five.",
        "Six seven eight nine.\nTen",
    ]


def test_records_of_jsonl_are_kept_apart_and_found_at_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text(json.dumps({"body": "One\u2028two."}) + "\n\n" + json.dumps({"body": "Three four."}) + "\n")
    passages = cut_file(path, read(path)[0], 10, "body")
    assert [(p.text, p.source) for p in passages] == [
        ("One\u2028two.\n", f"{path}:1"),
        ("Three four.\n", f"{path}:3"),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "no text in a field 'text'"),
        ('{"text": 1}', "no text"),
        ('{"text": "\\ud800"}', "half"),
    ],
)
def test_a_record_that_holds_no_text_is_named_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(DataError, match=said) as caught:
        cut_file(path, read(path)[0], 10)
    assert f"{path}:2" in caught.value.message


def test_files_are_found_once_in_order_and_the_others_counted(folder: Path) -> None:
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "Makefile").write_text("all:\n")
    for hidden in (".git", "skipped"):
        (folder / hidden).mkdir()
        (folder / hidden / "text.txt").write_text("not read")
    assert files_of(folder, folder / "bears.txt") == ["bears.txt", "birds.md", "notes.jsonl"]
    assert files_of(folder / "Makefile") == ["Makefile"]  # what is named is read, whatever it is called
    assert find_files([folder], skip=lambda folder: False)[1] == {".png": 1, "Makefile": 1}
    with pytest.raises(DataError, match="does not exist"):
        files_of(folder / "nothing")


@pytest.mark.parametrize(
    ("data", "said"), [(b"text\0text", "NUL byte at offset 4"), (b"caf\xe9", "not UTF-8 at byte 3")]
)
def test_what_is_not_text_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=said):
        read(tmp_path / "a.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    assert read(tmp_path / "a.txt")[0] == "text"


def test_terms_without_a_language_are_lower_case_words() -> None:
    analyzer = Analyzer("none")
    assert analyzer.counts("The cat, the CAT; caf\xe9 x2.") == {"the": 2, "cat": 2, "caf\xe9": 1, "x2": 1}
    assert analyzer.query("the cat") == ["the", "cat"]


def test_chinese_and_japanese_become_pairs_of_characters() -> None:
    counts = Analyzer("none").counts("\u673a\u5668\u5b66\u4e60 ML\u6a21\u578b \u732b")
    assert counts == {"\u673a\u5668": 1, "\u5668\u5b66": 1, "\u5b66\u4e60": 1, "\u6a21\u578b": 1, "ml": 1, "\u732b": 1}


def test_stems_join_the_forms_of_a_word_and_function_words_leave_the_query() -> None:
    pytest.importorskip("Stemmer", reason="PyStemmer is not installed")
    analyzer = Analyzer()
    assert analyzer.counts("connected connections") == {"connect": 2}
    assert analyzer.query("what are the connections") == ["connect"]
    assert analyzer.query("to be or not to be") == ["to", "be", "or", "not", "to", "be"]
    assert Analyzer("german").query("die H\xe4user und das Haus") == ["haus", "haus"]
    with pytest.raises(ConfigError, match="no stems for the language 'klingon'"):
        Analyzer("klingon")
