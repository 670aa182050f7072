"""The switch from a dense layer to its experts: copies of the trained weights, and of what the optimizer knows of them.

Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints" (2022), section 3.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apt_plugin_moe.layer import MoEFFN


@torch.no_grad()
def upcycle(layer: MoEFFN, optimizer: Optimizer | None = None) -> None:
    """Make every expert a copy of the layer's dense FFN.

    Args:
        optimizer: if given, whatever it keeps of a dense parameter (AdamW's moments, its count of steps, averages of
            the weights) is kept of each copy too.
    """
    for name, dense in layer.dense.named_parameters():
        for copied in _copies(layer, name):
            copied.copy_(dense)
            if optimizer is not None and dense in optimizer.state:
                optimizer.state[copied] = {
                    key: _like(value, dense, copied) for key, value in optimizer.state[dense].items()
                }


def draw_experts(layer: MoEFFN) -> None:
    """Draw each expert's initial weights on its own, where the dense FFN has `reset_parameters`: experts that learn
    from the first step on have nothing to be copies of."""
    fresh = copy.deepcopy(layer.dense)
    reset = getattr(fresh, "reset_parameters", None)
    if reset is None:
        return
    for experts in (layer.experts, layer.shared):
        if experts is None:
            continue
        for expert in range(experts.num_experts):
            reset()
            with torch.no_grad():
                for name, drawn in fresh.named_parameters():
                    experts.copy_of(name, expert).copy_(drawn)


def _copies(layer: MoEFFN, name: str) -> Iterator[nn.Parameter]:
    yield from layer.experts.copies_of(name)
    if layer.shared is not None:
        yield from layer.shared.copies_of(name)


def _like(value: Any, dense: Tensor, copied: Tensor) -> Any:
    if isinstance(value, Tensor):
        # Sharded as the copy is, where that is sharded over processes.
        like = torch.empty_like(copied, dtype=value.dtype, requires_grad=False)
        return like.copy_(value) if value.shape == dense.shape else value.clone()
    return copy.deepcopy(value)
