"""The datasets that come with core: text files of one's own, and the standard library's sources."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from apt.core.errors import AptWarning, DataError, did_you_mean
from apt.core.providers.dataset import DatasetProvider, Piece
from apt.data.config import FilesConfig, StdlibConfig
from apt.data.readers import READERS, READERS_VERSION, Stat, hash_file, read_file


class FilesDataset(DatasetProvider):
    """Text files: one document per .txt file, .jsonl line and .parquet row."""

    Config: ClassVar[type[Any] | None] = FilesConfig
    suffixes: ClassVar[Sequence[str]] = tuple(READERS)

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._path = Path(os.path.expanduser(self.config.train_path))
        self._seen: dict[Path, Stat] | None = None
        self._warned = False

    def get_name(self) -> str:
        return "files"

    def get_version(self) -> str:
        return "1.0.0"

    def pieces(self) -> Iterator[Piece]:
        empty = True
        for path in self._files():
            expected = None
            if self._seen is not None:
                # A file that was not there when the fingerprint was taken matches nothing.
                expected = self._seen.get(path, (-1, -1))
            for piece in self._read(path, expected):
                empty = False
                yield piece
        if empty:
            raise DataError(f"{self._path} is empty", hint="give a file with text in it")

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{READERS_VERSION} {self._fields()}\n".encode())
        self._seen = {}
        for path in self._files():
            stat, content = hash_file(path)
            self._seen[path] = stat
            name = path.relative_to(self._path).as_posix() if path != self._path else path.name
            digest.update(f"{name}\0{stat[0]}\0{content}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _read(self, path: Path, expected: Stat | None) -> Iterator[Piece]:
        """The documents of one file; `expected` is what the fingerprint saw of it."""
        return read_file(path, self.config.text_field, expected)

    def _fields(self) -> str:
        """Where in the files the documents lie."""
        return str(self.config.text_field)

    def size_hint(self) -> int | None:
        files = self._files()
        if any(path.suffix.lower() == ".parquet" for path in files):
            return None  # compressed: the size says little about the text
        return sum(path.stat().st_size for path in files)

    def _files(self) -> list[Path]:
        path, kinds = self._path, ", ".join(self.suffixes)
        try:
            if path.is_dir():
                known, others = _files_of_folder(path, self.suffixes)
                if not known:
                    raise DataError(f"{path}: no file of a known kind in this folder", hint=f"known are {kinds}")
                if others and not self._warned:
                    self._warned = True
                    warnings.warn(
                        f"{path}: passing over {len(others)} file(s) of an unknown kind, such as {others[0].name}; "
                        f"known are {kinds}",
                        AptWarning,
                        stacklevel=3,
                    )
                return known
            if path.is_file():
                if path.suffix.lower() not in self.suffixes:
                    raise DataError(f"{path}: a file of an unknown kind", hint=_suffix_hint(path, kinds))
                return [path]
            if path.exists():
                raise DataError(f"{path} is neither a file nor a folder", hint=f"give a file ({kinds}) or a folder")
            if path.is_symlink():
                raise DataError(f"{path} is a link that leads nowhere", hint="give the file itself")
            raise DataError(f"{path} does not exist", hint=_missing_hint(path))
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror or error}", hint="check its permissions"
            ) from error


class StdlibDataset(DatasetProvider):
    """The .py sources of the running Python's standard library, one document per file.

    They come in order of a hash of their names: any stretch of them is a fair sample. The few that are not UTF-8, all
    of them tests of just that, are left out.
    """

    Config = StdlibConfig

    def get_name(self) -> str:
        return "stdlib"

    def get_version(self) -> str:
        return "1.0.0"

    def pieces(self) -> Iterator[Piece]:
        for _, text in self._sources():
            yield Piece(text)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, text in self._sources():
            digest.update(f"{name}\0{len(text)}\0{text}\n".encode())
        return digest.hexdigest()

    def size_hint(self) -> int | None:
        return sum(size for _, size in self._chosen())

    def _chosen(self) -> list[tuple[Path, int]]:
        """The files that fit into `max_bytes` and their sizes; where one does not, a smaller one may still."""
        root, left = _stdlib(), self.config.max_bytes or sys.maxsize
        chosen = []
        for name in _stdlib_names(root, self.config.tests):
            try:
                size = (root / name).stat().st_size
            except OSError as error:
                raise _unreadable(root / name, error) from error
            if size <= left:
                chosen.append((root / name, size))
                left -= size
        return chosen

    def _sources(self) -> Iterator[tuple[str, str]]:
        root, found = _stdlib(), False
        for path, _ in self._chosen():
            try:
                text = path.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError:
                continue
            except OSError as error:
                raise _unreadable(path, error) from error
            if text and "\0" not in text:
                found = True
                yield path.relative_to(root).as_posix(), text
        if not found:
            fits = f" of at most {self.config.max_bytes:,} bytes" if self.config.max_bytes else ""
            raise DataError(
                f"this Python has no sources{fits} of its standard library in {root}",
                hint="set data.train_path instead",
            )


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error}", hint="set data.train_path instead")


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_names(root: Path, tests: bool) -> list[str]:
    """The sources' names relative to `root`, in order of their hashes."""
    passed_over = {"site-packages", "dist-packages", "__pycache__"}
    if not tests:
        passed_over |= {"test", "tests", "idle_test"}
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in passed_over]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _files_of_folder(root: Path, suffixes: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """The files of a known kind below `root`, and the others, both by relative name; hidden ones are left out."""
    found = []
    for folder, subfolders, files in os.walk(root, onerror=_raise):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder) / name for name in files if not name.startswith(".")]
    found.sort(key=lambda path: path.relative_to(root).parts)
    known = [path for path in found if path.suffix.lower() in suffixes]
    return known, [path for path in found if path.suffix.lower() not in suffixes]


def _raise(error: OSError) -> None:
    raise error


def _suffix_hint(path: Path, kinds: str) -> str:
    if path.suffix.lower() in (".json", ".ndjson"):
        return "with one JSON object a line it is called .jsonl"
    return f"known are {kinds}; plain text may have any content but ends in .txt"


def _missing_hint(path: Path) -> str:
    near = None
    if path.parent.is_dir():
        near = did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()])
    return (
        f"did you mean {str(path.parent / near)!r}?"
        if near
        else f"relative paths start at {Path.cwd()}; set data.train_path"
    )
