"""Which checkpoints of a run are kept, and how the others go."""

from __future__ import annotations

import errno
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from apt.checkpoint.codec import decode
from apt.checkpoint.manifest import folders_of, read_manifest, readable
from apt.core.errors import AptWarning, CheckpointError


def prune(store: Path, current: int, keep_last: int, keep_best: bool, keep_every: int | None) -> None:
    """Remove the checkpoints of a store that need not be kept, now that the one of step `current` is there. Those of
    later steps are left alone and not counted: the run went back."""
    past = {step: folder for step, folder in sorted(folders_of(store).items()) if step <= current}
    best, unread = best_of(past) if keep_best else (None, set())
    kept = {*list(past)[-keep_last:], *_milestones(past, keep_every), best, *unread}
    for step, folder in past.items():
        if step not in kept:
            remove(folder)
    remove(store / f"step-{current:08d}.old")


def best_of(folders: Mapping[int, Path]) -> tuple[int | None, set[int]]:
    """The best of these checkpoints, and the steps of which the system does not say now what they are: any may be the
    best."""
    losses: dict[int, float] = {}
    unread: set[int] = set()
    for step, folder in sorted(folders.items()):
        try:
            with readable(folder):
                loss = float(decode(read_manifest(folder, step)["metrics"], {}).get("val_loss", math.nan))
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
                unread.add(step)
            continue
        if math.isfinite(loss):
            losses[step] = loss
    return min(losses, key=losses.__getitem__, default=None), unread


def _milestones(steps: Iterable[int], every: int | None) -> list[int]:
    """The first of the ascending `steps` at or after each multiple of `every`, but for the multiple 0. What is the
    first once stays the first, for it is kept."""
    if every is None:
        return []
    firsts: dict[int, int] = {}
    for step in steps:
        firsts.setdefault(step // every, step)
    return [step for multiple, step in firsts.items() if multiple > 0]


def remove(path: Path) -> None:
    """Remove a folder so that it is at no moment half a checkpoint; what cannot be removed is named and stays."""
    doomed = path.with_suffix(".tmp")
    try:
        if path != doomed:
            os.replace(path, doomed)
        if doomed.is_symlink():  # what it leads to is not ours to remove
            doomed.unlink()
        else:
            shutil.rmtree(doomed)
    except OSError as error:
        if error.errno != errno.ENOENT:
            why = error.strerror or error
            warnings.warn(f"cannot remove the old checkpoint {path}: {why}", AptWarning, stacklevel=4)
