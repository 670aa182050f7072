"""What the trainers that are compared have in common: the task, the order that each is given, and how it is watched."""

from __future__ import annotations

import hashlib
import mmap
import os
import signal
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

TEXT = "".join(f"{n} green bottles hanging on the wall\n" for n in range(24))
STEPS, EVERY, KEEP = 12, 2, 2
"""Steps of a whole run, steps between checkpoints, checkpoints kept."""
EPOCH = 6
"""Steps of an epoch."""
BATCH, BLOCK = 8, 16
DROPOUT, LEARNING_RATE, SEED = 0.1, 1e-2, 1


@dataclass(frozen=True)
class Order:
    """How a training is to be run; whether it begins or goes on, the trainer sees by what there is.

    Attributes:
        every: steps between checkpoints.
        until: stop after this step, saved, by the trainer's own means.
        nan_at: the loss of this step, from 0, is NaN.
        sigterm_at: SIGTERM comes when so many steps are done, and what comes after takes half a second a step.
        offer: which of the trainer's `offers` is taken up; "" for none.
        by_hand: go on from this checkpoint, which someone has chosen.
        plain: without dropout, and without shuffling.
    """

    every: int = EVERY
    until: int | None = None
    nan_at: int | None = None
    sigterm_at: int | None = None
    offer: str = ""
    by_hand: Path | None = None
    plain: bool = False

    @property
    def dropout(self) -> float:
        return 0.0 if self.plain else DROPOUT


class Peer(Protocol):
    """One of the trainers."""

    name: str
    offers: frozenset[str]
    """Of "saving at a signal", "an early stop", "checks for debugging" and "saving in line", where that is not how it
    comes: what its documentation has besides."""

    def versions(self) -> dict[str, str]: ...

    def train(self, run: Path, order: Order, watch: Watch) -> None:
        """Begin a run in a folder, or go on with the one there, as the documentation says, to its end."""

    def checkpoints(self, run: Path) -> list[Path]:
        """What someone could go on from by hand, newest first."""

    def kept(self, run: Path) -> dict[int, Mapping[str, Tensor]]:
        """{step: weights} of the checkpoints that a run has kept, in no order."""


class Watch:
    """Memory that a training shares with whoever started it: how far it has come, also when it is killed."""

    _LAYOUT = struct.Struct("=qq?32s")

    def __init__(self, order: Order) -> None:
        self.order = order
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.first, self.done, self.finite, self.end = -1, -1, False, ""

    def begins(self, step: int) -> None:
        """The training begins, or goes on, with so many steps done."""
        self.first = self.done = step
        self._share()

    def poisoned(self, step: int) -> bool:
        """Whether the loss of this step is to be NaN."""
        return step == self.order.nan_at

    def did(self, step: int) -> None:
        """So many steps are done."""
        self.done = step
        self._share()
        if self.order.sigterm_at is not None:
            if step == self.order.sigterm_at:
                signal.raise_signal(signal.SIGTERM)
            if step >= self.order.sigterm_at:
                time.sleep(0.5)

    def ends(self, *states: Any) -> None:
        """The training has come to its end, with these weights and moments."""
        tensors = [tensor.detach() for state in states for tensor in _tensors(state)]
        self.finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
        whole = b"".join(
            tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in map(torch.atleast_1d, tensors)
        )
        self.end = hashlib.sha256(whole).hexdigest()
        self._share()

    def _share(self) -> None:
        packed = self._LAYOUT.pack(self.first, self.done, self.finite, bytes.fromhex(self.end))
        self._memory[: len(packed)] = packed

    def read(self) -> None:
        """Take over what the training's process has noted."""
        first, done, finite, end = self._LAYOUT.unpack(self._memory[: self._LAYOUT.size])
        self.first, self.done, self.finite, self.end = first, done, finite, end.hex() if any(end) else ""


def _tensors(state: Any) -> Iterator[Tensor]:
    """Every tensor of nested dicts and lists, in their order."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _tensors(value)


def windows() -> Tensor:
    """[EPOCH * BATCH, BLOCK + 1] int64: an epoch of the text's characters."""
    letters = {letter: at for at, letter in enumerate(sorted(set(TEXT)))}
    ids = torch.tensor([letters[letter] for letter in TEXT])
    count = EPOCH * BATCH
    starts = torch.linspace(0, len(ids) - BLOCK - 1, count).long()
    return torch.stack([ids[start : start + BLOCK + 1] for start in starts])


def letters() -> int:
    return len(set(TEXT))


def quiet(file: Path) -> None:
    """Send what this process prints, from wherever, to a file."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
