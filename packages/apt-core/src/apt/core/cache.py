"""Files that can be made again: where they lie, how they are written whole or not at all, how they are cleared away."""

from __future__ import annotations

import functools
import glob
import os
import secrets
import shutil
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from apt.core.errors import AptWarning

TAG = "CACHEDIR.TAG"
"""Marks a folder as ours to clear, and as one that backups may leave out (https://bford.info/cachedir)."""

TAG_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n# Made by apt-core: everything in this folder can be made again.\n"
)

UNFINISHED = ".tmp"
_being_written: set[Path] = set()
UNFINISHED_SECONDS = 3600.0
"""A file being written that has not grown for so long belongs to a process that died."""


def cache_root() -> Path:
    """The folder that holds every cache: $APT_CACHE_DIR, else $XDG_CACHE_HOME/apt-core, else ~/.cache/apt-core."""
    own, shared = os.environ.get("APT_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(os.path.expanduser(own))
    return Path(shared or os.path.expanduser("~/.cache")) / "apt-core"


def cache_dir(name: str, root: Path | None = None) -> Path:
    """The cache folder `name` below `root` (`cache_root()` if None), made if need be.

    Where it cannot be written, a temporary folder that lasts as long as the process stands in, with an AptWarning.
    """
    folder = (cache_root() if root is None else root) / name
    try:
        return _writable(folder)
    except OSError as error:
        stand_in = _writable(_temporary_root() / name)
        warnings.warn(
            f"the cache folder {folder} cannot be written ({error.strerror or error}): using {stand_in} until this "
            "process ends; name a folder that can be written in APT_CACHE_DIR or data.cache_dir",
            AptWarning,
            stacklevel=2,
        )
        return stand_in


def size(name: str | None = None, root: Path | None = None) -> int:
    """Bytes held by the caches below `root` (`cache_root()` if None), or by the one called `name`."""
    return sum(used for _, _, used in entries(name, root))


def names(root: Path | None = None) -> list[str]:
    """The caches below `root` (`cache_root()` if None)."""
    return [folder.name for folder in _folders(root)]


def entries(name: str | None = None, root: Path | None = None) -> Iterator[tuple[float, Path, int]]:
    """(last use, path, bytes) of every cached file, of all caches below `root` or of the one called `name`. What lies
    in a folder that does not carry our tag is not among them."""
    for folder in _folders(root):
        if name in (None, folder.name):
            for path in folder.iterdir():
                with suppress(OSError):
                    if path.name != TAG and path.is_file():
                        status = path.stat()
                        yield status.st_mtime, path, status.st_size


def clean(
    name: str | None = None,
    root: Path | None = None,
    *,
    max_bytes: int | None = None,
    older_than: float | None = None,
    keep: Collection[str] = (),
) -> int:
    """Remove cached files, those unused for longest first. What another process is still writing stays.

    Args:
        name, root: as for `size`.
        max_bytes: remove until no more than this is left.
        older_than: remove what has not been used for so many seconds. With neither, everything goes.
        keep: patterns of files that stay, such as "*.json" or "tokens/*".

    Returns:
        The bytes removed.
    """
    now, removed = time.time(), 0
    found = sorted(entries(name, root))
    left = sum(used for _, _, used in found)
    for last_used, path, used in found:
        if path.name.endswith(UNFINISHED) and now - last_used < UNFINISHED_SECONDS:
            continue
        if any(path.match(pattern) for pattern in keep):
            continue
        surplus = max_bytes is not None and left > max_bytes
        stale = older_than is not None and now - last_used > older_than
        if surplus or stale or (max_bytes is None and older_than is None):
            with suppress(OSError):
                path.unlink()
                removed += used
                left -= used
    return removed


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing so that it appears whole or not at all, whatever happens and whoever else writes it.

    The bytes go to a file beside it, reach the disk, and take its place when the block ends well.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{UNFINISHED}")
    _remove_stale(path)
    _being_written.add(temporary)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    finally:
        _being_written.discard(temporary)
    # The rename itself must outlive a power cut too. Not every system opens a folder (Windows does not).
    with suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_unfinished() -> None:
    """Remove what this process is writing: it leaves at once."""
    for path in list(_being_written):
        with suppress(OSError):
            path.unlink()


def _remove_stale(path: Path) -> None:
    """Remove what processes that died have left of the file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{UNFINISHED}"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > UNFINISHED_SECONDS:
                left.unlink()


def _writable(folder: Path) -> Path:
    """`folder`, made and tried out. A folder that was there before without our tag is used, but never cleared."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TAG).write_text(TAG_TEXT, encoding="utf-8")
    with tempfile.TemporaryFile(dir=folder):
        pass
    return folder


@functools.cache
def _temporary_root() -> Path:
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="apt-core-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _folders(root: Path | None) -> Iterator[Path]:
    """The folders below `root` that carry our tag."""
    with suppress(OSError):
        for folder in sorted((cache_root() if root is None else root).iterdir()):
            if _is_ours(folder / TAG):
                yield folder


def _is_ours(tag: Path) -> bool:
    try:
        return tag.read_text(encoding="utf-8", errors="replace") == TAG_TEXT
    except OSError:
        return False
