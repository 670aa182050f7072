"""Ctrl-C, SIGTERM and a closed terminal: the run saves at the end of the step and leaves with the right exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Inside this block the first SIGINT, SIGTERM or SIGHUP only sets the request, and says so; a second one acts as it
    would elsewhere. A signal that is ignored (`nohup`) stays so.

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
    asked_at = 0.0

    def remember(signum: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        if request.signum is None:
            request.signum, asked_at = signum, time.monotonic()
            if _is_to_be_answered(signum):
                print("stopping after this step, and saving; once more to leave at once", file=sys.stderr, flush=True)
        elif time.monotonic() - asked_at >= BOUNCE_SECONDS:
            for other, handler in before.items():
                signal.signal(other, handler)
            signal.raise_signal(signum)

    for signum in before:
        signal.signal(signum, remember)
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
