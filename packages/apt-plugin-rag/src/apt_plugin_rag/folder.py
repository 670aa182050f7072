"""A store in a folder.

    STORE/
        manifest.json       what it is, the documents, and the size and SHA-256 of every other file
        data-0123abcd/      one version of the contents: passages.jsonl, arrays as .npy, and bm25/ as bm25s saves it

A change writes another data folder, syncs it, and then puts another manifest in the place of the old one: a reader sees
the old contents or the new ones, whatever happens in between. Nothing in a store is a pickle, and none is ever read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import mmap
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from apt.api import AptError, DataError
from apt.core.providers.retrieval import Passage
from apt_plugin_rag.contents import Contents, Document, Fit, Floats, Integers, NearestPoints, TermCounts, Vectors
from apt_plugin_rag.store import Manifest, Neighbours, Size, Store, damaged, missing

if TYPE_CHECKING:
    from bm25s import BM25

MANIFEST = "manifest.json"

P = ParamSpec("P")
T = TypeVar("T")


def _as_written(method: Callable[P, T]) -> Callable[P, T]:
    """A method that reads what lies on the disk: whatever goes wrong over it comes out as a DataError. numpy and bm25s
    raise anything on files that are not theirs."""

    @functools.wraps(method)
    def read(*args: P.args, **more: P.kwargs) -> T:
        try:
            return method(*args, **more)
        except (AptError, MemoryError):
            raise
        except Exception as error:
            store = args[0]
            if not isinstance(store, FolderStore) or store._path is None:
                raise
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise damaged(store.where, text[:200]) from error

    return read


class FolderStore(Store):
    """A store in a folder, or in memory.

    Args:
        path: the folder; None for memory.
        create: whether it may be new.

    Raises:
        DataError: there is none, it is damaged, or something else lies there.
    """

    def __init__(self, path: str | None, *, create: bool = False) -> None:
        self.where = path or "(in memory)"
        self._path = Path(path) if path is not None else None
        self._contents, self._manifest = Contents(), None
        self._folder: Path | None = None
        self._digest: str | None = None
        self._index: tuple[float, float, BM25] | None = None
        if self._path is None:
            return
        if (self._path / MANIFEST).is_file():
            self._open(self._path)
        elif not create:
            raise missing(self.where)
        elif self._path.exists() and not _is_unfinished(self._path):
            raise DataError(f"{self._path} exists and is not a store", hint="name another folder for --store")

    _manifest: Manifest | None

    @property
    def manifest(self) -> Manifest | None:
        return self._manifest

    def documents(self) -> Mapping[str, str]:
        return {name: sha256 for name, (sha256, _) in self._contents.documents.items()}

    def size(self) -> Size:
        terms, vectors = self._contents.terms, self._contents.vectors
        return Size(
            len(self._contents.documents),
            len(self._contents.passages),
            len(terms.vocabulary) if terms is not None else 0,
            len(vectors.points) if vectors is not None else 0,
            vectors.points.shape[1] if vectors is not None else 0,
        )

    def update(
        self, manifest: Manifest, removed: Collection[str], added: Iterable[Document], fit: Fit | None = None
    ) -> None:
        with self._locked():
            if self._path is not None and _written_digest(self._path) != self._digest:
                raise DataError(f"the store {self.where} was changed by another process", hint="run it again")
            before = self._contents, self._manifest, self._folder, self._index
            self._contents, self._manifest = self._contents.changed(removed, added, fit), manifest
            self._folder = self._index = None
            try:
                if self._path is not None:
                    self._save(self._path)
            except BaseException:
                self._contents, self._manifest, self._folder, self._index = before
                raise
            self.__dict__.pop("_points", None)

    @_as_written
    def match(self, terms: Sequence[str], k: int, *, k1: float, b: float) -> list[tuple[int, float]]:
        index = self._bm25(k1, b)
        known = index.get_tokens_ids(list(terms)) if index is not None else []
        if index is None or not known:
            return []
        scores_N = index.get_scores_from_ids(known)
        best = np.argsort(-scores_N, kind="stable")[:k]
        return [(int(i), float(scores_N[i])) for i in best if scores_N[i] > 0]

    @_as_written
    def nearest(self, queries_QD: Floats, k: int) -> list[Neighbours]:
        vectors = self._contents.vectors
        if vectors is None:
            return [Neighbours(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))] * len(queries_QD)
        found, distances = self._points.search(np.asarray(queries_QD, np.float32), k)
        return [
            Neighbours(vectors.owners[which], vectors.values[which], near)
            for which, near in zip(found, distances, strict=True)
        ]

    @_as_written
    def sample(self, count: int) -> Floats:
        vectors = self._contents.vectors
        if vectors is None:
            return np.zeros((0, 0), np.float32)
        return np.asarray(vectors.points[:: -(-len(vectors.points) // count) or 1])

    @_as_written
    def read(self, ids: Sequence[int]) -> list[Passage]:
        return [self._contents.passages[i] for i in ids]

    def array(self, name: str) -> NDArray[Any] | None:
        return self._contents.arrays.get(name)

    @cached_property
    def _points(self) -> NearestPoints:
        assert self._contents.vectors is not None
        return NearestPoints(self._contents.vectors.points)

    def _bm25(self, k1: float, b: float) -> BM25 | None:
        """The lexical index with these parameters; None where there are no terms."""
        if self._index is not None and self._index[:2] == (k1, b):
            return self._index[2]
        terms = self._contents.terms
        if terms is None or not terms.vocabulary:
            return None
        import bm25s

        saved = self._folder / "bm25" if self._folder is not None else None
        index = bm25s.BM25.load(saved, mmap=True) if saved is not None and saved.is_dir() else None
        if index is None or (index.k1, index.b) != (k1, b):
            index = bm25s.BM25(k1=k1, b=b, method="lucene")
            every = np.repeat(terms.terms, terms.counts)
            borders = np.concatenate([[0], np.cumsum(terms.counts)])[terms.starts].tolist()
            rows = [every[start:end].tolist() for start, end in pairwise(borders)]
            index.index((rows, {term: i for i, term in enumerate(terms.vocabulary)}), show_progress=False)
        self._index = (k1, b, index)
        return index

    # On disk

    @_as_written
    def _open(self, path: Path) -> None:
        try:
            data = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            written = data.pop("sha256")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise damaged(self.where, f"{MANIFEST} cannot be read ({error})") from error
        self._manifest = Manifest.from_json(data, self.where)
        if written != _digest(data):
            raise damaged(self.where, f"{MANIFEST} is not as it was written")
        self._digest, self._folder = written, path / _inside(data["data"])
        for name, (size, sha256) in data["files"].items():
            self._check(self._folder / _inside(name), size, sha256)
        self._contents = _load(self._folder, {name: (sha, count) for name, sha, count in data["documents"]})

    def _check(self, path: Path, size: int, sha256: str) -> None:
        try:
            if path.stat().st_size != size:
                raise damaged(self.where, f"{path.name} has {path.stat().st_size:,} bytes instead of {size:,}")
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise damaged(self.where, f"{path.name} is not as it was written")
        except OSError as error:
            raise damaged(self.where, f"{path.name} cannot be read ({error.strerror})") from error

    def _save(self, path: Path) -> None:
        assert self._manifest is not None
        k1, b = (self._manifest.settings.get(name) for name in ("k1", "b"))
        folder = path / f"data-{secrets.token_hex(4)}"
        try:
            folder.mkdir(parents=True)
            _write(folder, self._contents)
            if k1 is not None and b is not None and (index := self._bm25(k1, b)) is not None:
                index.save(folder / "bm25", show_progress=False)
            files = {file.relative_to(folder).as_posix(): _measure(file) for file in _files_of(folder)}
            data = {
                **self._manifest.to_json(),
                "data": folder.name,
                "files": files,
                "documents": [(name, *rest) for name, rest in self._contents.documents.items()],
            }
            temporary = path / f".{MANIFEST}.{os.getpid()}"
            temporary.write_text(json.dumps({**data, "sha256": _digest(data)}), encoding="utf-8")
            _sync(temporary)
            _sync(folder)
            os.replace(temporary, path / MANIFEST)
            _sync(path)
            self._digest = _digest(data)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise DataError(
                f"cannot write the store {self.where}: {error.strerror or error}",
                hint="free some space, or name another folder for --store",
            ) from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        # What this process has mapped stays readable until it ends.
        for old in path.glob("data-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        self._folder = folder

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps a second writer out, which would clear away what the first one writes."""
        if self._path is None:
            yield
            return
        try:
            import fcntl
        except ImportError:  # Windows, which refuses to remove what is open in another process
            yield
            return
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            with open(self._path / ".lock", "wb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise DataError(
                        f"the store {self.where} is being written by another process", hint="wait for it to end"
                    ) from error
                yield
        except OSError as error:
            raise DataError(
                f"cannot write the store {self.where}: {error.strerror or error}", hint="name another folder"
            ) from error


class PassageFile(Sequence[Passage]):
    """Passages in a file, one JSON list a line, read when they are asked for.

    Args:
        starts: [N + 1], where each line starts, and the file's end.
    """

    def __init__(self, path: Path, starts: Integers) -> None:
        self._starts = starts
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(starts) > 1 else b""

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Passage: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Passage]: ...
    def __getitem__(self, index: int | slice) -> Passage | Sequence[Passage]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        source, text = json.loads(self._bytes[self._starts[index] : self._starts[index + 1]])
        return Passage(text, source)


def _inside(name: str) -> str:
    """`name`, which leads to nowhere but below the folder that it is joined to. Raises ValueError if it does not."""
    if not name or os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
        raise ValueError(f"{MANIFEST} names {name!r}, which is no file of the store")
    return name


def _is_unfinished(path: Path) -> bool:
    """Whether a folder is empty, or holds what a store's first writing has left that was cut short."""
    ours = (".lock", f".{MANIFEST}.", "data-")
    return path.is_dir() and all(entry.name.startswith(ours) for entry in path.iterdir())


def is_store(path: Path) -> bool:
    """Whether a folder holds a store."""
    return (path / MANIFEST).is_file() and any(path.glob("data-*/passages.jsonl"))


def _write(folder: Path, contents: Contents) -> None:
    arrays = {f"array_{name}": array for name, array in contents.arrays.items()}
    lines = [json.dumps([passage.source, passage.text]).encode() + b"\n" for passage in contents.passages]
    (folder / "passages.jsonl").write_bytes(b"".join(lines))
    arrays["starts"] = np.cumsum([0, *map(len, lines)], dtype=np.int64)
    if (terms := contents.terms) is not None:
        (folder / "vocabulary.json").write_text(json.dumps(terms.vocabulary), encoding="utf-8")
        arrays |= {"term_starts": terms.starts, "term_numbers": terms.terms, "term_counts": terms.counts}
    if (vectors := contents.vectors) is not None:
        arrays |= {"points": vectors.points, "owners": vectors.owners, "values": vectors.values}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)


def _load(folder: Path, documents: dict[str, tuple[str, int]]) -> Contents:
    arrays: dict[str, NDArray[Any]] = {
        file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in folder.glob("*.npy")
    }
    terms = vectors = None
    if "term_starts" in arrays:
        vocabulary = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        terms = TermCounts(vocabulary, arrays["term_starts"], arrays["term_numbers"], arrays["term_counts"])
    if "points" in arrays:
        vectors = Vectors(arrays["points"], arrays["owners"], arrays["values"])
    fitted = {name.removeprefix("array_"): array for name, array in arrays.items() if name.startswith("array_")}
    return Contents(documents, PassageFile(folder / "passages.jsonl", arrays["starts"]), terms, vectors, fitted)


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _written_digest(path: Path) -> str | None:
    """The digest in the manifest that lies there now; None if none does."""
    try:
        digest: str = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return digest


def _files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _measure(file: Path) -> tuple[int, str]:
    _sync(file)
    with open(file, "rb") as opened:
        return file.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Return once it is on the disk. Not every system opens a folder (Windows does not)."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
