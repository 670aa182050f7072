"""What attention layers remember while a text is generated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from apt.core.errors import ProviderError
from apt.core.providers.attention import LayerCache


class PositionCache:
    """Tensors [B, max_length, ...] that fill up in step, position by position.

    A layer writes what it keeps of the new positions, tensor by tensor, and then advances. Writing is in place: it is
    meant for `torch.no_grad` or `torch.inference_mode`.

    Args:
        batch_size: rows B.
        max_length: how many positions there is room for.
        shapes: {name: shape beyond [B, max_length]} of the tensors.
        device, dtype: of the tensors.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.max_length = max_length
        self.length = 0
        self.tensors = {
            name: torch.empty(batch_size, max_length, *shape, device=device, dtype=dtype)
            for name, shape in shapes.items()
        }

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        self.length = max(0, min(length, self.length))

    def select_rows(self, rows_B: Tensor) -> None:
        """Keep the batch rows `rows_B` (int64 [B']), in that order; a row may be repeated."""
        self.batch_size = len(rows_B)
        self.tensors = {name: tensor[rows_B] for name, tensor in self.tensors.items()}

    def write(self, name: str, new: Tensor) -> Tensor:
        """Put `new` [B, T, ...] behind what is held and return all of it, [B, length + T, ...], in the dtype of `new`.

        Raises:
            ProviderError: there is no room for it, or it has another batch size.
        """
        stop = self.length + new.shape[1]
        if stop > self.max_length:
            raise ProviderError(
                f"the cache has room for {self.max_length} positions and {stop} are needed", hint="make a longer cache"
            )
        self._check_rows(new)
        self.tensors[name][:, self.length : stop] = new
        return self.tensors[name][:, :stop].to(new.dtype)

    def read(self, name: str, like: Tensor) -> Tensor:
        """All that is held, [B, length, ...], in the dtype of `like`.

        Raises:
            ProviderError: it is held for another number of rows than `like` has.
        """
        self._check_rows(like)
        return self.tensors[name][:, : self.length].to(like.dtype)

    def write_documents(self, ids_BT: Tensor | None) -> Tensor | None:
        """Put the document ids of the new positions behind those that are held and return all, int64 [B, length + T].

        Raises:
            ProviderError: some of the positions have document ids and some have not.
        """
        if self.length == 0:
            self.tensors.pop("documents", None)
        elif ("documents" in self.tensors) != (ids_BT is not None):
            raise ProviderError(
                "document_ids are given for some of the cached positions and not for others",
                hint="give them with every call or with none",
            )
        if ids_BT is None:
            return None
        if "documents" not in self.tensors:
            self.tensors["documents"] = ids_BT.new_zeros(self.batch_size, self.max_length)
        return self.write("documents", ids_BT)

    def write_positions(self, positions: Tensor | None, count: int, device: torch.device) -> Tensor | None:
        """Put the positions of `count` new tokens behind those that are held and return all, int64 [B, length + count].

        Where `positions` is None each is its own index; as long as that holds for all, nothing is kept and None is
        returned.
        """
        if self.length == 0:
            self.tensors.pop("positions", None)
        if "positions" not in self.tensors:
            if positions is None:
                return None
            self.tensors["positions"] = torch.arange(self.max_length, device=device).repeat(self.batch_size, 1)
        if positions is None:
            positions = torch.arange(self.length, self.length + count, device=device)
        return self.write("positions", positions.expand(self.batch_size, count))

    def advance(self, count: int) -> None:
        """The next `count` positions are complete."""
        self.length += count

    def _check_rows(self, like: Tensor) -> None:
        if like.shape[0] != self.batch_size:
            raise ProviderError(
                f"the cache is for {self.batch_size} rows and the batch has {like.shape[0]}",
                hint="make a cache for this batch size, or use select_rows",
            )


class ModelCache:
    """The caches of a model's layers, first layer first.

    Args:
        layers: one per layer, all of one length.
    """

    def __init__(self, layers: Sequence[LayerCache]) -> None:
        self.layers = list(layers)

    @property
    def length(self) -> int:
        """How many positions are held; the same for every layer and row."""
        return self.layers[0].length

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        for layer in self.layers:
            layer.truncate(length)

    def select_rows(self, rows_B: Tensor) -> None:
        """Keep the batch rows `rows_B` (int64 [B']), in that order; a row may be repeated."""
        for layer in self.layers:
            layer.select_rows(rows_B)

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self.layers)


__all__ = ["ModelCache", "PositionCache"]
