"""AdamW and the learning rate."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import AdamW

from apt.core.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019) over every parameter; only matrices decay.

    Gains, biases and whatever marks itself `no_weight_decay` are left alone: pulling them to zero is no regularisation.
    The groups keep the parameters' names, so that a checkpoint can say which state belongs to which.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = [(name, p) for name, p in named if p.ndim >= 2 and not getattr(p, "no_weight_decay", False)]
    chosen = {name for name, _ in decays}
    groups: list[dict[str, Any]] = [
        {"params": decays, "weight_decay": config.weight_decay},
        {"params": [(name, p) for name, p in named if name not in chosen], "weight_decay": 0.0},
    ]
    on_fused_device = all(p.device.type in ("cpu", "cuda", "mps") for _, p in named)
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=on_fused_device,
    )


def learning_rate(step: int, total_steps: int, config: TrainingConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0: a linear warm-up, then the profile's `lr_schedule`.

    A schedule that falls reaches its floor at the last step. A pure function: a resumed run needs no state for it.
    """
    peak = config.learning_rate
    floor = config.min_learning_rate if config.min_learning_rate is not None else peak / 10
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return peak
    span = max(total_steps - 1 - config.warmup_steps, 1)
    done = min((step - config.warmup_steps) / span, 1.0)
    falling = 0.5 * (1 + math.cos(math.pi * done)) if config.lr_schedule == "cosine" else 1 - done
    return floor + (peak - floor) * falling
