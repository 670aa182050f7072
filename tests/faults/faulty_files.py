"""Makes the operations on files of one process fail, or the process die in them.

Every function of `os` and every `open` through which APT changes files is counted where the path lies in one folder;
at the operation of a given number the fault happens. `save_file` of safetensors, which writes from Rust, counts as one
operation.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apt.checkpoint import shards as shards_module
from apt.checkpoint import store as store_module
from apt.training.signals import BOUNCE_SECONDS

WRITING = {"open", "write", "mkdir", "save_file", "fsync", "replace"}
"""Operations that may find the disk full."""


@dataclass
class FaultyFiles:
    """
    Args:
        folder: whose files are meant.
        nth: the operation, from 1, that the fault happens at; 0 for none, to count them.
        fault: "kill": die just before it. "torn": die in the middle of it, where it writes. "ENOSPC", "EIO", "EROFS":
            it fails with that; "EROFS" and "ENOSPC" from then on, for a disk does not recover by itself. "SIGTERM":
            that signal comes; "SIGTERM SIGTERM": twice, far enough apart to be two.
    """

    folder: Path
    nth: int = 0
    fault: str = "kill"
    count: int = 0
    operations: list[str] = field(default_factory=list)
    rank: int = 0
    """Of several processes, the one that it happens to; a power cut happens to all of them."""
    ledger: Path | None = None
    """Where to keep the list of the files that were written to and not synced since, for the model of a power cut."""
    tally: Path | None = None
    """Where to leave `count` at the end."""
    _unsynced: set[str] = field(default_factory=set)

    def install(self) -> None:
        """From now on, for the rest of the process."""
        self._folder = os.path.realpath(self.folder)
        for name in ("mkdir", "unlink", "remove", "rmdir", "chmod", "replace", "rename"):
            self._wrap(os, name, lambda *args, **options: args[0])
        self._wrap(os, "open", lambda *args, **options: args[0], only=_writes)
        for name in ("fsync", "ftruncate"):
            self._wrap(os, name, lambda *args, **options: _path_of(args[0]))
        for module in (store_module, shards_module):
            self._wrap(module, "save_file", lambda *args, **options: args[1])
        for module in (builtins, io):
            self._wrap_open(module)

    def _reach(self, name: str, path: str | os.PathLike[str]) -> bool:
        """Count an operation; True if it is to be torn. Raises or dies where it is the one."""
        where = os.path.realpath(os.fspath(path))
        if not (where + os.sep).startswith(self._folder + os.sep):
            return False
        self.count += 1
        self.operations.append(f"{name} {os.path.relpath(where, self._folder)}")
        due = self.count == self.nth
        if self.fault.startswith("SIG"):
            for number, name_of_signal in enumerate(self.fault.split() if due else ()):
                time.sleep(1.5 * BOUNCE_SECONDS * bool(number))
                os.kill(os.getpid(), getattr(signal, name_of_signal))
            return False
        if self.fault in ("kill", "torn", "power"):
            if due and not (self.fault == "torn" and name in ("write", "save_file")):
                self.die()
            self._remember(name, where)
            return due
        lasting = self.fault in ("ENOSPC", "EROFS") and 0 < self.nth < self.count
        if (due or lasting) and (self.fault != "ENOSPC" or name in WRITING):
            code = getattr(errno, self.fault)
            raise OSError(code, os.strerror(code), where)
        return False

    def die(self) -> None:
        if self.fault == "power" and os.getpgid(0) != os.getpgid(os.getppid()):
            os.killpg(0, signal.SIGKILL)  # all processes of this run, which are a group of their own
        os.kill(os.getpid(), signal.SIGKILL)

    def _remember(self, name: str, where: str) -> None:
        if name in ("write", "save_file", "ftruncate"):
            self._unsynced.add(where)
        elif name in ("fsync", "unlink", "remove"):
            self._unsynced.discard(where)
        self._keep_ledger()

    def _moved(self, source: str, target: str) -> None:
        """What was not synced before it was renamed is not synced under its new name either."""
        source, target = os.path.realpath(source), os.path.realpath(target)
        for path in list(self._unsynced):
            if (path + os.sep).startswith(source + os.sep):
                self._unsynced.discard(path)
                self._unsynced.add(target + path[len(source) :])
        self._keep_ledger()

    def _keep_ledger(self) -> None:
        if self.ledger is None:
            return
        draft = f"{self.ledger}.draft"
        descriptor = REAL["open"](draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(descriptor, "\n".join(sorted(self._unsynced)).encode())
        os.close(descriptor)
        REAL["replace"](draft, self.ledger)

    def _wrap(
        self, owner: Any, name: str, path_of: Callable[..., Any], only: Callable[..., bool] = lambda *args: True
    ) -> None:
        real = getattr(owner, name)
        REAL.setdefault(name, real)

        def faulty(*args: Any, **options: Any) -> Any:
            if not only(*args):
                return real(*args, **options)
            path = path_of(*args, **options)
            torn = "dir_fd" not in options and self._reach(name, path)
            if name in ("replace", "rename"):
                self._moved(args[0], args[1])
            result = real(*args, **options)
            if torn and name == "save_file":
                os.truncate(path, os.path.getsize(path) // 2)
                self.die()
            return result

        setattr(owner, name, faulty)

    def _wrap_open(self, module: Any) -> None:
        real = module.open

        def faulty(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return real(file, mode, *args, **options)
            self._reach("open", file)
            opened = real(file, mode, *args, **options)
            write = opened.write

            def faulty_write(data: Any) -> Any:
                if self._reach("write", file):
                    write(data[: len(data) // 2])
                    opened.flush()
                    self.die()
                return write(data)

            try:
                opened.write = faulty_write
                return opened
            except AttributeError:  # an object of C
                return _Proxy(opened, faulty_write)

        module.open = faulty


class _Proxy:
    """A file whose `write` is another one."""

    def __init__(self, file: Any, write: Callable[[Any], Any]) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


REAL: dict[str, Callable[..., Any]] = {}


def _writes(path: Any, flags: int = 0, *more: Any) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")
