"""One file to documents: .txt (one document), .jsonl (one a line), .parquet (one a row).

A .txt file may be larger than memory: it comes in pieces of a fixed size, cut at line ends.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from apt.core.errors import DataError, did_you_mean
from apt.core.files import open_file
from apt.core.providers.dataset import Piece

T = TypeVar("T")

PIECE_BYTES = 1 << 20
"""The tokens that `bpe` makes depend on where pieces are cut: another size is another version of the readers."""

READERS_VERSION = 1

MAX_LINE = 32 << 20
"""Bytes of a line that is read as a whole: of .jsonl, and of pairs. It is held in memory several times over."""

MAX_NAME = 40
"""Letters of a field's name that a message shows."""

Stat = tuple[int, int]
"""(bytes, time of the last change in ns): a file that is being written shows it here."""

_BOM = codecs.BOM_UTF8

_MAGIC = {
    b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "a zip archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"%PDF-": "a PDF",
    b"\x89PNG": "a PNG image",
    b"\x7fELF": "a program",
    codecs.BOM_UTF16_LE: "UTF-16 text",
    codecs.BOM_UTF16_BE: "UTF-16 text",
}


def read_file(path: Path, text_field: str, expected: Stat | None = None) -> Iterator[Piece]:
    """The documents of one file, in order; empty ones are left out.

    Args:
        text_field: the field of .jsonl or column of .parquet that holds the text.
        expected: what `hash_file` saw of the file, if it was called before.

    Raises:
        DataError: it cannot be read, is not what its suffix says, or changed since `expected` or while being read.
    """
    with _opened(path, expected) as (file, _):
        yield from READERS[path.suffix.lower()](path, file, text_field)


def read_with(
    reader: Callable[[Path, BufferedReader], Iterator[T]], path: Path, expected: Stat | None = None
) -> Iterator[T]:
    """What `reader` makes of one file, which is watched as `read_file` does. Raises likewise."""
    with _opened(path, expected) as (file, _):
        yield from reader(path, file)


def hash_file(path: Path) -> tuple[Stat, str]:
    """What a file is now: its size, the time of its last change, and the SHA-256 of its content in hexadecimal."""
    with _opened(path, None) as (file, stat):
        return stat, hashlib.file_digest(file, "sha256").hexdigest()


def _read_text(path: Path, file: BufferedReader, _text_field: str) -> Iterator[Piece]:
    head = file.read(16)
    _refuse_binary(path, head)
    offset = file.seek(len(_BOM) if head.startswith(_BOM) else 0)
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, continues = "", False
    while True:
        chunk = file.read(PIECE_BYTES)
        nul = chunk.find(b"\0")
        if nul >= 0:
            raise _binary(path, f"it has a NUL byte at offset {offset + nul}")
        pending = len(decoder.getstate()[0])
        try:
            text = rest + decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _not_utf8(str(path), offset - pending + error.start) from error
        offset += len(chunk)
        # Without a line end the text is cut where the piece ends: memory stays bounded.
        cut = (text.rfind("\n") + 1 if chunk else 0) or len(text)
        if cut:
            yield Piece(text[:cut], continues)
            continues = True
        rest = text[cut:]
        if not chunk:
            return


def decoded_lines(path: Path, file: BufferedReader) -> Iterator[tuple[str, str]]:
    """("FILE:NUMBER", line) of the lines that are not blank.

    Raises:
        DataError: the file is not text, or a line not UTF-8.
    """
    offset = 0
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
        where = f"{path}:{number}"
        if len(line) > MAX_LINE:
            raise DataError(
                f"{where}: a line of more than {MAX_LINE >> 20} MiB",
                hint="cut what it holds into several; a .txt file may be one document of any size",
            )
        if number == 1:
            _refuse_binary(path, line)
            if line.startswith(_BOM):
                line, offset = line[len(_BOM) :], len(_BOM)
        try:
            source = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(where, offset + error.start) from error
        offset += len(line)
        if source.strip():
            yield where, source


def jsonl_texts(path: Path, file: BufferedReader, fields: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """("FILE:NUMBER", the texts of these fields) of each line.

    Args:
        fields: {key of the profile that names the field: its name}.

    Raises:
        DataError: a line is not JSON, or no object with text in these fields.
    """
    for where, source in decoded_lines(path, file):
        try:
            record = json.loads(source)
        except (ValueError, RecursionError) as error:
            what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{where}: not JSON ({what})", hint=_jsonl_hint(*fields.values())) from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: {_kind_of(record)}, not an object", hint=_jsonl_hint(*fields.values()))
        texts = []
        for key, name in fields.items():
            if name not in record:
                raise DataError(f"{where}: no field {name!r}", hint=_field_hint(name, list(record), key))
            if source.count(f'"{name}"') > 1 and _times_given(source, name) > 1:
                raise DataError(f"{where}: the field {name!r} is given twice", hint="leave one of them")
            text = record[name]
            if not isinstance(text, str):
                raise DataError(f"{where}: the field {name!r} holds {_kind_of(text)}, not text", hint=f"set {key}")
            texts.append(checked(text, where))
        yield where, texts


def _times_given(source: str, name: str) -> int:
    """How often an object has a key; json keeps the last of several and says nothing."""
    pairs: list[tuple[str, Any]] = json.loads(source, object_pairs_hook=list)
    return sum(key == name for key, _ in pairs)


def _read_jsonl(path: Path, file: BufferedReader, text_field: str) -> Iterator[Piece]:
    for _, (text,) in jsonl_texts(path, file, {"data.text_field": text_field}):
        if text:
            yield Piece(text)


def _read_parquet(path: Path, file: BufferedReader, text_field: str) -> Iterator[Piece]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow", hint='pip install "apt-core[parquet]"') from error
    try:
        table = pq.ParquetFile(file)
        columns = table.schema_arrow.names
        if text_field not in columns:
            raise DataError(f"{path}: no column {text_field!r}", hint=_field_hint(text_field, columns))
        kind = table.schema_arrow.field(text_field).type
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)):
            raise DataError(f"{path}: the column {text_field!r} holds {kind}, not text", hint="set data.text_field")
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=[text_field]):
            for value in batch.column(0):
                where, row = f"{path}, row {row}", row + 1
                try:
                    text = value.as_py()
                except UnicodeDecodeError as error:
                    raise DataError(f"{where}: not UTF-8", hint="write the file again with valid text") from error
                if text is None:
                    raise DataError(f"{where}: the column {text_field!r} is null", hint="leave such rows out")
                if text:
                    yield Piece(checked(text, where))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: not a readable Parquet file ({reason})", hint="write or copy it again") from error


READERS: dict[str, Callable[[Path, BufferedReader, str], Iterator[Piece]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
"""Suffix -> how a file of that kind is read."""


@contextmanager
def _opened(path: Path, expected: Stat | None) -> Iterator[tuple[BufferedReader, Stat]]:
    """The open file and what it is, which must be `expected`, and still be so when the block ends."""
    try:
        with open_file(path) as file:
            stat = _stat(file)
            if expected is not None and stat != expected:
                raise _changed(path)
            yield file, stat
            if _stat(file) != stat:
                raise _changed(path)
    except OSError as error:
        hint = "take it away, or write it to a file" if error.errno == errno.EINVAL else "check its permissions"
        raise DataError(f"{path} cannot be read: {error.strerror or error}", hint=hint) from error


def _stat(file: BufferedReader) -> Stat:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def checked(text: str, where: str) -> str:
    """JSON and Parquet can hold what no text file can."""
    if "\0" in text:
        raise DataError(f"{where}: the text has a NUL character", hint="remove it: NUL stands between documents")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: the text has an unpaired surrogate at character {error.start}", hint="remove or mend it"
            ) from error
    return text


def _refuse_binary(path: Path, head: bytes) -> None:
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise _binary(path, f"it is {what}")


def _binary(path: Path, reason: str) -> DataError:
    if "UTF-16" in reason:
        return DataError(f"{path}: {reason}, not UTF-8", hint=f"iconv -f UTF-16 -t UTF-8 {path.name} > utf8.txt")
    hint = "unpack it first" if "archive" in reason else "give plain text in UTF-8"
    return DataError(f"{path} is not text: {reason}", hint=hint)


def _not_utf8(where: str, offset: int) -> DataError:
    return DataError(
        f"{where}: not UTF-8 (byte {offset})",
        hint="convert it, for example: iconv -f LATIN1 -t UTF-8 old.txt > new.txt",
    )


def _changed(path: Path) -> DataError:
    return DataError(f"{path} changed while it was being read", hint="start again when nothing writes to it")


def _jsonl_hint(*fields: str) -> str:
    content = ", ".join(f'"{field}": "..."' for field in fields)
    return f"each line of a .jsonl file is one object, such as {{{content}}}"


def _field_hint(wanted: str, present: list[str], key: str = "data.text_field") -> str:
    names = [name if len(name) <= MAX_NAME else name[: MAX_NAME - 3] + "..." for name in present[:1000]]
    near = did_you_mean(wanted, names)
    shown = ", ".join(names[:8]) + (", ..." if len(present) > 8 else "") or "none"
    return f"set {key} to one of: {shown}" + (f" (did you mean {near!r}?)" if near else "")


def _kind_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return "a string" if isinstance(value, str) else "a number"
