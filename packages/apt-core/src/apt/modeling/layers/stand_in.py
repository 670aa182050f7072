"""A model computed with other weights than its own, such as an average of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


@torch.no_grad()
def call_with(model: nn.Module, weights: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What `model(*args, **kwargs)` returns with `weights` in the place of its own, without a graph.

    Args:
        model: whole, or in shards (FSDP2); then every process must come to this call.
        weights: {name of a parameter: a tensor like it}; the others keep theirs.
    """
    if not any(hasattr(weight, "to_local") for weight in weights.values()):
        return functional_call(model, dict(weights), args, dict(kwargs))
    with _exchanged(model, weights):
        return model(*args, **kwargs)


@contextmanager
def _exchanged(model: Any, weights: Mapping[str, Any]) -> Iterator[None]:
    """Inside this block the model's shards hold what `weights` hold, and the other way round: a model in shards gathers
    its parameters from where they lie, and takes no others."""
    # Between a forward pass and its backward the root of the model has its parameters gathered.
    was_gathered = not all(hasattr(parameter, "to_local") for parameter in model.parameters())
    model.reshard()
    own = dict(model.named_parameters())
    pairs = [(own[name].to_local(), weight.to_local()) for name, weight in weights.items()]
    _exchange(pairs)
    try:
        yield
    finally:
        model.reshard()
        _exchange(pairs)
        if was_gathered:
            model.unshard()


def _exchange(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for one, other in pairs:
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)


__all__ = ["call_with"]
