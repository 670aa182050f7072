"""What can go wrong that a user can mend, and what is said when a run goes on with less than was asked for.

Every error a user can cause is an `AptError`: one clear line that says what and where, and a hint that says how to
mend it. The command line prints that line and exits 2; `--debug` shows the traceback. What only we can cause is an
`assert`. What passes by itself, scripts may leave to an `ErrorHandler`.
"""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import logging

T = TypeVar("T")
Kind = type[Exception] | tuple[type[Exception], ...]
"""What `isinstance` takes."""


class AptError(Exception):
    """Base of every error that a user can mend.

    Args:
        message: what went wrong and where, one sentence without a final full stop.
        hint: how to mend it, likewise.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(AptError):
    """The command line names a command or an option that does not exist, or leaves one out that is needed."""


class ConfigError(AptError):
    """A profile, an override or a plain dict holds something that a run cannot use."""


class PluginError(AptError):
    """A plugin that was asked for cannot be had, or does not keep the contract."""


class ProviderError(AptError):
    """A provider cannot be built, or cannot serve what it was asked for."""


class ProviderNotFoundError(ProviderError, ValueError):
    """No provider is registered under that kind and name, and the kind has no default."""


class ConflictError(PluginError):
    """Two plugins claim one provider, or two providers in use exclude each other."""


class DataError(AptError):
    """A data file is missing, unreadable, empty or too short."""


class CheckpointError(AptError):
    """A checkpoint cannot be written, or one that was read is damaged or does not fit the run."""


class RunInUseError(AptError):
    """Another trainer works in the run's folder."""


class DeviceError(AptError):
    """The hardware that was asked for is not here, or too small for the run."""


class TrainingError(AptError):
    """A run cannot go on: the loss is not finite, or an effect failed under `on_plugin_error: stop`."""


class NotFiniteError(TrainingError):
    """The loss or the weights are NaN or infinite: what the run has become is not worth saving."""


class PeerLostError(TrainingError):
    """Another process of the run is gone: killed, failed, or out of reach."""


def in_a_line(error: BaseException) -> str:
    """An error that need not be ours, as messages show it: its class, and the first line of what it says; of memory
    that has run out, what could not be had."""
    if is_out_of_memory(error):
        asked = re.search(r"(?:tried|unable) to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE)
        return "out of memory" + (f": there are no {asked[1]} left" if asked else "")
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def misfit(error: Exception) -> str:
    """The first of the tensors that torch finds not to fit a model, and how many more there are."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first, *more = lines[1:] or lines or [type(error).__name__]
    return first.rstrip(".") + (f" (and {len(more)} more)" if more else "")


class AptWarning(UserWarning):
    """Something that was asked for is passed over, or done in another way."""


class FallbackWarning(AptWarning):
    """A provider could not be had and the default of its kind is used instead."""


class ErrorHandler:
    """Goes on after errors that pass: memory that ran out is given back, and what did not answer is asked again a
    little later. How to recover from others, `recover_from` is told; what it was not told is the caller's.

    Args:
        attempts: recoveries in a row from one class of errors.
        wait: seconds before what did not answer is asked again, twice as many each time.
        logger: is told of each error, with its traceback; that of `apt` if left out.
    """

    def __init__(self, *, attempts: int = 3, wait: float = 0.5, logger: logging.Logger | None = None) -> None:
        from apt.core.logging import get_logger  # here, for it costs a few ms, and start-up is measured

        self.attempts, self.wait = attempts, wait
        self.logger = logger or get_logger()
        self.counts: Counter[str] = Counter()
        """Errors by the name of their class, since the last success."""
        self._recoveries: list[tuple[Kind, Callable[[Exception], object]]] = []

    def recover_from(self, kind: Kind, recover: Callable[[Exception], object]) -> None:
        """Call `recover(error)` after errors of this kind, also where APT knows another way. If it returns False, the
        error is the caller's after all."""
        self._recoveries.insert(0, (kind, recover))

    def handle(self, error: Exception, doing: str = "") -> bool:
        """Say what failed, and recover from it.

        Returns:
            Whether it is worth going on: it is known how to recover from it, and that has not failed too often.
        """
        name = type(error).__name__
        self.counts[name] += 1
        self.logger.error("%s%s: %s", f"{doing}: " if doing else "", name, error, exc_info=error)
        recover = self._recovery_from(error)
        if recover is None:
            return False
        if self.counts[name] > self.attempts:
            self.logger.error("%s came %d times in a row: that is not going to pass", name, self.counts[name])
            return False
        return recover(error) is not False

    def run(self, action: Callable[[], T], doing: str = "") -> T:
        """The result of `action`, which is called again after each recovery. What is not recovered from is raised."""
        while True:
            try:
                result = action()
            except Exception as error:
                if not self.handle(error, doing):
                    raise
            else:
                self.counts.clear()
                return result

    @contextmanager
    def trying(self, doing: str = "") -> Iterator[None]:
        """Leave this block after an error that was recovered from, without what was left of it; raise the others."""
        try:
            yield
        except Exception as error:
            if not self.handle(error, doing):
                raise
        else:
            self.counts.clear()

    def _recovery_from(self, error: Exception) -> Callable[[Exception], object] | None:
        for kind, recover in self._recoveries:
            if isinstance(error, kind):
                return recover
        if is_out_of_memory(error):
            return _give_memory_back
        return self._wait if isinstance(error, ConnectionError | TimeoutError) else None

    def _wait(self, error: Exception) -> None:
        time.sleep(self.wait * 2 ** (self.counts[type(error).__name__] - 1))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory has run out, the GPU's or the machine's."""
    gpu: type[Exception] | tuple[()] = getattr(sys.modules.get("torch"), "OutOfMemoryError", ())
    # torch has no class for what its allocator on the CPU raises.
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return on_cpu or isinstance(error, (MemoryError, gpu))


def _give_memory_back(error: Exception) -> None:
    import traceback

    from apt.core.device import release_memory

    traceback.clear_frames(error.__traceback__)  # the calls that failed, and with them what they held
    release_memory()


SLIP, HINT = 0.75, 0.6
"""How alike two names must be, from 0 to 1: to take one for a slip of the other, where that decides something; and to
mention it, where the name is wrong in any case."""


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = SLIP) -> str | None:
    """The known name nearest to `name`, or None if none is near enough. The same letters in another order are."""
    import difflib  # here: it is needed only where something is wrong, and start-up is measured

    names = list(known)
    turned = [other for other in names if len(name) > 2 and other != name and sorted(other) == sorted(name)]
    matches = turned or difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return matches[0] if matches else None
