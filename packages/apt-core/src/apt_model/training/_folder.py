"""The folder that a model is saved in: what is found there, and what becomes of it."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

from apt.core.errors import AptWarning, CheckpointError
from apt.core.runs import RunFolder
from apt.training.run_lock import only_trainer


def make_way(path: Path) -> None:
    """Have no run in a folder that a model is about to be saved in: 1.x wrote over it, and a run is not lost that way.

    One that was trained is renamed, `model` to `model-1`, with an AptWarning; one that `save_model` wrote is removed,
    and so is an empty folder. Nothing happens to a folder that holds anything else, or that this process works in.

    Raises:
        RunInUseError: another trainer is at work there.
    """
    run = RunFolder(path)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
    if not run.holds_a_run() or Path.cwd().is_relative_to(path.resolve()):
        return
    with only_trainer(path):
        pass  # nobody else works there
    if not run.metrics.exists():
        shutil.rmtree(path)
        return
    number = 1
    while (kept := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    os.replace(path, kept)
    warnings.warn(f"{path} held a run; it is {kept} now", AptWarning, stacklevel=3)


def refuse_weights_of_old(path: Path) -> None:
    """Raise CheckpointError where a folder holds what 1.x saved, and no run."""
    if (path / "model.pt").exists() and not RunFolder(path).holds_a_run():
        raise CheckpointError(
            f"{path} holds a model of 1.x, and its weights fit no model of this version",
            hint="train it again: python -m apt_model train, or see docs/migration.md",
        )
