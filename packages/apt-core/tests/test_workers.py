"""Batches made ahead by threads: the same ones in the same order, errors in their place, and no thread left behind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import Config, small_config, train

from apt.checkpoint.store import CheckpointStore
from apt.core.errors import AptError, ConfigError
from apt.core.runs import RunFolder
from apt.data.ahead import made_ahead
from apt.data.loader import Loader, TokenLoader
from apt.data.pairs import PairLoader
from apt.data.token_store import Tokens
from apt.training.trainer import Trainer


def at_work() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("apt-data")]


def text_loader(workers: int) -> Loader:
    return TokenLoader(Tokens(np.arange(400, dtype=np.uint16), np.array([0])), 8, 4, seed=3, workers=workers)


def pair_loader(workers: int) -> Loader:
    lengths = np.random.default_rng(0).integers(1, 8, 100)
    ids = np.arange(int(lengths.sum()) + len(lengths), dtype=np.uint16)
    starts = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])
    return PairLoader(Tokens(ids, starts), 9, 4, eos_id=0, seed=3, workers=workers)


@settings(deadline=None)
@given(count=st.integers(0, 30), workers=st.integers(0, 5), taken=st.integers(0, 31))
def test_what_is_made_is_what_map_makes_and_the_threads_are_gone(count: int, workers: int, taken: int) -> None:
    made = made_ahead(lambda i: i * i, range(count), workers)
    assert [value for value, _ in zip(made, range(taken), strict=False)] == [i * i for i in range(min(count, taken))]
    made.close()
    assert at_work() == []


@pytest.mark.parametrize("make", [text_loader, pair_loader])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_batches_are_those_that_are_made_in_line(make: Callable[[int], Loader], workers: int) -> None:
    for epoch, start, share in [(0, 0, (0, 1)), (5, 3, (1, 2))]:
        alone, ahead = (list(make(n).epoch(epoch, start, share)) for n in (0, workers))
        assert len(alone) == len(make(0)) - start
        for a, b in zip(alone, ahead, strict=True):
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
            assert a.context.keys() == b.context.keys()
            assert all(torch.equal(a.context[name], b.context[name]) for name in a.context)
    assert at_work() == []


def test_as_many_are_made_ahead_as_there_are_workers_and_at_the_same_time() -> None:
    asked: list[int] = []
    together = threading.Barrier(3, timeout=30)

    def make(index: int) -> int:
        asked.append(index)
        if index < 3:
            together.wait()  # in line it would stand here for ever
        return index

    made = made_ahead(make, range(100), 3)
    assert next(made) == 0
    expiry = time.monotonic() + 30
    while len(asked) < 4 and time.monotonic() < expiry:
        time.sleep(0.01)
    time.sleep(0.05)
    assert sorted(asked) == [0, 1, 2, 3], "the one in use, and three more"
    made.close()
    assert at_work() == []


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_comes_out_where_its_batch_is_due(workers: int) -> None:
    def make(index: int) -> int:
        if index == 5:
            raise OSError(5, os.strerror(5), "tokens.bin")
        return index

    made, seen = made_ahead(make, range(10), workers), []
    with pytest.raises(OSError, match=r"tokens\.bin"):
        for value in made:
            seen.append(value)
    assert seen == [0, 1, 2, 3, 4]
    assert at_work() == []


# In a run


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Two epochs of six steps of two micro-batches."""
    return small_config(tmp_path, training={"max_epochs": 2, "batch_size": 4, "gradient_accumulation": 2})


class FailsAt:
    """Ends the run in the middle of a step, its batch made and others on their way."""

    def __init__(self, step: int) -> None:
        self.step = step

    def extra_losses(self, trainer: Any) -> None:
        if trainer.step == self.step:
            assert at_work()
            raise KeyboardInterrupt


def end_of(run: RunFolder) -> dict[str, Any]:
    checkpoint = CheckpointStore(run.checkpoints).load()
    assert checkpoint.step == 12
    return {**checkpoint.model, **{name: value for name, value in checkpoint.rng.items() if torch.is_tensor(value)}}


def test_a_run_that_changes_the_number_of_its_workers_ends_the_same(config: Config) -> None:
    whole = end_of(RunFolder(train(config).run_dir))
    broken = Trainer(config, quiet=True, overrides={"data.workers": 3, "checkpoint.every": 2})
    broken.register_hook(FailsAt(9))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert at_work() == []
    run = RunFolder(broken.run_dir)
    train(str(run.profile), resume=run, overrides={"data.workers": 2})
    assert at_work() == []
    again = end_of(run)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_number_of_workers_that_makes_no_sense_is_refused(config: Config) -> None:
    for wrong in (-1, 65, 1.5, "many"):
        with pytest.raises(ConfigError, match=r"data\.workers") as refused:
            Trainer(config, quiet=True, overrides={"data.workers": wrong})
        assert isinstance(refused.value, AptError)
