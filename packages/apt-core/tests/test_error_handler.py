"""Errors that pass are recovered from, so often and no more; all others are the caller's."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

import pytest
import torch

from apt.core import device
from apt.core.errors import ConfigError, ErrorHandler, in_a_line, is_out_of_memory


class Fails:
    """Raises `error` so many times, then returns 7."""

    def __init__(self, error: Callable[[], Exception], times: int) -> None:
        self.error, self.left, self.calls = error, times, 0

    def __call__(self) -> int:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error()
        return 7


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited; none of them pass."""
    waited: list[float] = []
    monkeypatch.setattr("apt.core.errors.time.sleep", waited.append)
    return waited


@pytest.mark.parametrize("error", [ConnectionResetError, TimeoutError, BrokenPipeError])
def test_what_did_not_answer_is_asked_again_a_little_later(error: type[Exception], waits: list[float]) -> None:
    action = Fails(error, 3)
    assert ErrorHandler(wait=0.1).run(action) == 7
    assert action.calls == 4 and waits == [0.1, 0.2, 0.4]


def test_what_does_not_pass_is_raised(waits: list[float], caplog: pytest.LogCaptureFixture) -> None:
    action = Fails(TimeoutError, 9)
    with pytest.raises(TimeoutError):
        ErrorHandler(attempts=2).run(action, "asking the tracker")
    assert action.calls == 3 and len(waits) == 2
    assert [record.getMessage() for record in caplog.records][-2:] == [
        "asking the tracker: TimeoutError: ",
        "TimeoutError came 3 times in a row: that is not going to pass",
    ]
    assert all(record.exc_info for record in caplog.records[:3]), "each with its traceback"


def test_a_success_sets_the_count_back(waits: list[float]) -> None:
    handler = ErrorHandler(attempts=1)
    for _ in range(3):
        assert handler.run(Fails(TimeoutError, 1)) == 7
    assert not handler.counts
    for _ in range(3):
        with handler.trying():
            raise TimeoutError
        with handler.trying():
            pass


@pytest.mark.parametrize("error", [ValueError("x"), ConfigError("x"), FileNotFoundError("x"), RuntimeError("x")])
def test_of_other_errors_nothing_is_known(error: Exception, waits: list[float]) -> None:
    handler, action = ErrorHandler(), Fails(lambda: error, 1)
    with pytest.raises(type(error)):
        handler.run(action)
    assert action.calls == 1 and waits == [] and handler.counts == {type(error).__name__: 1}
    with pytest.raises(type(error)), handler.trying():
        raise error


def test_ctrl_c_is_not_for_it() -> None:
    handler = ErrorHandler()
    handler.recover_from(Exception, lambda _: True)
    with pytest.raises(KeyboardInterrupt), handler.trying():
        raise KeyboardInterrupt


def test_how_to_recover_can_be_said(waits: list[float]) -> None:
    handler, seen = ErrorHandler(attempts=10), []
    handler.recover_from((KeyError, TimeoutError), seen.append)
    assert handler.run(Fails(KeyError, 2)) == 7
    assert handler.run(Fails(TimeoutError, 1)) == 7
    assert [type(error) for error in seen] == [KeyError, KeyError, TimeoutError]
    assert waits == [], "what was said last comes first"
    handler.recover_from(KeyError, lambda _: False)
    with pytest.raises(KeyError):
        handler.run(Fails(KeyError, 1))


def test_a_block_is_left_after_a_recovery(waits: list[float]) -> None:
    reached = []
    with ErrorHandler().trying("reading"):
        reached.append("before")
        raise TimeoutError
        reached.append("after")  # type: ignore[unreachable]
    assert reached == ["before"] and len(waits) == 1


def test_memory_that_ran_out_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large:
        pass

    held: list[weakref.ref[Large]] = []
    alive: list[bool] = []

    def grow() -> int:
        large = Large()
        held.append(weakref.ref(large))
        if len(held) == 1:
            raise MemoryError
        return len(held)

    real = device.release_memory

    def release() -> None:
        real()
        alive.append(held[0]() is not None)

    monkeypatch.setattr(device, "release_memory", release)
    assert ErrorHandler().run(grow) == 2
    assert alive == [False], "also what the call that failed held"


def test_memory_runs_out_in_several_ways() -> None:
    with pytest.raises(RuntimeError) as too_much:
        torch.empty(1 << 58)
    assert is_out_of_memory(too_much.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes")) and not is_out_of_memory(OSError())


def test_it_speaks_to_the_logger_that_it_is_given(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError):
        ErrorHandler(logger=logging.getLogger("mine")).run(Fails(lambda: ValueError("odd"), 1))
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("mine", "ValueError: odd")]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no"), "ValueError: no"),
        (RuntimeError("\n first of it\nand\nmore"), "RuntimeError: first of it"),
        (KeyError(), "KeyError: "),
        (MemoryError(), "out of memory"),
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB"
            ),
            "out of memory: there are no 20.00 MiB left",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"),
            "out of memory: there are no 4096 bytes left",
        ),
        (
            MemoryError("Unable to allocate 256. TiB for an array with shape (35184372088832,)"),
            "out of memory: there are no 256. TiB left",
        ),
    ],
)
def test_an_error_is_shown_in_a_line(error: Exception, line: str) -> None:
    assert in_a_line(error) == line
