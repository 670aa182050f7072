"""Ctrl-C, SIGTERM and a closed terminal: the run saves at the end of the step and leaves with the right exit code."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from apt.core.errors import AptError


class Interrupted(AptError):
    """A signal ended the run early, after it was saved.

    Args:
        signum: the signal; the exit code is 128 + signum, as shells have it.
        message: where the run stopped.
        hint: how to go on.
    """

    def __init__(self, signum: int, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signum


def _is_to_be_answered(signum: int) -> bool:
    """Whether anyone who sent the signal waits for a word: after SIGHUP there is nobody left to read it, and of several
    processes the first one has it, where it came from the keyboard."""
    if "LOCAL_RANK" in os.environ:
        return signum == signal.SIGINT and os.environ["LOCAL_RANK"] == "0"
    return signum != getattr(signal, "SIGHUP", None)


class StopRequest:
    """Remembers that a signal asked the run to stop."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None


BOUNCE_SECONDS = 0.5
"""A second signal that comes as soon as this is the same press of the key."""

STUCK_SECONDS = 2.0
"""Python hears of a signal when a call of C comes back. One that has not come back so long after the second signal is
not waited for."""


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Inside this block the first SIGINT, SIGTERM or SIGHUP only sets the request, and says so; a second one acts as it
    would elsewhere, also where the main thread is stuck in a call of C. A signal that is ignored (`nohup`) stays so.

    Signals can be caught in the main thread alone; elsewhere the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # None stands for a handler that was not installed from Python, and cannot be put back.
    caught = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {signum: signal.getsignal(signum) or signal.SIG_DFL for signum in caught}
    before = {signum: handler for signum, handler in before.items() if handler != signal.SIG_IGN}
    asked_at = heard_at = 0.0

    def remember(signum: int, frame: FrameType | None) -> None:
        nonlocal asked_at, heard_at
        heard_at = time.monotonic()
        if request.signum is None:
            request.signum, asked_at = signum, time.monotonic()
            if _is_to_be_answered(signum):
                # Past Python's own buffer, which the signal may have found in use; and nobody may be left to read it.
                with suppress(OSError):
                    os.write(2, b"stopping after this step, and saving; once more to leave at once\n")
        elif time.monotonic() - asked_at >= BOUNCE_SECONDS:
            heard_at = math.inf  # from here on others are responsible
            for other, handler in before.items():
                signal.signal(other, handler)
            signal.raise_signal(signum)

    for signum in before:
        signal.signal(signum, remember)
    with _leaving_if_stuck(set(before), lambda: heard_at):
        try:
            yield request
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


@contextmanager
def _leaving_if_stuck(signals: set[int], heard_at: Callable[[], float]) -> Iterator[None]:
    """Inside this block a thread hears of `signals` at once. Where the main thread has not heard of the second one (it
    last heard of any at `heard_at()`) in the time that it has for that, the thread ends the process."""
    told, telling = socket.socketpair()
    telling.setblocking(False)
    over = threading.Event()

    def watch() -> None:
        first = 0.0
        while byte := told.recv(1):
            now = time.monotonic()
            if byte[0] not in signals:
                continue
            first = first or now
            is_second = now - first >= BOUNCE_SECONDS and not over.wait(STUCK_SECONDS)
            # What the main thread did about the first one, it did earlier than that.
            if is_second and heard_at() < now - BOUNCE_SECONDS / 2:
                os._exit(128 + byte[0])

    before = signal.set_wakeup_fd(telling.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="apt-signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        with suppress(ValueError):  # whose it was may be gone
            signal.set_wakeup_fd(before)
        over.set()
        telling.close()
        thread.join()
        told.close()
