"""The folder that a model is saved in: 1.x wrote over what was there, a run is not lost that way."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

from apt.core.errors import AptWarning
from apt.core.runs import RunFolder


def make_way(path: Path) -> None:
    """Have no run in a folder that a model is about to be saved in.

    One that was trained is renamed, `model` to `model-1`, with an AptWarning; one that `save_model` wrote is removed,
    and so is an empty folder. Nothing happens to a folder that holds anything else, or that this process works in.
    """
    run = RunFolder(path)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
    if not run.holds_a_run() or Path.cwd().is_relative_to(path.resolve()):
        return
    if not run.metrics.exists():
        shutil.rmtree(path)
        return
    number = 1
    while (kept := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    os.replace(path, kept)
    warnings.warn(f"{path} held a run; it is {kept} now", AptWarning, stacklevel=3)
