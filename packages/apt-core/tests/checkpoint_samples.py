"""Small checkpoints to save, and a way to compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from apt.checkpoint.store import MANIFEST, MODEL, STRUCTURE, TENSORS, Checkpoint

FILES = [MODEL, TENSORS, STRUCTURE, MANIFEST]


def make(step: int, val_loss: float | None = None, tag: int = 0) -> Checkpoint:
    """A small checkpoint; `tag` tells two of the same step apart."""
    weight = torch.full((2, 2), float(step + 100 * tag))
    return Checkpoint(
        step=step,
        epoch=step // 10,
        batch_index=step % 10,
        model={"embed.weight": weight, "head.weight": weight, "norm.weight": torch.ones(3, dtype=torch.bfloat16)},
        optimizer={"state": {0: {"exp_avg": weight / 3}}, "param_groups": [{"betas": (0.9, 0.95), "params": [0]}]},
        rng={"torch": torch.tensor([step % 256], dtype=torch.uint8), "python": (3, (step, 2), None)},
        extra={"tokens_seen": 2**60 + step},
        plugins={"moe": {"load": torch.arange(4), "seen": {7: None}}},
        metrics={} if val_loss is None else {"val_loss": val_loss},
        dropped=[f"moe: extra_losses at step {step}"],
    )


def same(one: Checkpoint, other: Checkpoint) -> bool:
    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (value.dtype, value.tolist())
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [type(value), *map(plain, value)] if isinstance(value, list | tuple) else value

    return all(plain(getattr(one, name)) == plain(getattr(other, name)) for name in Checkpoint.__slots__)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
