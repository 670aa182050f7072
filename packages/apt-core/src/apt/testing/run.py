"""Runs checks on one provider, and says what came of each.

A check that is expected to fail must fail: one that passes is a failure, and so is the name of a check that does not
exist. A check is skipped only where the provider says that it cannot do what the check is about; whatever else keeps a
check from its end is a failure. So no provider can run fewer checks than its kind demands, and `at_least` holds it to
the number that it has once run.
"""

from __future__ import annotations

import linecache
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from apt.core.catalogue import KINDS
from apt.core.device import pick_device
from apt.core.errors import HINT, AptError, ConfigError, ProviderError, did_you_mean
from apt.testing.check import Check, CheckFailure, CheckSkipped, checks_of

ELSEWHERE = (sysconfig.get_path("stdlib"), str(Path(__file__).parent))
LIBRARIES = {"torch", "pydantic", "numpy", "safetensors"}
MESSAGE = 300
"""Characters of a provider's message that are shown."""

Outcome = Literal["ok", "FAILED", "skipped", "expected"]
Factory = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one check."""

    check: Check
    outcome: Outcome
    message: str = ""
    """Why it failed or was skipped."""
    error: BaseException | None = None
    """What the provider raised, where it raised something."""


@dataclass(frozen=True, slots=True)
class Case:
    """One check of one provider."""

    check: Check
    subject: Any
    """An `apt.testing.subjects.Subject`."""
    expected_failure: str | None = None

    def __call__(self) -> Result:
        """Run it inside a test: raises CheckFailure if it fails, and marks the test as skipped or expected to fail."""
        import pytest

        result = self.run()
        if result.outcome == "FAILED":
            raise CheckFailure(f"{self.check.kind} check {self.check.name}: {result.message}") from result.error
        if result.outcome == "skipped":
            pytest.skip(result.message)
        if result.outcome == "expected":
            pytest.xfail(result.message)
        return result

    def run(self) -> Result:
        """Run it. What the provider raises is a failure of the check and goes no further."""
        with isolated():
            try:
                lacking = self.lacking()
                if lacking is None:
                    self.check.function(self.subject)
            except CheckSkipped as skipped:
                lacking = str(skipped)
            except (ProviderError, ConfigError) as error:
                if not self.check.may_refuse:
                    return self._failed(f"{_told(error)}; no provider of this kind may refuse that", error)
                lacking = f"it refuses: {error.message}"
            except CheckFailure as error:
                return self._failed(str(error), error)
            except (Exception, SystemExit) as error:
                return self._failed(_told(error), error)
        if lacking is not None:
            if self.expected_failure is not None:
                return Result(self.check, "FAILED", f"it is expected to fail and is skipped ({lacking}); {TAKE_OUT}")
            return Result(self.check, "skipped", lacking)
        if self.expected_failure is not None:
            reason = f"it is expected to fail ({self.expected_failure}) and passes; {TAKE_OUT}"
            return Result(self.check, "FAILED", reason)
        return Result(self.check, "ok")

    def lacking(self) -> str | None:
        """Why it has to be skipped, as far as the provider itself says so; None if it can be run."""
        reasons = (self.subject.lacks(need) for need in self.check.needs)
        return next((reason for reason in reasons if reason is not None), None)

    def _failed(self, message: str, error: BaseException) -> Result:
        if self.expected_failure is not None:
            return Result(self.check, "expected", self.expected_failure)
        return Result(self.check, "FAILED", " ".join(message.split()), error)


TAKE_OUT = "take it out of expected_failures"


def cases(
    kind: str,
    factory: Factory,
    expected_failures: Mapping[str, str] | None = None,
    *,
    name: str | None = None,
    device: str = "cpu",
) -> list[Case]:
    """The checks of a kind, to be run on what `factory` builds. Nothing is built before one of them runs.

    Args:
        kind: one of `apt.core.catalogue.KINDS`.
        factory: builds a fresh provider each time: its class, or a function without arguments.
        expected_failures: {check: why it fails}, beside those that `factory.expected_failures` names: a class may carry
            its own, so that whoever checks it knows them.
        name: the name that the provider is registered under, if it is known.
        device: where layers are built and run.

    Raises:
        ConfigError: there is no such kind, or an expected failure names no check of it.
        DeviceError: there is no such device.
    """
    if kind not in KINDS:
        raise _unknown(f"there is no provider kind {kind!r}", kind, KINDS)
    known = checks_of(kind)
    expected: dict[str, str] = {**getattr(factory, "expected_failures", {}), **(expected_failures or {})}
    for check in expected:
        if check not in known:
            raise _unknown(f"expected_failures: {kind} has no check {check!r}", check, known)
    from apt.testing.subjects import SUBJECTS

    subject = SUBJECTS[kind](kind, factory, name=name, device=str(pick_device(device)))
    return [Case(check, subject, expected.get(check.name)) for check in known.values()]


def require_count(cases: Sequence[Case], at_least: int | None) -> None:
    """Raise CheckFailure if fewer than `at_least` of these checks can be run; slow ones do not count."""
    with isolated():
        skipped = {case.check.name: case.lacking() for case in cases if not case.check.slow}
    running = [name for name, reason in skipped.items() if reason is None]
    if at_least is not None and len(running) < at_least:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items() if reason is not None)
        raise CheckFailure(f"{len(running)} checks can be run, and at least {at_least} have to be ({reasons})")


@contextmanager
def isolated() -> Iterator[None]:
    """Whatever happens inside this block to torch's, NumPy's and Python's global state is undone behind it."""
    import random

    import numpy
    import torch

    from apt.checkpoint.rng import torch_rng_kept

    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    gradients, anomaly = torch.is_grad_enabled(), torch.is_anomaly_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    python, own = random.getstate(), numpy.random.get_state()
    try:
        with torch_rng_kept():
            yield
    finally:
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_grad_enabled(gradients)
        torch.autograd.set_detect_anomaly(anomaly)
        torch.use_deterministic_algorithms(deterministic)
        random.setstate(python)
        numpy.random.set_state(own)


def _told(error: BaseException) -> str:
    """What was raised and where, in one line. The user's errors say by themselves what is wrong."""
    if isinstance(error, AptError):
        return f"it raises {type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if _is_the_providers(frame.filename)), frames[-1])
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    text = " ".join(str(error).split())[:MESSAGE] or "no message"
    return f"it raises {type(error).__name__}: {text} ({frame.filename}:{frame.lineno}: {line})"


def _is_the_providers(filename: str) -> bool:
    """Whether a frame lies in the provider's own code, and not in a library, in Python or in the kit."""
    parts = Path(filename).parts
    return not (LIBRARIES & set(parts) or filename.startswith(ELSEWHERE))


def _unknown(message: str, name: str, known: Mapping[str, Any]) -> ConfigError:
    near = did_you_mean(name, known, cutoff=HINT)
    return ConfigError(message, hint=f"did you mean {near!r}?" if near else f"there are {', '.join(known)}")


__all__ = ["Case", "Result", "cases", "isolated", "require_count"]
