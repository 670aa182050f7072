"""A bare PyTorch loop over a model: what one writes by hand, with nothing of a trainer in it.

It clips and schedules the learning rate as the trainer does: what is left between the two is the trainer's own cost.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class BareLoop:
    """Trains `model` on random blocks of `tokens`.

    Args:
        model: returns an object with `logits`.
        tokens: int64 [n], the text.
        block_size, batch_size: of the blocks.
        peak: the learning rate's peak; it falls as a cosine over `total_steps`.
    """

    def __init__(
        self, model: nn.Module, tokens: torch.Tensor, block_size: int, batch_size: int, *, peak: float, total_steps: int
    ) -> None:
        self.model, self.tokens, self.block_size, self.batch_size = model, tokens, block_size, batch_size
        self.peak, self.total_steps, self.step = peak, total_steps, 0
        decays = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups: list[dict[str, Any]] = [
            {"params": decays, "weight_decay": 0.1},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.99), fused=True)

    def run(self, steps: int) -> float:
        """Take `steps` steps; returns the CPU seconds they took."""
        started = time.process_time()
        for _ in range(steps):
            starts = torch.randint(len(self.tokens) - self.block_size - 1, (self.batch_size,)).tolist()
            x = torch.stack([self.tokens[i : i + self.block_size] for i in starts])
            y = torch.stack([self.tokens[i + 1 : i + 1 + self.block_size] for i in starts])
            rate = 0.1 * self.peak + 0.45 * self.peak * (1 + math.cos(math.pi * self.step / self.total_steps))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            logits = self.model(x).logits
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
        return time.process_time() - started


class Alternate:
    """A hook that lets a bare loop run between stretches of the trainer's steps, in one process and in turn, so that
    both meet the same machine.

    Attributes:
        trainer_seconds, bare_seconds: CPU seconds per step of each stretch, the warm-up included.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.bare: BareLoop | None = None
        self.trainer_seconds: list[float] = []
        self.bare_seconds: list[float] = []

    def on_training_start(self, trainer: Any) -> None:
        config, loader = trainer.config, trainer.data.train
        from apt.api import ModelBuilder

        model = ModelBuilder(config).build_model(vocab_size=trainer.tokenizer.vocab_size)
        tokens = torch.from_numpy(loader.tokens.ids.astype("int64"))
        self.bare = BareLoop(
            model, tokens, loader.block_size, config.training.batch_size,
            peak=config.training.learning_rate, total_steps=trainer.total_steps,
        )  # fmt: skip
        self._started = time.process_time()

    def on_step_end(self, step: int) -> None:
        if (step + 1) % self.steps:
            return
        self.trainer_seconds.append((time.process_time() - self._started) / self.steps)
        assert self.bare is not None
        self.bare_seconds.append(self.bare.run(self.steps) / self.steps)
        self._started = time.process_time()

    def results(self) -> list[tuple[float, float]]:
        """(trainer, bare) seconds per step, stretch by stretch."""
        return list(zip(self.trainer_seconds, self.bare_seconds, strict=True))[1:]
