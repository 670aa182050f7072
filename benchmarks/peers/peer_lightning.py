"""Lightning, set as its documentation says: a `ModelCheckpoint` that keeps the last ones by `global_step` and writes
`last.ckpt`, `fit(ckpt_path="last")`, a loader that knows its position (torchdata's, for resuming within an epoch).
Against a run that is broken off it offers `save_on_exception`, against a loss that is NaN
`EarlyStopping(check_finite=True)`, and for finding where numbers go wrong `detect_anomaly=True`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import peer
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from peer import Order, Watch
from torch import Tensor, nn
from torchdata.stateful_dataloader import StatefulDataLoader


class Lightning:
    name = "Lightning"
    offers = frozenset({"saving at a signal", "an early stop", "checks for debugging"})

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("lightning", "torchdata", "torch")}

    def train(self, run: Path, order: Order, watch: Watch) -> None:
        lightning.seed_everything(peer.SEED, workers=True)
        model = Model(order, watch)
        last = "last" if run.exists() else None
        keep = ModelCheckpoint(
            dirpath=run,
            monitor="global_step",
            mode="max",
            every_n_train_steps=order.every,
            save_top_k=peer.KEEP,
            save_last=True,
            save_on_exception=order.offer == "saving at a signal",
        )
        stop = EarlyStopping("loss", check_finite=True, patience=10**9)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=peer.STEPS,
            callbacks=[Steps(watch), keep, *([stop] if order.offer == "an early stop" else [])],
            detect_anomaly=order.offer == "checks for debugging",
            default_root_dir=run,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = StatefulDataLoader(list(peer.windows()), batch_size=peer.BATCH, shuffle=not order.plain)
        trainer.fit(model, data, ckpt_path=order.by_hand or last)
        if watch.first < 0:  # there was nothing left to do, so that no hook was called
            watch.begins(trainer.global_step)
        watch.ends(model.state_dict(), trainer.optimizers[0].state_dict())

    def checkpoints(self, run: Path) -> list[Path]:
        return sorted(run.glob("*.ckpt"), key=lambda file: -file.stat().st_mtime_ns)

    def kept(self, run: Path) -> dict[int, Mapping[str, Tensor]]:
        loaded = [torch.load(file, weights_only=True) for file in run.glob("*.ckpt")]
        return {checkpoint["global_step"]: checkpoint["state_dict"] for checkpoint in loaded}


class Model(lightning.LightningModule):
    """One layer of a transformer."""

    def __init__(self, order: Order, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.embedding = nn.Embedding(peer.letters(), 16)
        self.position = nn.Parameter(torch.zeros(peer.BLOCK, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=order.dropout, batch_first=True)
        self.head = nn.Linear(16, peer.letters())

    def training_step(self, window_BT: Tensor, batch_idx: int) -> Tensor:
        x_BTD = self.embedding(window_BT[:, :-1]) + self.position
        mask_TT = nn.Transformer.generate_square_subsequent_mask(peer.BLOCK)
        logits_BTV = self.head(self.layer(x_BTD, src_mask=mask_TT, is_causal=True))
        loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), window_BT[:, 1:].flatten())
        if self.watch.poisoned(self.global_step):
            loss = loss * float("nan")
        self.log("loss", loss)
        self.log("global_step", float(self.global_step))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=peer.LEARNING_RATE)


class Steps(Callback):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.watch.begins(trainer.global_step)

    def on_train_batch_end(self, trainer: lightning.Trainer, *more: Any) -> None:
        self.watch.did(trainer.global_step)
        if trainer.global_step == self.watch.order.until:
            trainer.should_stop = True


logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module="lightning")

PEER = Lightning()
