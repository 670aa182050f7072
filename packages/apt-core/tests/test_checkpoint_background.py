"""Saving in the background: what is saved is the state of the moment, one at a time, and no failure goes unsaid."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoint_samples import listing, make, same

from apt.checkpoint import background, codec
from apt.checkpoint.background import BackgroundSaver
from apt.checkpoint.store import Checkpoint, CheckpointStore, Snapshot
from apt.core.errors import AptWarning, CheckpointError


class SlowStore(CheckpointStore):
    """Writes when it is told to, and remembers how many write at once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.go = threading.Event()
        self.writing = self.most = 0
        self.threads: list[threading.Thread] = []
        self.failure: BaseException | None = None

    def write(self, snapshot: Snapshot) -> Path:
        self.threads.append(threading.current_thread())
        self.writing += 1
        self.most = max(self.most, self.writing)
        try:
            assert self.go.wait(60)
            if self.failure is not None:
                raise self.failure
            return super().write(snapshot)
        finally:
            self.writing -= 1


@pytest.fixture
def store(tmp_path: Path) -> SlowStore:
    return SlowStore(tmp_path / "checkpoints")


def tensors_of(checkpoint: Checkpoint) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def walk(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            walk(item)

    for name in ("model", "optimizer", "rng", "extra", "plugins"):
        walk(getattr(checkpoint, name))
    return found


def test_what_is_saved_is_the_state_of_the_moment(store: SlowStore) -> None:
    """Every tensor is overwritten, and everything else changed, before the first byte is written."""
    saver, live, as_it_was = BackgroundSaver(store), make(1, val_loss=2.0), make(1, val_loss=2.0)
    base = torch.arange(40.0)
    for checkpoint in (live, as_it_was):
        tensor = base.clone() if checkpoint is as_it_was else base
        checkpoint.plugins["views"] = {"column": tensor.view(8, 5)[:, 2], "part": tensor[3:9], "whole": tensor}
    saver.save(live)
    assert not list(store.folder.parent.iterdir())
    for tensor in tensors_of(live):
        tensor.zero_()
    live.extra["tokens_seen"] = 0
    live.optimizer["param_groups"][0]["betas"] = None
    live.dropped.append("later")
    live.metrics["val_loss"] = 0.0
    store.go.set()
    saver.wait()
    assert same(store.load(), as_it_was)
    assert store.best() == 1
    assert store.threads[0] is not threading.main_thread() and store.threads[0].daemon


def test_a_copy_shares_no_memory_with_its_original() -> None:
    owner = torch.arange(12.0)
    originals = {
        "whole": owner,
        "view": owner[2:4],
        "turned": owner.view(3, 4).T,
        "parameter": torch.nn.Parameter(owner),
    }
    copies = codec.portable(originals, copy=True)
    there = {tensor.untyped_storage().data_ptr() for tensor in originals.values()}
    own = [tensor.untyped_storage().data_ptr() for tensor in copies.values()]
    assert not there & set(own) and len(set(own)) == len(own)
    assert all(torch.equal(copies[name], originals[name]) for name in originals)
    assert sum(tensor.untyped_storage().nbytes() for tensor in copies.values()) == sum(
        t.nbytes for t in copies.values()
    )


def test_the_second_waits_for_the_first(store: SlowStore) -> None:
    saver = BackgroundSaver(store)
    saver.save(make(1))
    saver.check()
    second = threading.Thread(target=saver.save, args=(make(2),))
    second.start()
    time.sleep(0.05)
    assert second.is_alive() and store.writing == 1
    store.go.set()
    second.join()
    saver.wait()
    assert store.steps() == [1, 2] and store.most == 1


@pytest.mark.parametrize("how", ["check", "wait", "save"])
def test_a_failure_is_raised_once_by_whatever_comes_next(store: SlowStore, how: str) -> None:
    saver = BackgroundSaver(store)
    store.failure = CheckpointError("the disk is full")
    saver.save(make(1))
    saver.check()
    store.go.set()
    store.threads[0].join()
    with pytest.raises(CheckpointError, match="the disk is full"):
        saver.save(make(2)) if how == "save" else getattr(saver, how)()
    store.failure = None
    saver.check()
    saver.save(make(3))
    saver.wait()
    assert store.steps() == [3]


def test_what_no_checkpoint_can_keep_is_said_at_once(store: SlowStore) -> None:
    wrong = make(1)
    wrong.extra = {"file": open}
    with pytest.raises(CheckpointError, match=r"extra\.file is of type"):
        BackgroundSaver(store).save(wrong)
    assert not store.threads


@pytest.mark.parametrize("case", ["wait", "synchronous", "no memory"])
def test_who_waits_makes_no_copy(store: SlowStore, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    store.go.set()
    saver = BackgroundSaver(store, asynchronous=case != "synchronous")
    copied: list[bool] = []
    real = store.snapshot
    monkeypatch.setattr(store, "snapshot", lambda c, copy=False: copied.append(copy) or real(c, copy=copy))
    if case == "no memory":
        monkeypatch.setattr(background, "free_memory", lambda: 10)
        with pytest.warns(AptWarning, match="there is no memory for a copy"):
            saver.save(make(1))
        monkeypatch.undo()
        saver.save(make(2))
    else:
        saver.save(make(1), wait=case == "wait")
    assert store.latest() == (2 if case == "no memory" else 1)
    assert set(store.threads) == {threading.main_thread()} and not any(copied)


def test_both_ways_write_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = make(7, val_loss=1.0)
    for name, asynchronous in (("here", False), ("there", True)):
        saver = BackgroundSaver(CheckpointStore(tmp_path / name), asynchronous=asynchronous)
        saver.save(copy.deepcopy(checkpoint))
        saver.wait()
    here, there = (tmp_path / name / "step-00000007" for name in ("here", "there"))
    assert listing(here) == listing(there)
    assert all((here / name).read_bytes() == (there / name).read_bytes() for name in listing(here))
