"""A run's folder: where it is made, what lies in it, and how it is found again.

runs/tiny_debug-1/
    profile.yaml          the resolved profile
    plugins.lock.json     the providers in effect
    tokenizer.json
    metrics.jsonl         one record a line
    run.log               with the tracebacks that the console leaves out
    checkpoints/step-00000300/
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from apt.core.errors import HINT, AptWarning, ConfigError, did_you_mean

MAX_SHOWN = 10
"""Runs that a message names."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of one run."""

    path: Path

    @property
    def profile(self) -> Path:
        return self.path / "profile.yaml"

    @property
    def lock(self) -> Path:
        return self.path / "plugins.lock.json"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def holds_a_run(self) -> bool:
        return self.profile.is_file()

    def has_checkpoints(self) -> bool:
        return any(path.suffix != ".tmp" for path in self.checkpoints.glob("step-*"))  # that was never whole


def new_run(output_dir: str | Path, name: str) -> RunFolder:
    """Make the folder of a new run, `NAME-1`, `NAME-2`, ...; two processes at once get two folders.

    Raises:
        ConfigError: the folder cannot be made.
    """
    parent = Path(output_dir)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = max((_number(run, name) for run in parent.iterdir()), default=0) + 1
        while True:
            path = parent / f"{name}-{number}"
            try:
                path.mkdir()
                return RunFolder(path)
            except FileExistsError:
                number += 1
    except OSError as error:
        raise ConfigError(f"cannot make a run folder in {parent}: {error.strerror}", hint="set output_dir") from error


def find_run(run: str | Path | None = None, output_dir: str | Path = "runs", name: str | None = None) -> RunFolder:
    """An existing run.

    Args:
        run: its folder, or the folder's name under `output_dir`; None for the newest one there.
        output_dir: where runs are made.
        name: of which profile, where `run` is None.

    Raises:
        ConfigError: there is none.
    """
    parent = Path(output_dir)
    if run is not None:
        for path in (Path(run), parent / run) if str(run) else ():  # "" is not meant to be the current folder
            if RunFolder(path).holds_a_run():
                return RunFolder(path)
        newest_first = sorted(_runs(parent), key=lambda folder: folder.profile.stat().st_mtime, reverse=True)
        known = [folder.path.name for folder in newest_first]
        near = did_you_mean(str(run), known, cutoff=HINT)
        listed = ", ".join(known[:MAX_SHOWN]) or "none"
        listed += f" and {len(known) - MAX_SHOWN} more" if len(known) > MAX_SHOWN else ""
        hint = f"did you mean {near!r}?" if near else f"runs in {parent}: {listed}"
        if around := next((folder for folder in Path(run).parents if RunFolder(folder).holds_a_run()), None):
            hint = f"name the run that it lies in: {around}"
        raise ConfigError(f"{str(run) or repr('')} is not the folder of a run (it has no profile.yaml)", hint=hint)
    runs = _runs(parent, name)
    if not runs:
        of = f" of profile {name!r}" if name else ""
        raise ConfigError(f"there is no run{of} in {parent}", hint="start one with: apt train --profile tiny_debug")
    # The newest of one profile has the highest number. Between profiles only their clocks can tell.
    runs.sort(key=lambda folder: _number(folder.path, name) if name else folder.profile.stat().st_mtime)
    saved = [folder for folder in runs if folder.has_checkpoints()]
    if saved and saved[-1] != runs[-1]:
        warnings.warn(f"{runs[-1].path} has saved nothing; using {saved[-1].path}", AptWarning, stacklevel=2)
    return (saved or runs)[-1]


def _runs(parent: Path, name: str | None = None) -> list[RunFolder]:
    if not parent.is_dir():
        return []
    folders = [RunFolder(path) for path in sorted(parent.iterdir()) if name is None or _number(path, name)]
    return [folder for folder in folders if folder.holds_a_run()]


def _number(path: Path, name: str) -> int:
    """N of a folder called NAME-N; 0 of any other."""
    match = re.fullmatch(re.escape(name) + r"-(\d+)", path.name)
    return int(match[1]) if match else 0
