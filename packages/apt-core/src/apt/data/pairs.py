"""Pairs of a source and a target to batches, for an encoder-decoder.

Pairs are kept as other tokens are, one document for a source and one for its target in turn.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from apt.core.errors import AptWarning, DataError
from apt.core.providers.dataset import Piece
from apt.data.ahead import made_ahead
from apt.data.config import PairsConfig
from apt.data.loader import NO_TARGET, Batch, Indices, Share
from apt.data.readers import Stat, checked, decoded_lines, jsonl_texts, read_with
from apt.data.sources import FilesDataset
from apt.data.token_store import Tokens

POOL = 32
"""Batches whose pairs are sorted by length together."""


class PairsDataset(FilesDataset):
    """Pairs of a source and a target: one in each line of a .jsonl file, and in each line `source<TAB>target` of a .txt
    or .tsv file."""

    Config: ClassVar[type[Any] | None] = PairsConfig
    pairs = True
    suffixes: ClassVar = (".jsonl", ".txt", ".tsv")

    def get_name(self) -> str:
        return "pairs"

    def _read(self, path: Path, expected: Stat | None) -> Iterator[Piece]:
        fields = {"data.pairs.source_field": self.config.source_field}
        fields["data.pairs.target_field"] = self.config.target_field

        def pairs(path: Path, file: BufferedReader) -> Iterator[Piece]:
            found = jsonl_texts(path, file, fields) if path.suffix.lower() == ".jsonl" else _tab_texts(path, file)
            for where, texts in found:
                for text, what in zip(texts, ("source", "target"), strict=True):
                    if not text:
                        raise DataError(f"{where}: the {what} is empty", hint="leave such pairs out")
                    yield Piece(text)

        return read_with(pairs, path, expected)

    def _fields(self) -> str:
        return f"{self.config.source_field}\0{self.config.target_field}"


def _tab_texts(path: Path, file: BufferedReader) -> Iterator[tuple[str, list[str]]]:
    for where, line in decoded_lines(path, file):
        texts = line.rstrip("\r\n").split("\t")
        if len(texts) != 2:
            raise DataError(
                f"{where}: {len(texts) - 1 or 'no'} tab{'s' if len(texts) > 2 else ''} in the line, and one stands "
                "between source and target",
                hint='write source<TAB>target in each line, or a .jsonl file of {"source": "...", "target": "..."}',
            )
        yield where, [checked(text, where) for text in texts]


class PairLoader:
    """Deals out pairs.

    An epoch takes the pairs in an order of its own, and puts those alike in length into one batch, so that little is
    padded. Pairs that do not fill a batch at its end are left out; the order decides which.

    A target is trained behind the token that ends documents, and with that token behind it: it starts one and ends it.

    Args:
        tokens: the pairs, sources and targets in turn.
        max_length: longest source, and longest target with the token that ends it; longer pairs are left out, aloud.
        batch_size: pairs N per batch: all that one optimizer step takes.
        eos_id: the token that ends documents.
        seed: with the epoch, decides the order; the global generators are not touched.
        workers: threads that make batches ahead of an epoch's reader.
        name: of the pairs, for messages.

    Raises:
        DataError: no pair is short enough.
    """

    def __init__(
        self,
        tokens: Tokens,
        max_length: int,
        batch_size: int,
        *,
        eos_id: int,
        seed: int = 0,
        workers: int = 0,
        name: str = "the pairs",
    ) -> None:
        self.block_size, self.batch_size, self._workers = max_length, batch_size, workers
        self._ids, self._eos_id, self._seed = tokens.ids, eos_id, seed
        starts_P2, lengths_P2 = _spans(tokens)
        longest_P = np.maximum(lengths_P2[:, 0], lengths_P2[:, 1] + 1)
        fits_P = longest_P <= max_length
        pairs, left_out = len(longest_P), int((~fits_P).sum())
        if left_out == pairs:
            raise DataError(
                f"{name}: all {pairs} pairs are longer than model.max_seq_len {max_length}",
                hint=f"raise model.max_seq_len, to {int(longest_P.max())} for all of them",
            )
        if left_out:
            warnings.warn(
                f"{name}: {left_out} of {pairs} pairs are left out: they are longer than model.max_seq_len "
                f"{max_length}",
                AptWarning,
                stacklevel=4,
            )
        self._starts_P2, self._lengths_P2 = starts_P2[fits_P], lengths_P2[fits_P]

    @property
    def pairs(self) -> int:
        """How many pairs there are."""
        return len(self._starts_P2)

    @property
    def size(self) -> str:
        """How much there is, in words."""
        return f"{self.pairs:,} pairs"

    @property
    def tokens_per_batch(self) -> int:
        """What one batch of an epoch trains on: tokens of targets, on average."""
        return round(self.batch_size * float((self._lengths_P2[:, 1] + 1).mean()))

    def __len__(self) -> int:
        """Batches per epoch, the same for every epoch."""
        return self.pairs // self.batch_size

    def epoch(self, epoch: int, start: int = 0, share: Share = (0, 1)) -> Generator[Batch]:
        """The batches of one epoch from index `start` on: the same ones that follow it in `epoch(epoch)`.

        Args:
            share: (i, n): of each batch the i-th of n equal parts of its rows. N must be a multiple of n.
        """
        part, parts = share
        order = self._order(epoch)

        def batch(index: int) -> Batch:
            return self._batch(order[index].reshape(parts, -1)[part])

        return made_ahead(batch, range(start, len(self)), self._workers)

    def eval_batches(self, batch_size: int, limit: int | None = None, share: Share = (0, 1)) -> Iterator[Batch]:
        """The pairs in order, so that each token of a target is predicted exactly once; the last batch may be smaller.

        Args:
            batch_size: pairs per batch.
            limit: stop after so many batches.
            share: (i, n): every n-th batch from the i-th on.
        """
        part, parts = share
        stop = self.pairs if limit is None else min(limit * batch_size, self.pairs)
        for first in range(part * batch_size, stop, parts * batch_size):
            yield self._batch(np.arange(first, min(first + batch_size, self.pairs)))

    def _order(self, epoch: int) -> Indices:
        """The pairs of an epoch's batches, [batches, N]."""
        # numpy promises the raw numbers of a bit generator for all its versions, and no method's use of them.
        generator = np.random.PCG64(np.random.SeedSequence((self._seed, epoch)))
        order = np.argsort(generator.random_raw(self.pairs), kind="stable")[: len(self) * self.batch_size]
        for pool in np.split(order, range(POOL * self.batch_size, len(order), POOL * self.batch_size)):
            pool[:] = pool[np.argsort(self._lengths_P2[pool].sum(1), kind="stable")]
        batches = order.reshape(len(self), self.batch_size)
        return batches[np.argsort(generator.random_raw(len(self)), kind="stable")]

    def _batch(self, rows_N: Indices) -> Batch:
        source_NS, blocked_NS = self._texts(rows_N, 0, 0)
        content_NT, after_NT = self._texts(rows_N, 1, 1)
        # The first padding of a target is the token that ends it.
        beyond_NT = np.pad(after_NT[:, :-1], ((0, 0), (1, 0)))
        return Batch(
            tokens=torch.from_numpy(np.pad(content_NT[:, :-1], ((0, 0), (1, 0)), constant_values=self._eos_id)),
            targets=torch.from_numpy(np.where(beyond_NT, NO_TARGET, content_NT)),
            source=torch.from_numpy(source_NS),
            source_padding=torch.from_numpy(blocked_NS) if blocked_NS.any() else None,
        )

    def _texts(self, rows_N: Indices, which: int, room: int) -> tuple[Indices, npt.NDArray[np.bool_]]:
        """The sources (0) or targets (1) of some pairs, padded on the right with the token that ends documents: as
        int64 [N, longest + room], and where they are padded."""
        starts_N, lengths_N = self._starts_P2[rows_N, which], self._lengths_P2[rows_N, which]
        places_L = np.arange(max(int(lengths_N.max()) + room, 1))
        padding_NL = places_L >= lengths_N[:, None]
        index_NL = np.minimum(starts_N[:, None] + places_L, len(self._ids) - 1)
        return np.where(padding_NL, self._eos_id, self._ids[index_NL].astype(np.int64)), padding_NL


def split_pairs(tokens: Tokens, fraction: float) -> tuple[Tokens, Tokens]:
    """The pairs to train on, and a share of them, from the end, to hold out; at least one of each if there are two."""
    count = len(tokens.starts) // 2
    cut = min(max(int(count * (1 - fraction)), 1), max(count - 1, 1))
    if cut == count:
        raise DataError("one pair alone: none can be held out", hint="give more pairs, or set data.val_path")
    middle = int(tokens.starts[2 * cut])
    # The token that ends the last target before the cut is one that the loader adds itself.
    return (
        Tokens(tokens.ids[: middle - 1], tokens.starts[: 2 * cut]),
        Tokens(tokens.ids[middle:], tokens.starts[2 * cut :] - middle),
    )


def _spans(tokens: Tokens) -> tuple[Indices, Indices]:
    """Where each source and target starts, and how long it is: both [pairs, 2]."""
    starts = tokens.starts
    # Between two documents stands the token that ends them.
    stops = np.append(starts[1:] - 1, len(tokens))
    return starts.reshape(-1, 2), (stops - starts).reshape(-1, 2)


__all__ = ["PairLoader", "PairsConfig", "PairsDataset", "split_pairs"]
