"""The lock on a run's folder: the second trainer is refused, a dead one's lock is taken over."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from apt.core.errors import AptWarning, CheckpointError, RunInUseError
from apt.training import run_lock
from apt.training.run_lock import LOCK, only_trainer

HOLD = """
import sys
from pathlib import Path
from apt.training.run_lock import only_trainer

with only_trainer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the lock until its standard input is closed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        told = rf"another trainer \(process {process.pid}\) is at work in {tmp_path}"
        with pytest.raises(RunInUseError, match=told) as refused, only_trainer(tmp_path):
            pytest.fail("two at once")
        assert refused.value.exit_code == 2 and refused.value.hint and "\n" not in str(refused.value)
    with only_trainer(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_dead_ones_lock_is_taken_over(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / LOCK).exists()
    with only_trainer(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()} {socket.gethostname()}\n"
    assert not list(tmp_path.iterdir())


def test_two_of_one_process_are_two(tmp_path: Path) -> None:
    with only_trainer(tmp_path), pytest.raises(RunInUseError), only_trainer(tmp_path):
        pytest.fail("two at once")
    with pytest.raises(ZeroDivisionError), only_trainer(tmp_path):
        _ = 1 / 0
    with only_trainer(tmp_path):
        pass


def test_among_many_at_once_there_is_one_at_a_time(tmp_path: Path) -> None:
    """Each opens the file that another one is about to remove."""
    inside, turns, most = 0, 0, 0

    def work() -> None:
        nonlocal inside, turns, most
        own = 0
        while own < 25:  # how often it is refused is a matter of chance
            try:
                with only_trainer(tmp_path):
                    inside += 1
                    most = max(most, inside)
                    turns += 1
                    inside -= 1
                    own += 1
            except RunInUseError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and turns == 100


def test_the_name_of_a_holder_elsewhere_and_of_none(tmp_path: Path) -> None:
    with only_trainer(tmp_path):
        (tmp_path / LOCK).write_text("7 another-host")
        with (
            pytest.raises(RunInUseError, match=r"trainer \(process 7 on another-host\) is at work"),
            only_trainer(tmp_path),
        ):
            pass
        (tmp_path / LOCK).write_text("")
        with pytest.raises(RunInUseError, match="another trainer is at work"), only_trainer(tmp_path):
            pass


def test_a_file_system_without_locks_is_pointed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", cannot)
    with pytest.warns(AptWarning, match="cannot be locked"), only_trainer(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(path: Path) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(run_lock, "_open_locked", cannot)
    with pytest.raises(CheckpointError, match="the file system is read-only"), only_trainer(tmp_path):
        pass
