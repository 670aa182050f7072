"""Files that survive a crash: written, flushed to the disk and only then given their name; and why that may fail."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from apt.core.errors import CheckpointError

_CAUSES: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", "free some space, or choose an output_dir on another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or choose an output_dir on another disk"),
    errno.EROFS: ("the file system is read-only", "choose an output_dir that can be written"),
    errno.EACCES: ("permission denied", "choose an output_dir that can be written, or mend the folder's permissions"),
    errno.EPERM: ("operation not permitted", "choose an output_dir that can be written"),
    errno.EIO: ("the disk reports an input/output error", "check the disk, and choose an output_dir on another one"),
}


def sync(path: Path) -> None:
    """Return once the content of a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder, and its parents, so that it is still there after a crash."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def write(path: Path, data: bytes) -> None:
    """Write a file and sync it. The file may be left incomplete; `replace` leaves it old or new."""
    with open(path, "wb") as file:
        file.write(data)
    sync(path)


def replace(path: Path, data: bytes) -> None:
    """Write a file so that it holds either what it held before or all of `data`, whatever happens meanwhile.

    Raises:
        CheckpointError: it cannot be written; the message says why.
    """
    try:
        make_folder(path.parent)
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise cannot_write(error, path, len(data)) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well. One process at a time does this.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex: of what is on the disk, where the cached copy is clean and the system drops it."""
    with open(path, "rb") as file:
        with contextlib.suppress(AttributeError, OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def system_code(error: BaseException) -> int | None:
    """The errno behind an error, also where a library tells it in words alone; None if there is none."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    if told:
        return int(told[1])
    return errno.ENOSPC if "no space left" in str(error).lower() else None


def cannot_write(error: BaseException, path: Path, needed: int) -> CheckpointError:
    """What to tell the user: the path, the cause, the bytes needed where that is the cause, and the fix."""
    code = system_code(error)
    cause, hint = _CAUSES.get(code or 0, (os.strerror(code) if code else str(error), "choose another output_dir"))
    if code in (errno.ENOSPC, errno.EDQUOT):
        cause += f": {needed:,} bytes are needed"
        with contextlib.suppress(OSError):
            cause += f", {shutil.disk_usage(path.parent).free:,} are free"
    return CheckpointError(f"cannot write {path}: {cause}", hint=hint)
