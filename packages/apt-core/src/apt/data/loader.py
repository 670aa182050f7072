"""Tokens to batches: blocks of consecutive tokens, shuffled anew each epoch, the same way for the same seed.

Where a run is in its data is two numbers, the epoch and the index of the batch: any batch can be made at any time.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from apt.core.errors import DataError
from apt.data.ahead import made_ahead
from apt.data.token_store import Tokens

NO_TARGET = -100
"""What torch's cross_entropy passes over."""

Indices = npt.NDArray[np.int64]
Share = tuple[int, int]
"""(i, n): the i-th of n parts, from 0."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """N rows of T consecutive tokens, and what comes after each."""

    tokens: Tensor
    """int64 [N, T]."""
    targets: Tensor
    """int64 [N, T], the token that follows each one; -100 where there is none to predict."""
    document_ids: Tensor | None = None
    """int64 [N, T], equal within a document; None where documents are not kept apart."""
    positions: Tensor | None = None
    """int64 [N, T], from 0 at the start of each document or row; None where documents are not kept apart."""
    source: Tensor | None = None
    """int64 [N, S], what each row is the target of, in the batches of an encoder-decoder."""
    source_padding: Tensor | None = None
    """bool [N, S], True where a source has ended; None where all are of one length."""

    @property
    def context(self) -> dict[str, Tensor]:
        """What the model is given beside the tokens, as keyword arguments."""
        return {name: tensor for name in _CONTEXT if (tensor := getattr(self, name)) is not None}

    def split(self, n: int) -> list[Batch]:
        """`n` micro-batches of equal size, as views. N must be a multiple of `n`."""
        if n == 1:
            return [self]
        rows = len(self.tokens)
        assert rows % n == 0, f"{rows} rows do not make {n} equal micro-batches"
        size = rows // n
        return [self._rows(slice(i, i + size)) for i in range(0, rows, size)]

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; itself if it is there."""
        if self.tokens.device == device:
            return self
        # Copies to a GPU are ordered with the work there; the CPU would read one that has not arrived.
        ahead = device.type != "cpu"
        moved = (None if x is None else x.to(device, non_blocking=ahead) for x in self._tensors())
        return Batch(*moved)  # type: ignore[arg-type]

    def _rows(self, rows: slice) -> Batch:
        return Batch(*(None if x is None else x[rows] for x in self._tensors()))  # type: ignore[arg-type]

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


_CONTEXT = tuple(field.name for field in fields(Batch))[2:]


class Loader(Protocol):
    """Deals out batches."""

    batch_size: int
    """Rows N of an epoch's batches: all that one optimizer step takes."""
    block_size: int
    """Tokens of a row, at most."""

    @property
    def size(self) -> str:
        """How much there is, in words."""

    @property
    def tokens_per_batch(self) -> int:
        """How many tokens one batch of an epoch trains on."""

    def __len__(self) -> int:
        """Batches per epoch, the same for every epoch."""

    def epoch(self, epoch: int, start: int = 0, share: Share = (0, 1)) -> Generator[Batch]:
        """The batches of one epoch from index `start` on: the same ones that follow it in `epoch(epoch)`; of each the
        rows of one share. Leaving a loop over them closes them."""

    def eval_batches(self, batch_size: int, limit: int | None = None, share: Share = (0, 1)) -> Iterator[Batch]:
        """All there is, in order, in batches of at most so many rows; at most `limit` of them, and one share of
        those."""


class TokenLoader:
    """Deals out a text in blocks.

    An epoch cuts the text into blocks of `block_size` tokens that do not overlap, from an offset of its own and in an
    order of its own. Blocks that do not fill a batch at the end of an epoch are left out; the order decides which.

    Args:
        tokens: the text.
        block_size: tokens T per row.
        batch_size: rows N per batch: all that one optimizer step takes.
        seed: with the epoch, decides offset and order; the global generators are not touched.
        document_mask: whether batches carry document ids and positions.
        workers: threads that make batches ahead of an epoch's reader.
        name: of the text, for messages.

    Raises:
        DataError: the text is shorter than one block.
    """

    def __init__(
        self,
        tokens: Tokens,
        block_size: int,
        batch_size: int,
        *,
        seed: int = 0,
        document_mask: bool = False,
        workers: int = 0,
        name: str = "the text",
    ) -> None:
        if len(tokens) <= block_size:
            raise DataError(
                f"{name} has {len(tokens)} tokens; one block of model.max_seq_len {block_size} needs {block_size + 1}",
                hint="give more text or lower model.max_seq_len",
            )
        self.tokens = tokens
        self.block_size = block_size
        self.batch_size = batch_size
        self._seed = seed
        self._document_mask = document_mask
        self._workers = workers
        # Row i is ids[i : i + T + 1]: a batch is one fancy index into this view.
        self._windows = np.lib.stride_tricks.sliding_window_view(tokens.ids, block_size + 1)
        # However the offset falls, an epoch has the same number of blocks. They leave room for every offset within a
        # block, unless the text then falls short of one batch.
        steps = len(tokens) - 1
        self._blocks = max(min(batch_size, steps // block_size), (steps - (block_size - 1)) // block_size)
        self._slack = steps - self._blocks * block_size

    @property
    def size(self) -> str:
        """How much there is, in words."""
        return f"{len(self.tokens):,} tokens"

    @property
    def tokens_per_batch(self) -> int:
        """N * T: what one batch of an epoch trains on."""
        return self.batch_size * self.block_size

    def __len__(self) -> int:
        """Batches per epoch, the same for every epoch."""
        return self._blocks // self.batch_size

    def epoch(self, epoch: int, start: int = 0, share: Share = (0, 1)) -> Generator[Batch]:
        """The batches of one epoch from index `start` on: the same ones that follow it in `epoch(epoch)`.

        Args:
            share: (i, n): of each batch the i-th of n equal parts of its rows. N must be a multiple of n.
        """
        part, parts = share
        rows = self.batch_size // parts
        assert rows * parts == self.batch_size
        starts = self._starts(epoch)

        def batch(index: int) -> Batch:
            first = index * self.batch_size + part * rows
            return self._batch(starts[first : first + rows])

        return made_ahead(batch, range(start, len(self)), self._workers)

    def eval_batches(self, batch_size: int, limit: int | None = None, share: Share = (0, 1)) -> Iterator[Batch]:
        """The text in order, so that each token but the very first is predicted exactly once.

        The last row is padded, with targets of -100, and the last batch may have fewer rows.

        Args:
            batch_size: rows per batch.
            limit: stop after so many batches.
            share: (i, n): every n-th batch from the i-th on.
        """
        starts = np.arange(0, len(self.tokens) - 1, self.block_size)
        stop = len(starts) if limit is None else min(limit * batch_size, len(starts))
        part, parts = share
        for first in range(part * batch_size, stop, parts * batch_size):
            yield self._batch(starts[first : first + batch_size])

    def _starts(self, epoch: int) -> Indices:
        """Where the blocks of an epoch start, in its order."""
        # numpy promises the raw numbers of a bit generator for all its versions, and no method's use of them.
        generator = np.random.PCG64(np.random.SeedSequence((self._seed, epoch)))
        offset = int(generator.random_raw()) % (self._slack + 1)
        order = np.argsort(generator.random_raw(self._blocks), kind="stable")
        return order * self.block_size + offset

    def _batch(self, starts_N: Indices) -> Batch:
        ids, length = self.tokens.ids, self.block_size
        out_2NT = np.empty((2, len(starts_N), length), np.int64)
        if starts_N[-1] + length < len(ids):
            window_NT1 = self._windows[starts_N]
            out_2NT[0], out_2NT[1] = window_NT1[:, :-1], window_NT1[:, 1:]
        else:
            last = len(ids) - 1
            index_NT = starts_N[:, None] + np.arange(length)
            out_2NT[0], out_2NT[1] = ids[np.minimum(index_NT, last)], ids[np.minimum(index_NT + 1, last)]
            out_2NT[1][index_NT >= last] = NO_TARGET
        tokens_NT, targets_NT = torch.from_numpy(out_2NT).unbind()
        if not self._document_mask:
            return Batch(tokens_NT, targets_NT)
        return Batch(tokens_NT, targets_NT, *self._documents(starts_N))

    def _documents(self, starts_N: Indices) -> tuple[Tensor, Tensor]:
        """Document ids and positions, both int64 [N, T]. A document that began before its row starts anew there."""
        index_NT = starts_N[:, None] + np.arange(self.block_size)
        ids_NT = np.searchsorted(self.tokens.starts, index_NT, side="right") - 1
        positions_NT = index_NT - np.maximum(self.tokens.starts[ids_NT], starts_N[:, None])
        return torch.from_numpy(ids_NT), torch.from_numpy(positions_NT)
