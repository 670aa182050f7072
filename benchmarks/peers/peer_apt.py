"""APT as it comes; only what the comparison gives all three (text, sizes, steps, what is kept) is set."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peer
import torch
from peer import Order, Watch
from torch import Tensor

from apt import __version__
from apt.api import RunFolder, Trainer
from apt.checkpoint.store import CheckpointStore


class Apt:
    name = "APT"
    offers = frozenset({"saving in line"})

    def versions(self) -> dict[str, str]:
        return {"apt-core": __version__, "torch": torch.__version__}

    def train(self, run: Path, order: Order, watch: Watch) -> None:
        folder = RunFolder(run)
        resume = folder if folder.holds_a_run() else None
        trainer = Trainer(config(run, order), quiet=True, run_dir=None if resume else run, resume=resume)
        trainer.register_hook(Steps(watch))
        trainer.train()
        watch.ends(trainer.model.state_dict(), trainer.optimizer.state_dict())

    def checkpoints(self, run: Path) -> list[Path]:
        return []  # it passes over what is damaged by itself

    def kept(self, run: Path) -> dict[int, Mapping[str, Tensor]]:
        store = CheckpointStore(RunFolder(run).checkpoints)
        return {step: store.load(step).model for step in store.steps()}


def config(run: Path, order: Order) -> dict[str, Any]:
    text = run.with_name("text.txt")
    if not text.exists():
        text.write_text(peer.TEXT)
    return {
        "name": "peer",
        "plugins": [],
        "model": {
            "d_model": 16,
            "num_heads": 2,
            "num_layers": 1,
            "max_seq_len": peer.BLOCK,
            "dropout": order.dropout,
        },
        "data": {"train_path": str(text), "cache_dir": str(run.with_name("cache"))},
        "training": {
            "max_epochs": 999,
            "max_steps": peer.STEPS,
            "batch_size": peer.BATCH,
            "learning_rate": peer.LEARNING_RATE,
            "log_every": 2,
        },
        "checkpoint": {
            "every": order.every,
            "keep_last": peer.KEEP,
            "asynchronous": order.offer != "saving in line",
        },
        "hardware": {"device": "cpu"},
    }


class Steps:
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_training_start(self, trainer: Trainer) -> None:
        self.watch.begins(trainer.step)

    def extra_losses(self, trainer: Trainer) -> dict[str, Tensor]:
        return {"poison": torch.tensor(float("nan"))} if self.watch.poisoned(trainer.step) else {}

    def on_step_end(self, step: int) -> None:
        self.watch.did(step + 1)
        if step + 1 == self.watch.order.until:
            signal.raise_signal(signal.SIGTERM)


importlib.import_module("torch._dynamo")  # two seconds, which the first optimizer would take
PEER = Apt()
