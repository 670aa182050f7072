"""What the kernels of this package need alike, and torch's own does by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Latest(Generic[T]):
    """What was made last, for as long as it is asked for of the same tensors: every layer of a model is given the same
    documents, and what they mean to a kernel takes longer to find out than one layer takes to compute."""

    def __init__(self) -> None:
        self._held: tuple[list[tuple[Any, int]], T] | None = None

    def __call__(self, make: Callable[[], T], *given: Any) -> T:
        """What `make` returns, or returned last if `given` is the same: tensors the same objects, the rest equal."""
        if torch.compiler.is_compiling() or any(isinstance(x, Tensor) and x.is_inference() for x in given):
            return make()  # whether such a tensor has been written to since cannot be known
        key = [(x, x._version if isinstance(x, Tensor) else 0) for x in given]
        if self._held is None or not _same(self._held[0], key):
            self._held = key, make()
        return self._held[1]


def _same(old: list[tuple[Any, int]], new: list[tuple[Any, int]]) -> bool:
    if len(old) != len(new):
        return False
    for (a, a_version), (b, b_version) in zip(old, new, strict=True):
        same = a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b
        if not same or a_version != b_version:
            return False
    return True


def of_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """Queries, keys and values as autocast would have them: it knows torch's own attention and no other kernel."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


__all__ = ["Latest", "of_one_dtype", "wants_gradient"]
