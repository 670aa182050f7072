"""Hugging Face's Trainer, set as its documentation says: `save_steps`, `save_total_limit`,
`resume_from_checkpoint=True`. Against SIGTERM it offers `enable_jit_checkpoint`, and for finding where numbers go wrong
`debug="underflow_overflow"`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peer
import torch
from peer import Order, Watch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed


class HuggingFace:
    name = "HF Trainer"
    offers = frozenset({"saving at a signal", "checks for debugging"})

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("transformers", "accelerate", "torch")}

    def train(self, run: Path, order: Order, watch: Watch) -> None:
        goes_on = run.exists()
        set_seed(peer.SEED)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=peer.letters(),
                n_positions=peer.BLOCK,
                n_embd=16,
                n_layer=1,
                n_head=2,
                resid_pdrop=order.dropout,
                embd_pdrop=order.dropout,
                attn_pdrop=order.dropout,
            )
        )
        trainer = Watched(
            watch,
            model=model,
            args=TrainingArguments(
                output_dir=str(run),
                max_steps=peer.STEPS,
                per_device_train_batch_size=peer.BATCH,
                learning_rate=peer.LEARNING_RATE,
                logging_steps=2,
                save_steps=order.every,
                save_total_limit=peer.KEEP,
                train_sampling_strategy="sequential" if order.plain else "random",
                enable_jit_checkpoint=order.offer == "saving at a signal",
                debug="underflow_overflow" if order.offer == "checks for debugging" else "",
                seed=peer.SEED,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=[{"input_ids": window[:-1], "labels": window[:-1]} for window in peer.windows()],
        )
        trainer.add_callback(Steps(watch))
        trainer.train(resume_from_checkpoint=str(order.by_hand) if order.by_hand else goes_on)
        watch.ends(model.state_dict(), trainer.optimizer.state_dict())

    def checkpoints(self, run: Path) -> list[Path]:
        return sorted(run.glob("checkpoint-*"), key=lambda folder: -int(folder.name.removeprefix("checkpoint-")))

    def kept(self, run: Path) -> dict[int, Mapping[str, Tensor]]:
        return {
            int(file.parent.name.removeprefix("checkpoint-")): load_file(file)
            for file in run.glob("checkpoint-*/model.safetensors")
        }


class Watched(Trainer):
    def __init__(self, watch: Watch, **options: Any) -> None:
        super().__init__(**options)
        self.watch = watch

    def compute_loss(self, model: torch.nn.Module, inputs: Any, *more: Any, **options: Any) -> Any:
        loss = super().compute_loss(model, inputs, *more, **options)
        return loss * float("nan") if self.watch.poisoned(self.state.global_step) else loss


class Steps(TrainerCallback):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.watch.begins(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.watch.did(state.global_step)
        if state.global_step == self.watch.order.until:
            control.should_training_stop = True


PEER = HuggingFace()
