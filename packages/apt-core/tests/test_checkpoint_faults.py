"""Faults while saving: whatever fails or dies, a store that loads is left, and what went wrong is said."""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import listing, make, same
from safetensors import SafetensorError
from small_disk import mounted

from apt.checkpoint import store as store_module
from apt.checkpoint.durable import replace
from apt.checkpoint.store import MODEL, CheckpointStore
from apt.core.errors import AptWarning, CheckpointError


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """No warning passes a test unless it is asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", AptWarning)
        yield


OPERATIONS = [
    (os, "open"), (os, "fsync"), (os, "replace"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (os, "chmod"),
    (builtins, "open"), (store_module, "save_file"),
]  # fmt: skip


def before_each_operation(setattr_: Callable[[Any, str, Any], None], act: Callable[[], None]) -> None:
    """Call `act` before every operation on files."""

    def guard(real: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **options: Any) -> Any:
            act()
            return real(*args, **options)

        return guarded

    for owner, name in OPERATIONS:
        setattr_(owner, name, guard(getattr(owner, name)))


def flush_nothing(descriptor: int) -> None:
    """What a process has written outlives it without being flushed; waiting for the disk would only take time."""


def fill(folder: Path) -> None:
    store = CheckpointStore(folder, keep_last=2)
    store.save(make(1, val_loss=1.0))
    store.save(make(2, val_loss=2.0))
    store.save(make(3, val_loss=3.0))


def save_once(folder: Path, step: int) -> None:
    """Step 4 is new and makes step 2 superfluous; step 3 is there already."""
    CheckpointStore(folder, keep_last=2).save(make(step, val_loss=4.0, tag=1))


def check_survival(folder: Path, step: int) -> None:
    """The newest checkpoint is the last one before the save, or the new one; the best is there; the next save heals."""
    store = CheckpointStore(folder, keep_last=2)
    newest = store.load()
    assert same(newest, make(3, val_loss=3.0)) or same(newest, make(step, val_loss=4.0, tag=1)), newest
    assert same(store.load(1), make(1, val_loss=1.0)) and store.best() == 1
    assert len(store.steps()) >= 3
    for kept in store.steps():
        store.load(kept)
    store.save(make(5, val_loss=5.0))
    assert same(store.load(), make(5, val_loss=5.0))
    assert listing(folder) == [f"step-{kept:08d}" for kept in store.steps()]


@pytest.mark.parametrize("step", [3, 4])
@pytest.mark.parametrize("mode", ["interrupt", "error", "errors from then on"])
def test_a_fault_at_any_operation_leaves_a_store_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, mode: str
) -> None:
    monkeypatch.setattr(os, "fsync", flush_nothing)
    fill(tmp_path / "base")
    failures = 0
    for nth in range(1, 1000):
        folder = tmp_path / f"{nth}"
        shutil.copytree(tmp_path / "base", folder)
        count = 0

        def act(nth: int = nth) -> None:
            nonlocal count
            count += 1
            if count == nth or (count > nth and mode == "errors from then on"):
                raise KeyboardInterrupt if mode == "interrupt" else OSError(errno.EIO, "Input/output error")

        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore", AptWarning)
            before_each_operation(patch.setattr, act)
            try:
                save_once(folder, step)
            except KeyboardInterrupt:
                failures += 1
            except CheckpointError as error:
                failures += 1
                assert "input/output error" in error.message.lower() and str(folder) in error.message
        if mode != "errors from then on" and same(CheckpointStore(folder).load(), make(3, val_loss=3.0)):
            assert not list(folder.glob("*.tmp"))
        check_survival(folder, step)
        shutil.rmtree(folder)
        if count < nth:
            break
    assert nth > 20 and failures > 15


def kill_at_every_operation(root: Path) -> None:
    """In processes of their own: die without a word at the first operation, the second, ..."""
    setattr(os, "fsync", flush_nothing)  # noqa: B010
    fill(root / "base")
    for step in (3, 4):
        for nth in range(1, 1000):
            folder = root / f"{step}-{nth}"
            shutil.copytree(root / "base", folder)
            child = os.fork()
            if child == 0:
                left = nth

                def act() -> None:
                    nonlocal left
                    left -= 1
                    if left == 0:
                        os._exit(9)

                before_each_operation(setattr, act)
                save_once(folder, step)
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            check_survival(folder, step)
            if code == 0:
                break
            assert code == 9, code
        print(f"step {step}: killed at {nth - 1} operations")


def test_death_at_any_operation_leaves_a_store_that_loads(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::apt.core.errors.AptWarning", __file__, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    killed = [int(line.split()[-2]) for line in done.stdout.splitlines()]
    assert len(killed) == 2 and min(killed) > 20, done.stdout


def test_what_the_disk_does_not_give_back_is_not_saved(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(make(1))

    def forgetful(path: Path) -> None:
        if path.suffix == ".tmp":  # everything is written; the disk loses a sector
            (path / MODEL).write_bytes((path / MODEL).read_bytes()[:-4] + b"\0\0\0\1")

    monkeypatch.setattr(store_module, "sync", forgetful)
    with pytest.raises(CheckpointError, match=r"step-00000002 was not saved: .*model\.safetensors is damaged"):
        store.save(make(2))
    assert listing(store.folder) == ["step-00000001"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: "),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up: "),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "the disk is full: ",
        ),
        (SafetensorError("Error while serializing: I/O error: Read-only file system (os error 30)"), "is read-only"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: No space left on device"), "the disk is full: "),
        (PermissionError(errno.EACCES, "Permission denied"), "permission denied"),
        (OSError(errno.EIO, "Input/output error"), "input/output error"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "File name too long"),
        (shutil.Error("neither a code nor a cause"), "neither a code nor a cause"),
    ],
    ids=str,
)
def test_what_the_system_says_is_told_with_path_and_fix(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    store.save(make(1))

    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(store_module, "save_file", fail)
    with pytest.raises(CheckpointError) as caught:
        store.save(make(2))
    assert told in caught.value.message and str(store.folder / "step-00000002") in caught.value.message
    assert caught.value.hint and caught.value.exit_code == 2 and "\n" not in str(caught.value)
    if told.endswith(": "):
        assert "bytes are needed" in caught.value.message and "are free" in caught.value.message
    assert listing(store.folder) == ["step-00000001"]
    assert same(store.load(), make(1))


def test_an_error_of_ours_is_not_dressed_up(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(store_module, "save_file", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        store.save(make(1))
    assert listing(store.folder) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    with mounted(tmp_path / "disk", "1m") as disk:
        yield disk


@pytest.mark.parametrize("what", ["weights", "tensors", "structure"])
def test_a_disk_that_is_really_full(small_disk: Path, what: str) -> None:
    store = CheckpointStore(small_disk / "checkpoints")
    store.save(make(1))
    big = make(2)
    if what == "weights":
        big.model["big"] = torch.zeros(300_000)
    elif what == "tensors":
        big.optimizer["big"] = torch.zeros(300_000)
    else:
        big.extra["big"] = "x" * 1_200_000
    with pytest.raises(
        CheckpointError, match=r"step-00000002: the disk is full: 1,2\d\d,\d\d\d bytes are needed"
    ) as caught:
        store.save(big)
    assert caught.value.hint == "free some space, or choose an output_dir on another disk"
    assert listing(store.folder) == ["step-00000001"]
    assert same(store.load(), make(1))
    store.save(make(2))
    assert store.steps() == [1, 2]


def test_a_disk_that_is_really_read_only(small_disk: Path) -> None:
    store = CheckpointStore(small_disk / "checkpoints")
    store.save(make(1))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="the file system is read-only"):
        store.save(make(2))
    assert same(store.load(), make(1))


def test_replace_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "folder" / "file.json"
    replace(path, b"old")
    assert path.read_bytes() == b"old"

    def fail(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match=r"file\.json: the disk is full: 3 bytes are needed"):
        replace(path, b"new")
    assert path.read_bytes() == b"old" and listing(path.parent) == ["file.json"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill_at_every_operation(Path(sys.argv[1]))
