"""Opening what a user names, of which nothing is known yet: it may be a pipe, a device, or far too large."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

LARGEST = 64 << 20
"""Bytes of a file that is read as a whole."""


def open_file(path: Path) -> BufferedReader:
    """Open a file for reading bytes.

    Raises:
        OSError: it cannot be read, or is a folder, a pipe or a device; `strerror` says which.
    """
    return open(path, "rb", opener=only_a_file)


def read_file(path: Path, largest: int = LARGEST) -> bytes:
    """All of a file.

    Raises:
        OSError: as `open_file`, or it has more than `largest` bytes.
    """
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > largest:
            raise OSError(errno.EFBIG, f"it is larger than {largest >> 20} MiB", str(path))
        return file.read()


def only_a_file(path: str, flags: int) -> int:
    """Open a file as `open` asks its `opener` to.

    Raises:
        OSError: it cannot be opened, or is a pipe or a device.
    """
    # Without the flag, to open a pipe that nobody writes to would wait for ever.
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # of a folder `open` says it itself
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", path)
    return descriptor
