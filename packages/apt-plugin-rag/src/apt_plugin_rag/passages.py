"""Files to passages: what is read, where it is cut, and how a reader finds it again."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from apt.api import DataError
from apt.core.providers.retrieval import Passage

SUFFIXES = (".jsonl", ".md", ".rst", ".txt")
"""What is read of a folder. A file that is named itself may be called anything."""

CHARACTERS_PER_WORD = 10
"""More than a word of any language that has spaces: a text without them is measured by its characters."""

BORDERS = (r"\n\s*\n", r"\n", r"(?<=[.!?])\s", r"\s")
"""Where a text is cut, best first: paragraphs, lines, sentences, words."""


def find_files(paths: Iterable[Path], skip: Callable[[Path], bool]) -> tuple[list[Path], Counter[str]]:
    """The files to read, each once and in order, and how many were left out in folders, by suffix.

    Args:
        skip: whether a folder is not looked into; hidden ones never are.

    Raises:
        DataError: a path does not exist.
    """
    files: set[Path] = set()
    left_out: Counter[str] = Counter()
    for path in paths:
        path = path.absolute()
        if not path.exists():
            raise DataError(f"{path} does not exist", hint="give files or folders of text")
        if not path.is_dir():
            files.add(path)
            continue
        for folder, folders, names in os.walk(path):
            folders[:] = [name for name in folders if not name.startswith(".") and not skip(Path(folder, name))]
            for name in names:
                suffix = Path(name).suffix.lower()
                if suffix in SUFFIXES and not name.startswith("."):
                    files.add(Path(folder, name))
                else:
                    left_out[suffix or name] += 1
    return sorted(files), left_out


def read(path: Path) -> tuple[str, str]:
    """The text of a file and the SHA-256 of its content, in hex.

    Raises:
        DataError: it cannot be read, or is not UTF-8 text.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # to read a pipe or a device might never end
        raise DataError(f"{path} is a pipe or a device, not a file", hint="leave it out, or write it to a file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", hint="check its permissions") from error
    if (nul := data.find(b"\0")) >= 0:
        raise DataError(f"{path} is not text: it has a NUL byte at offset {nul}", hint="leave it out, or give its text")
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}", hint="leave it out, or convert it") from error
    return text, hashlib.sha256(data).hexdigest()


def cut_file(path: Path, text: str, words: int, text_field: str = "text") -> list[Passage]:
    """The passages of a file, each with its path and line; one record after the other where it is a .jsonl.

    Raises:
        DataError: a .jsonl holds something else than records with that field.
    """
    if path.suffix.lower() != ".jsonl":
        return list(cut(text, str(path), words))
    passages: list[Passage] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            record = _record(f"{path}:{number}", line, text_field)
            passages += [Passage(p.text, f"{path}:{number}") for p in cut(record.rstrip() + "\n", str(path), words)]
    return passages


def cut(text: str, name: str, words: int) -> Iterator[Passage]:
    """Cut a text into passages of at most `words` words, at paragraphs where that can be.

    Nothing is lost: the passages one after the other are the text. A text of white space alone has none.

    Args:
        name: what the source of each is, before its line.
        words: most words of a passage (Karpukhin et al. 2020 use 100).
    """
    line, held, size = 1, "", 0
    for piece in _pieces(text, words):
        more = _size(piece)
        if size and more and size + more > words:
            yield Passage(held, f"{name}:{line + _leading_lines(held)}")
            line, held, size = line + held.count("\n"), "", 0
        held, size = held + piece, size + more
    if size:
        yield Passage(held, f"{name}:{line + _leading_lines(held)}")


def _pieces(text: str, words: int, level: int = 0) -> Iterator[str]:
    """`text` in pieces of at most `words` words, each with the white space behind it."""
    if _size(text) <= words:
        yield text
    elif level == len(BORDERS):
        step = words * CHARACTERS_PER_WORD
        yield from (text[i : i + step] for i in range(0, len(text), step))
    else:
        start = 0
        for border in re.finditer(BORDERS[level], text):
            yield from _pieces(text[start : border.end()], words, level + 1)
            start = border.end()
        yield from _pieces(text[start:], words, level + 1)


def _size(text: str) -> int:
    """How many words a text has, or as many as its length comes to where it has no spaces."""
    stripped = text.strip()
    return max(len(stripped.split()), -(-len(stripped) // CHARACTERS_PER_WORD)) if stripped else 0


def _leading_lines(text: str) -> int:
    return text[: len(text) - len(text.lstrip())].count("\n")


def _record(where: str, line: str, text_field: str) -> str:
    hint = f'each line of a .jsonl file is one object, such as {{"{text_field}": "..."}}; or set --text-field'
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})", hint=hint) from error
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        raise DataError(f"{where}: no text in a field {text_field!r}", hint=hint)
    text: str = record[text_field]
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(f"{where}: the text holds a NUL or half a character", hint="mend it, or take it out")
    return text
