"""Counts the system calls by which a process changes files, and makes one of them its last, or the disk full.

A child asks the kernel (seccomp, user notification) to have each of its calls that can change a file answered by this
process, which lets it happen, refuses it or kills the child. So it does not matter who makes the call: Python, the C++
of torch, the Rust of safetensors, a thread. Linux on x86-64 only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = -1
"""As a folder's argument: relative paths start from the current folder."""


@dataclass(frozen=True)
class Call:
    """A system call that can change files, and which of its six arguments say what it changes.

    Attributes:
        descriptors: arguments that are open files.
        paths: (folder, path): arguments that are a path, and the open folder that it starts from.
        flags: the argument that holds the flags of `open`.
        needs_space: whether a full disk refuses it.
    """

    name: str
    descriptors: tuple[int, ...] = ()
    paths: tuple[tuple[int, int], ...] = ()
    flags: int | None = None
    needs_space: bool = False


CALLS = {
    1: Call("write", (0,), needs_space=True),
    18: Call("pwrite64", (0,), needs_space=True),
    20: Call("writev", (0,), needs_space=True),
    296: Call("pwritev", (0,), needs_space=True),
    328: Call("pwritev2", (0,), needs_space=True),
    40: Call("sendfile", (0,), needs_space=True),
    326: Call("copy_file_range", (2,), needs_space=True),
    77: Call("ftruncate", (0,), needs_space=True),
    285: Call("fallocate", (0,), needs_space=True),
    74: Call("fsync", (0,)),
    75: Call("fdatasync", (0,)),
    2: Call("open", paths=((HERE, 0),), flags=1, needs_space=True),
    257: Call("openat", paths=((0, 1),), flags=2, needs_space=True),
    82: Call("rename", paths=((HERE, 0), (HERE, 1))),
    264: Call("renameat", paths=((0, 1), (2, 3))),
    316: Call("renameat2", paths=((0, 1), (2, 3))),
    86: Call("link", paths=((HERE, 0), (HERE, 1)), needs_space=True),
    265: Call("linkat", paths=((0, 1), (2, 3)), needs_space=True),
    88: Call("symlink", paths=((HERE, 1),), needs_space=True),
    266: Call("symlinkat", paths=((1, 2),), needs_space=True),
    83: Call("mkdir", paths=((HERE, 0),), needs_space=True),
    258: Call("mkdirat", paths=((0, 1),), needs_space=True),
    87: Call("unlink", paths=((HERE, 0),)),
    263: Call("unlinkat", paths=((0, 1),)),
    84: Call("rmdir", paths=((HERE, 0),)),
    90: Call("chmod", paths=((HERE, 0),)),
    91: Call("fchmod", (0,)),
    268: Call("fchmodat", paths=((0, 1),)),
}
"""{number on x86-64: call}."""

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass
class Ledger:
    """What would be lost if the power failed now: the files that were written to and not synced since."""

    unsynced: set[str] = field(default_factory=set)

    def note(self, name: str, paths: Sequence[str]) -> None:
        """That a call is being made."""
        first = paths[0]
        if name in ("fsync", "fdatasync", "unlink", "unlinkat"):
            self.unsynced.discard(first)
        elif name.startswith("rename"):
            self._moved(first, paths[1])
        elif name.startswith(("open", "write", "pwrite", "sendfile", "copy_file_range", "ftruncate", "fallocate")):
            self.unsynced.add(first)

    def _moved(self, source: str, target: str) -> None:
        """What was not synced before it was renamed is not synced under its new name either."""
        if source not in self.unsynced:
            self.unsynced.discard(target)  # what lies there is replaced
        for path in [path for path in self.unsynced if path == source or path.startswith(source + os.sep)]:
            self.unsynced.discard(path)
            self.unsynced.add(target + path[len(source) :])

    def cut_power(self) -> None:
        """Leave the files as a file system may: the names are there, what was not synced is empty."""
        for path in map(Path, self.unsynced):
            if path.is_file():
                path.write_bytes(b"")


@dataclass
class Supervisor:
    """Runs a function in a forked process and has a say in what it does to files.

    Args:
        folders: whose files are meant.
        nth: the operation, from 1, that the fault happens at; 0 for none, to count them.
        fault: "kill": the process dies just before it. "ENOSPC": the disk is full from there on until the process ends,
            so that every call that needs space fails.
    """

    folders: Sequence[Path]
    nth: int = 0
    fault: str = "kill"
    operations: list[str] = field(default_factory=list)
    """What was done, in order."""
    ledger: Ledger = field(default_factory=Ledger)

    def run(self, work: Callable[[], None], seconds: float) -> int:
        """The exit code of the process, minus the signal that killed it; `work` must not return.

        Raises:
            PermissionError: the kernel does not allow it, as in some containers.
            TimeoutError: it had to be killed after so many seconds.
        """
        self._roots = [os.path.realpath(folder) for folder in self.folders]
        ours, theirs = socket.socketpair()
        child = os.fork()
        if child == 0:
            try:
                listener = ask_before_each(CALLS)
                socket.send_fds(theirs, [b"."], [listener])
                os.close(listener)
                work()
            finally:
                os._exit(70)
        theirs.close()
        with ours:
            _, sent, _, _ = socket.recv_fds(ours, 1, 1)
        if not sent:
            os.waitpid(child, 0)
            raise PermissionError("the kernel does not let a process have its system calls answered here")
        (listener,) = sent
        try:
            self._serve(child, listener, time.monotonic() + seconds)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        finally:
            os.close(listener)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _serve(self, child: int, listener: int, deadline: float) -> None:
        life = os.pidfd_open(child)
        try:
            poll = select.poll()
            poll.register(listener, select.POLLIN)
            poll.register(life, select.POLLIN)
            while True:
                ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
                if life in ready:
                    return
                if not ready:
                    raise TimeoutError("it goes on and on")
                if not ready[listener] & select.POLLIN:
                    poll.unregister(listener)
                elif not self._answer(listener):
                    poll.unregister(listener)  # an answer, to another thread too, might still let a call happen
                    os.kill(child, signal.SIGKILL)
        finally:
            os.close(life)

    def _answer(self, listener: int) -> bool:
        """Take one question; False, and no answer, if the process is to die of it."""
        notice = bytearray(NOTICE.size)
        try:
            fcntl.ioctl(listener, RECEIVE, notice, True)
            number, task, _, call, _, _, *arguments = NOTICE.unpack(notice)
            refusal = self._decide(CALLS[call], task, arguments)
            if refusal == DIE:
                return False
            reply = REPLY.pack(number, 0, -refusal, 0 if refusal else LET_IT_HAPPEN)
            fcntl.ioctl(listener, SEND, bytearray(reply), True)
        except (FileNotFoundError, ProcessLookupError):
            pass  # whoever asked is gone: the process has ended in the meantime
        return True

    def _decide(self, call: Call, task: int, arguments: Sequence[int]) -> int:
        """0 to let the call happen, or the error that it fails with, or DIE."""
        if call.flags is not None and not arguments[call.flags] & WRITES:
            return 0
        paths = [_opened(task, arguments[which]) for which in call.descriptors]
        paths += [_path(task, HERE if at == HERE else arguments[at], arguments[which]) for at, which in call.paths]
        inside = [(path, root) for path in paths for root in self._roots if (path + os.sep).startswith(root + os.sep)]
        if not inside:
            return 0
        self.operations.append(f"{call.name} {os.path.relpath(*inside[0])}")
        count = len(self.operations)
        if self.fault == "kill" and count == self.nth:
            return DIE
        if self.fault == "ENOSPC" and 0 < self.nth <= count and call.needs_space and _grows(call, arguments, paths[0]):
            return errno.ENOSPC
        self.ledger.note(call.name, paths)
        return 0


def _grows(call: Call, arguments: Sequence[int], path: str) -> bool:
    """Whether a call that may need space does: opening a file that is there does not."""
    return call.flags is None or (bool(arguments[call.flags] & os.O_CREAT) and not os.path.exists(path))


def _opened(task: int, descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/{task}/fd/{descriptor & 0xFFFFFFFF}")
    except OSError:
        return ""


def _path(task: int, folder: int, address: int) -> str:
    """The absolute path that an argument names, its folder resolved and its own link, if it is one, not followed."""
    path = _text(task, address)
    if not os.path.isabs(path):
        current = folder in (HERE, AT_FDCWD, AT_FDCWD & 0xFFFFFFFF, AT_FDCWD & 0xFFFFFFFFFFFFFFFF)
        start = os.readlink(f"/proc/{task}/cwd") if current else _opened(task, folder)
        path = os.path.join(start, path)
    parent, name = os.path.split(os.path.normpath(path))
    return os.path.join(os.path.realpath(parent), name)


def _text(task: int, address: int) -> str:
    """The string of C at an address of another process."""
    text = b""
    with open(f"/proc/{task}/mem", "rb", buffering=0) as memory:
        while b"\0" not in text:
            memory.seek(address + len(text))
            # Up to the end of the page: the next one may not be there.
            if not (part := memory.read(4096 - (address + len(text)) % 4096)):
                break
            text += part
    return os.fsdecode(text.partition(b"\0")[0])


# The kernel's side: linux/seccomp.h, linux/filter.h

NOTICE = struct.Struct("=QIIiIQ6Q")
"""struct seccomp_notif: id, task, flags, number of the call, architecture, instruction, six arguments."""
REPLY = struct.Struct("=QqiI")
"""struct seccomp_notif_resp: id, value, error, flags."""
RECEIVE, SEND = ((3 << 30) | (size.size << 16) | (ord("!") << 8) | nr for nr, size in enumerate((NOTICE, REPLY)))
LET_IT_HAPPEN = 1
DIE = -1
AT_FDCWD = -100
X86_64 = 0xC000003E


def supported() -> str:
    """Why this cannot be done here; "" if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the numbers of the system calls are those of Linux on x86-64"
    try:
        actions = Path("/proc/sys/kernel/seccomp/actions_avail").read_text()
    except OSError:
        actions = ""
    return "" if "user_notif" in actions else "this kernel has no user notification of seccomp"


def ask_before_each(numbers: Sequence[int] | dict[int, Call]) -> int:
    """Have this process, from now on, ask for each of these system calls; returns what the answers are given through.

    Raises:
        OSError: the kernel refuses.
    """

    def line(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value)

    load, equal, give = 0x20, 0x15, 0x06
    ask, allow = 0x7FC00000, 0x7FFF0000
    program = [line(load, 4), line(equal, X86_64, yes=1), line(give, allow), line(load, 0)]
    program += [line(equal, number, yes=len(numbers) - at) for at, number in enumerate(numbers)]
    program += [line(give, allow), line(give, ask)]
    code = ctypes.create_string_buffer(b"".join(program))
    filter_ = struct.pack("@HP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: anyone may then filter their own calls
    new_listener = 8
    listener = libc.syscall(317, 1, new_listener, filter_)
    if listener < 0:
        code_ = ctypes.get_errno()
        raise OSError(code_, os.strerror(code_))
    return int(listener)
