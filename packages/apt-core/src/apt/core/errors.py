"""What can go wrong that a user can mend, and what is said when a run goes on with less than was asked for.

Every error a user can cause is an `AptError`: one clear line that says what and where, and a hint that says how to
mend it. The command line prints that line and exits 2; `--debug` shows the traceback. What only we can cause is an
`assert`.
"""

from __future__ import annotations

from collections.abc import Iterable


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


class AptWarning(UserWarning):
    """Something that was asked for is passed over, or done in another way."""


class FallbackWarning(AptWarning):
    """A provider could not be had and the default of its kind is used instead."""


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
