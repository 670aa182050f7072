"""The datasets `files` and `stdlib`: what they read, in which order, and what they say of files they cannot use."""

from __future__ import annotations

import json
import os
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.core.errors import AptWarning, DataError
from apt.core.providers.dataset import DatasetProvider
from apt.data import readers
from apt.data.sources import FilesDataset, StdlibDataset

TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"))


def documents(dataset: DatasetProvider) -> list[str]:
    found: list[str] = []
    for text, continues in dataset.pieces():
        if continues:
            found[-1] += text
        else:
            found.append(text)
    return found


def files(path: Path, **config: Any) -> FilesDataset:
    return FilesDataset({"train_path": str(path), **config})


def refused(path: Path, **config: Any) -> DataError:
    """The error of reading `path`: one line, with a way out."""
    with pytest.raises(DataError) as caught:
        documents(files(path, **config))
    error = caught.value
    assert error.hint and "\n" not in str(error) and path.name in error.message
    return error


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# What is read


@settings(deadline=None)
@given(text=TEXT.filter(bool), size=st.integers(1, 9), bom=st.booleans())
def test_a_text_file_is_one_document_however_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, text: str, size: int, bom: bool
) -> None:
    text = text.removeprefix("\ufeff") or "x"
    path = write(tmp_path_factory.mktemp("text") / "a.txt", b"\xef\xbb\xbf" * bom + text.encode())
    before, readers.PIECE_BYTES = readers.PIECE_BYTES, size
    try:
        if any(path.read_bytes().startswith(magic) for magic in readers._MAGIC):
            return
        pieces = list(files(path).pieces())
        assert "".join(piece.text for piece in pieces) == text
        assert [piece.continues for piece in pieces] == [False] + [True] * (len(pieces) - 1)
    finally:
        readers.PIECE_BYTES = before


def test_pieces_end_at_line_ends_where_there_are_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PIECE_BYTES", 8)
    path = write(tmp_path / "a.txt", "one\ntwo\nthree\r\nfour four four four\nend")
    pieces = [piece.text for piece in files(path).pieces()]
    assert len(pieces) > 4
    assert pieces[:3] == ["one\ntwo\n", "three\r\n", "four four"], "a line longer than a piece is cut inside"


def test_jsonl_is_one_document_a_line(tmp_path: Path) -> None:
    lines = ['{"text": "a\\nb", "n": 1}', "", '{"text": ""}', '  {"text": "\u00fc \\ud83d\\ude00"}']
    path = write(tmp_path / "a.JSONL", b"\xef\xbb\xbf" + "\n".join(lines).encode())
    assert documents(files(path)) == ["a\nb", "\u00fc \U0001f600"]


def test_jsonl_reads_the_field_it_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "no", "body": "yes"}\n')
    assert documents(files(path, text_field="body")) == ["yes"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_is_one_document_a_row(tmp_path: Path, kind: pa.DataType) -> None:
    rows = ["one", "", "t\u00fcr"] + ["x"] * 300
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": list(range(303)), "text": pa.array(rows).cast(kind)}), path)
    assert documents(files(path)) == [row for row in rows if row]
    assert files(path).size_hint() is None


def test_a_folder_is_read_by_name_with_its_subfolders_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "a" / "z.jsonl", '{"text": "az"}\n{"text": "az2"}')
    write(tmp_path / "a" / "empty.txt", "")
    write(tmp_path / "c" / "d.txt", "cd")
    write(tmp_path / ".hidden.txt", "no")
    write(tmp_path / ".git" / "x.txt", "no")
    write(tmp_path / "README.md", "no")
    dataset = files(tmp_path)
    with pytest.warns(AptWarning, match=r"1 file\(s\) of an unknown kind, such as README.md") as record:
        assert documents(dataset) == ["az", "az2", "b", "cd"]
        assert dataset.size_hint() == 33
    assert len(record) == 1


def test_the_home_folder_may_be_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "text")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert documents(FilesDataset({"train_path": "~/a.txt"})) == ["text"]


# Fingerprints


def test_the_fingerprint_changes_with_content_and_names_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "one" / "a.txt", "text")
    first = files(path).fingerprint()
    os.utime(path, (0, 0))
    assert files(path).fingerprint() == first, "the clock does not matter"
    assert files(write(tmp_path / "two" / "a.txt", "text")).fingerprint() == first, "nor where it lies"
    assert files(write(tmp_path / "a.txt", "texT")).fingerprint() != first
    assert files(path, text_field="other").fingerprint() != first

    folder = files(path.parent).fingerprint()
    write(path.parent / "b.txt", "more")
    assert files(path.parent).fingerprint() != folder


def test_a_file_that_changes_after_its_fingerprint_is_refused_until_it_is_taken_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "text")
    dataset = files(path)
    dataset.fingerprint()
    write(path, "longer text")
    with pytest.raises(DataError, match="changed while it was being read"):
        documents(dataset)
    dataset.fingerprint()
    assert documents(dataset) == ["longer text"]

    folder = files(tmp_path)
    folder.fingerprint()
    write(tmp_path / "b.txt", "new")
    with pytest.raises(DataError, match=r"b.txt changed"):
        documents(folder)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    pieces = files(path).pieces()
    next(pieces)
    with open(path, "ab") as file:
        file.write(b'{"text": "c"}\n')
    with pytest.raises(DataError, match="changed while it was being read"):
        list(pieces)


# What is refused


def test_a_missing_path_is_told_with_its_nearest_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "shakespeare.txt", "text")
    error = refused(tmp_path / "shakespear.txt")
    assert "does not exist" in error.message and "did you mean" in str(error.hint)
    assert "shakespeare.txt" in str(error.hint)
    assert "relative paths start at" in str(refused(tmp_path / "no" / "such.txt").hint)


def test_empty_files_and_folders_are_refused(tmp_path: Path) -> None:
    assert "is empty" in refused(write(tmp_path / "a.txt", "")).message
    assert "is empty" in refused(write(tmp_path / "bom.txt", b"\xef\xbb\xbf")).message
    assert "is empty" in refused(write(tmp_path / "a.jsonl", "\n\n")).message
    (tmp_path / "folder").mkdir()
    error = refused(tmp_path / "folder")
    assert "no file of a known kind" in error.message and ".parquet" in str(error.hint)


def test_unknown_kinds_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    assert ".txt, .jsonl, .parquet" in str(refused(write(tmp_path / "a.csv", "a,b")).hint)
    assert ".jsonl" in str(refused(write(tmp_path / "a.json", "{}")).hint)


def test_what_is_neither_file_nor_folder_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    assert "neither a file nor a folder" in refused(tmp_path / "pipe.txt").message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x1f\x8b\x08 rest", "a gzip archive"),
        (b"PK\x03\x04 rest", "a zip archive"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"\x89PNG\r\n", "a PNG image"),
        ("text".encode("utf-16"), "UTF-16"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_known_binary_kinds_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    assert said in refused(write(tmp_path / name, content)).message


def test_a_nul_byte_marks_a_binary_file_and_is_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PIECE_BYTES", 7)
    assert "NUL byte at offset 23" in refused(write(tmp_path / "a.txt", b"0123456789\n" * 2 + b"x\0")).message


@pytest.mark.parametrize(
    ("content", "offset"),
    [
        (b"caf\xe9 au lait", 3),
        (b"\xef\xbb\xbfcaf\xe9", 6),
        (b"0123456789\n01234\xe4\xb8", 16),
        ("\u00fc".encode() * 9 + b"\xff", 18),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 5, 1 << 20])
def test_invalid_utf8_is_placed_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, offset: int, size: int
) -> None:
    monkeypatch.setattr(readers, "PIECE_BYTES", size)
    error = refused(write(tmp_path / "a.txt", content))
    assert f"not UTF-8 (byte {offset})" in error.message and "iconv" in str(error.hint)


def test_invalid_utf8_in_jsonl_is_placed_by_line_and_byte(tmp_path: Path) -> None:
    error = refused(write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n'))
    assert "a.jsonl:2: not UTF-8 (byte 24)" in error.message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{'text': 1}", "not JSON (Expecting property name"),
        ('{"text": ', "not JSON"),
        ('{"text": %s}' % ("9" * 5000), "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["text"]', "a list, not an object"),
        ("3", "a number, not an object"),
        ('"text"', "a string, not an object"),
        ('{"text": null}', "the field 'text' holds null, not text"),
        ('{"text": true}', "holds true"),
        ('{"text": ["a"]}', "holds a list"),
        ('{"text": {}}', "holds an object"),
        ('{"text": "a\\u0000b"}', "NUL character"),
        ('{"text": "a\\ud800b"}', "unpaired surrogate at character 1"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path: Path, line: str, said: str) -> None:
    error = refused(write(tmp_path / "a.jsonl", '{"text": "good"}\n\n' + line + "\n"))
    assert "a.jsonl:3: " in error.message and said in error.message


def test_a_missing_field_is_told_with_those_there_are(tmp_path: Path) -> None:
    record = {"texts": "a", **{f"f{i}": i for i in range(20)}}
    error = refused(write(tmp_path / "a.jsonl", json.dumps(record)))
    assert "a.jsonl:1: no field 'text'" in error.message
    assert "did you mean 'texts'?" in str(error.hint) and "..." in str(error.hint) and "f19" not in str(error.hint)


def test_parquet_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    def table(name: str, **columns: Any) -> Path:
        pq.write_table(pa.table(columns), tmp_path / name)
        return tmp_path / name

    assert "not a readable Parquet file" in refused(write(tmp_path / "torn.parquet", b"PAR1 and no more")).message
    error = refused(table("other.parquet", content=["a"], body=["b"]))
    assert "no column 'text'" in error.message and "content, body" in str(error.hint)
    assert "holds int64, not text" in refused(table("numbers.parquet", text=[1])).message
    assert "row 1: the column 'text' is null" in refused(table("null.parquet", text=["a", None])).message
    assert "row 0: the text has a NUL" in refused(table("nul.parquet", text=["a\0"])).message
    latin = pa.array([b"ok", b"\xe9"], pa.binary()).view(pa.string())
    assert "row 1: not UTF-8" in refused(table("latin.parquet", text=latin)).message


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert refused(write(tmp_path / "a.parquet", b"PAR1")).hint == 'pip install "apt-core[parquet]"'


def test_what_the_system_does_not_let_us_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "text")

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(readers, "open_file", denied)
    assert "Permission denied" in refused(path).message
    monkeypatch.setattr(Path, "is_dir", denied)
    assert "Permission denied" in refused(path).message


def test_a_folder_inside_that_cannot_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "text")

    def denied(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", denied)
    assert "Permission denied" in refused(tmp_path).message


# The standard library


def test_stdlib_holds_whole_source_files_up_to_a_size() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    dataset = StdlibDataset({"max_bytes": 300_000})
    found = documents(dataset)
    sizes = [len(text.encode()) for text in found]
    assert 290_000 < sum(sizes) <= 300_000
    assert abs((dataset.size_hint() or 0) - sum(sizes)) < 10_000
    assert found == documents(StdlibDataset({"max_bytes": 300_000})), "the same order each time"
    with pytest.raises(DataError, match="at most 1 bytes"):
        documents(StdlibDataset({"max_bytes": 1}))
    names = [name for name, _ in dataset._sources()]
    assert [(root / name).read_bytes().decode("utf-8-sig") for name in names] == found
    assert names != sorted(names)


def test_stdlib_leaves_tests_and_packages_out_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.py", "p/b.py", "test/t.py", "p/tests/t.py", "idlelib/idle_test/t.py"):
        write(tmp_path / name, name)
    write(tmp_path / "test" / "latin.py", b"# \xe9")
    write(tmp_path / "test" / "nul.py", b"a\0")
    write(tmp_path / "empty.py", "")
    for name in ("site-packages/s.py", "p/__pycache__/c.py", "dist-packages/d.py", "data.txt"):
        write(tmp_path / name, "no")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert sorted(documents(StdlibDataset())) == ["a.py", "p/b.py"]
    with_tests = StdlibDataset({"tests": True})
    assert sorted(documents(with_tests)) == ["a.py", "idlelib/idle_test/t.py", "p/b.py", "p/tests/t.py", "test/t.py"]
    assert with_tests.fingerprint() != StdlibDataset().fingerprint()
    before = StdlibDataset().fingerprint()
    write(tmp_path / "a.py", "a.PY")
    assert StdlibDataset().fingerprint() != before


def test_a_python_without_its_sources_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match="no sources of its standard library"):
        documents(StdlibDataset())
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone.py cannot be read"):
        documents(StdlibDataset())


def test_names_and_versions() -> None:
    stdlib, text = StdlibDataset(), FilesDataset({"train_path": "x"})
    assert (stdlib.get_name(), text.get_name()) == ("stdlib", "files")
    assert stdlib.get_version() and text.get_version()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stdlib.get_dependencies() == []
