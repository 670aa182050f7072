"""Ctrl-C and SIGTERM: the run saves at the end of the step and leaves with the code that shells expect."""

from __future__ import annotations

import signal
import threading
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


class StopRequest:
    """Remembers that a signal asked the run to stop."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Inside this block the first SIGINT or SIGTERM only sets the request; a second one acts as it would elsewhere.

    Signals can be caught in the main thread alone; elsewhere the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # None stands for a handler that was not installed from Python, and cannot be put back.
    before = {signum: signal.getsignal(signum) or signal.SIG_DFL for signum in (signal.SIGINT, signal.SIGTERM)}

    def remember(signum: int, frame: FrameType | None) -> None:
        request.signum = signum
        for caught, handler in before.items():
            signal.signal(caught, handler)

    for signum in before:
        signal.signal(signum, remember)
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
