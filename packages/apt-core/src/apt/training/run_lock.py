"""One trainer at a time in a run's folder: two would prune each other's checkpoints and mix their metrics.

The file `trainer.lock` is locked by the operating system, which lets go of it when the process dies, however it dies.
So a lock that is left behind hinders nobody, and there is no age after which one is broken open.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from apt.checkpoint.durable import cannot_write
from apt.core.errors import AptWarning, RunInUseError

LOCK = "trainer.lock"

_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}
"""What the system answers where somebody else holds the lock; any other answer says that it cannot lock at all."""

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        # Far behind what is written: on Windows a locked byte cannot be read by others.
        os.lseek(descriptor, 2**30, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def only_trainer(folder: Path) -> Iterator[None]:
    """Inside this block no other trainer works in `folder`, of this process or another one.

    Where the file system cannot lock, the block runs all the same, with an AptWarning.

    Raises:
        RunInUseError: another one is at work there; the message names its process.
        CheckpointError: the folder cannot be written to.
    """
    path = folder / LOCK
    try:
        descriptor = _open_locked(path)
    except OSError as error:
        raise cannot_write(error, path, 0) from error
    try:
        with suppress(OSError):  # on a full disk the lock holds without a name in it
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
        yield
    finally:
        # Removed while it is held: whoever has opened it meanwhile sees that it is no longer the one in the folder.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    """A descriptor of the lock's file, locked; and of the one that is in the folder, not one that was just removed."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                _lock(descriptor)
            except OSError as error:
                if error.errno in _TAKEN:
                    raise _in_use(path) from None
                warnings.warn(
                    f"{path} cannot be locked ({error.strerror}): see to it that no other process trains in this run",
                    AptWarning,
                    stacklevel=4,
                )
                return descriptor
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _in_use(path: Path) -> RunInUseError:
    holder = ""
    with suppress(OSError, ValueError):
        process, host = path.read_text(encoding="utf-8").split()
        holder = f" (process {int(process)}{f' on {host}' if host != socket.gethostname() else ''})"
    return RunInUseError(
        f"another trainer{holder} is at work in {path.parent}",
        hint="wait for it or stop it; a new run takes a folder of its own",
    )
