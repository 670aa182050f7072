"""The store: a folder of checkpoints, each of them complete and verified, or not there.

A checkpoint is a folder `step-00001000` of four files:

    model.safetensors   the weights, under the keys of the module's state_dict
    state.safetensors   every other tensor: of the optimizer, the generators, the plugins
    state.json          the structure of those states, and what in them is no tensor (see the codec)
    manifest.json       where the run was, its metrics, and size and SHA-256 of every file; it seals itself

Where several processes hold a model in shards, each writes files of its own in place of the first two: `ShardedStore`.

It is written as `step-00001000.tmp`, synced, read back and compared with its hashes, and only then renamed. Where a
checkpoint of that step exists already, it steps aside as `step-00001000.old` for the instant between two renames, and
is found under that name if the run dies just then. At whatever moment a run dies, what it saved before is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from apt.checkpoint.averages import averages
from apt.checkpoint.codec import decode, encode, portable, split
from apt.checkpoint.durable import cannot_write, make_folder, sha256, sync, system_code, write
from apt.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    MODEL,
    STRUCTURE,
    TENSORS,
    folders_of,
    is_of_weights,
    readable,
    seal,
    verify,
)  # fmt: skip
from apt.checkpoint.retention import best_of, prune, remove
from apt.core.errors import AptWarning, CheckpointError
from apt.core.world import own_part

if TYPE_CHECKING:
    from apt.checkpoint.shards import Like as LikeTensor

    Like = Callable[[Mapping[str, Any]], LikeTensor]

T = TypeVar("T")


@dataclass(slots=True)
class Checkpoint:
    """All that a run needs in order to go on as if it had never stopped. A *state* is what the codec can keep."""

    step: int
    """Optimizer steps done: the index of the next one."""
    epoch: int
    batch_index: int
    """Batches of this epoch that are done: the position in the data."""
    model: dict[str, Tensor]
    """The module's state_dict. Tensors that share memory are kept once each."""
    optimizer: Any
    """State: the optimizer's state_dict."""
    rng: Any
    """State: what `rng_state` returns."""
    extra: Any = field(default_factory=dict)
    """State: the trainer's and the schedule's own."""
    plugins: dict[str, Any] = field(default_factory=dict)
    """{plugin: state}: what each plugin's `on_checkpoint_save` returned."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last evaluation's; "val_loss" decides which checkpoint is the best."""
    dropped: list[str] = field(default_factory=list)
    """The effects that the run went on without, one sentence each."""

    @property
    def nbytes(self) -> int:
        """What its weights and moments take in this process's memory, about."""
        moments = [value for state in self.optimizer["state"].values() for value in state.values()]
        tensors = [tensor for tensor in (*self.model.values(), *moments) if isinstance(tensor, Tensor)]
        return sum(own_part(tensor).nbytes for tensor in tensors)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A checkpoint as it will stand in its files."""

    facts: dict[str, Any]
    """What the manifest says, but for the files."""
    structure: bytes
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes on the disk, about."""
        return len(self.structure) + sum(t.nbytes for t in (*self.weights.values(), *self.tensors.values()))


class CheckpointStore:
    """The checkpoints of one run. One process at a time saves to it.

    Args:
        folder: where the checkpoints lie; made at the first save.
        keep_last: how many of the newest are kept, at least 1.
        keep_best: whether the one with the lowest finite `metrics["val_loss"]` is kept as well.
        keep_every: the first one at or after each multiple of so many steps is kept as well; None for none of them.
    """

    format = FORMAT

    def __init__(
        self, folder: Path | str, keep_last: int = 2, keep_best: bool = True, keep_every: int | None = None
    ) -> None:
        assert keep_last >= 1 and (keep_every is None or keep_every >= 1)
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.keep_every = keep_every

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, then remove those that need not be kept; return its folder.

        One of the same step is replaced. Those of later steps (the run went back) are left alone and not counted. If
        anything fails, or is interrupted, nothing is left of the new checkpoint and the others stay.

        Raises:
            CheckpointError: it cannot be written (a full disk, no permission, ...), the disk does not give back what
                was written, or a state holds what a checkpoint cannot keep.
        """
        return self.write(self.snapshot(checkpoint))

    def snapshot(self, checkpoint: Checkpoint, *, copy: bool = False) -> Snapshot:
        """What `write` needs of a checkpoint.

        Args:
            copy: whether its tensors shall be copies; if not, write it before the run goes on.

        Raises:
            CheckpointError: a state holds what a checkpoint cannot keep.
        """
        states = {name: getattr(checkpoint, name) for name in ("optimizer", "rng", "extra", "plugins")}
        structure, tensors = _split_states(states)
        weights = self._kept(checkpoint.model, "model.", copy)
        return Snapshot(_facts(checkpoint, self.format), structure, weights, self._kept(tensors, "", copy))

    def write(self, snapshot: Snapshot) -> Path:
        """`save` of what `snapshot` returned, whose tensors may be those of a run that stands still."""
        step = snapshot.facts["step"]
        final = self.folder / f"step-{step:08d}"
        with explained(final, snapshot.nbytes):
            make_folder(self.folder)
            self._tidy()
            with _temporary(final.with_name(final.name + ".tmp")) as temporary:
                files = self._write_files(temporary, snapshot)
                write(temporary / MANIFEST, seal({**snapshot.facts, "files": files}))
                sync(temporary)
                try:
                    verify(temporary, step)
                except CheckpointError as error:
                    raise CheckpointError(f"{final} was not saved: {error.message}", hint="check the disk") from error
                if final.exists():
                    os.replace(final, final.with_name(final.name + ".old"))
                os.replace(temporary, final)
            sync(self.folder)
        prune(self.folder, step, self.keep_last, self.keep_best, self.keep_every)
        return final

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, in ascending order; whether they are whole is not looked at."""
        return sorted(self._folders())

    def latest(self) -> int | None:
        """The last of `steps`, or None."""
        return max(self._folders(), default=None)

    def best(self) -> int | None:
        """The step with the lowest finite `metrics["val_loss"]`, the first of several; None if there is none."""
        return best_of(self._folders())[0]

    def load(self, step: int | None = None) -> Checkpoint:
        """Read a checkpoint, every file of it verified. Its tensors are on the CPU, in memory of their own.

        Args:
            step: which one; None for the newest that is whole, with an AptWarning that names what is wrong with those
                that had to be passed over.

        Raises:
            CheckpointError: there is none, none is whole, or that of `step` is not.
        """
        return self._first_good(step, _load)

    def load_weights(self, step: int | None = None) -> tuple[int, dict[str, Tensor]]:
        """Read a checkpoint's weights alone, verified; return its step and the weights. For the rest as `load`."""
        return self._first_good(step, _load_weights)

    def load_average(self, name: str, step: int | None = None) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
        """Read a checkpoint's weights and an average of them; return its step and both. For the rest as `load`.

        A parameter that was never trained has none: the average lacks it.

        Raises:
            CheckpointError: as `load`, or the checkpoint holds no average of that name.
        """
        saved, weights, optimizer = self._first_good(step, _load_with_optimizer)
        found = averages(optimizer, weights)
        if name not in found:
            held = f"it holds {', '.join(found)}" if found else "this run keeps no averages of its weights"
            raise CheckpointError(
                f"the checkpoint of step {saved} holds no state {name!r}: {held}",
                hint="name one that it holds, or leave --state out" if found else "leave --state out",
            )
        return saved, weights, found[name]

    def _first_good(self, step: int | None, read: Callable[[Path, int], T]) -> T:
        folders = self._folders()
        if step is not None:
            if step not in folders:
                there = ", ".join(map(str, sorted(folders))) or "none"
                raise CheckpointError(f"{self.folder} has no checkpoint of step {step}", hint=f"there are: {there}")
            return read(folders[step], step)
        damage: list[str] = []
        for newest in sorted(folders, reverse=True):
            try:
                found = read(folders[newest], newest)
            except CheckpointError as error:
                damage.append(error.message)
                continue
            if damage:
                warnings.warn(f"{'; '.join(damage)}; using {folders[newest]} instead", AptWarning, stacklevel=3)
            return found
        if damage:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole: {'; '.join(damage)}",
                hint="restore one from a copy, or train again",
            )
        raise CheckpointError(
            f"there is no checkpoint in {self.folder}",
            hint="it has saved nothing: start a new run, or name another one",
        )

    def _folders(self) -> dict[int, Path]:
        return folders_of(self.folder)

    def _kept(self, tensors: Mapping[str, Tensor], where: str, copy: bool) -> dict[str, Tensor]:
        """What of these tensors this process writes, as it can be written."""
        return portable(tensors, where, copy=copy)

    def _write_files(self, folder: Path, snapshot: Snapshot) -> dict[str, Any]:
        """Write everything but the manifest; returns what that is to say of it."""
        write(folder / STRUCTURE, snapshot.structure)
        _write_tensors(folder / MODEL, snapshot.weights)
        _write_tensors(folder / TENSORS, snapshot.tensors)
        return hashes(folder, (MODEL, TENSORS, STRUCTURE))

    def _tidy(self) -> None:
        """Clear away what a run that died has left."""
        for path in self.folder.glob("step-*.old"):
            final = path.with_suffix("")
            if final.exists():
                remove(path)
            else:
                os.replace(path, final)
        for path in self.folder.glob("step-*.tmp"):
            remove(path)


def _split_states(states: dict[str, Any]) -> tuple[bytes, dict[str, Tensor]]:
    structures: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, state in states.items():
        structures[name], own = split(state, name)
        tensors |= own
    return json.dumps(structures, allow_nan=False).encode(), tensors


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    # safetensors makes files that only their owner can read, whatever the umask says.
    shutil.copymode(path.with_name(STRUCTURE), path)
    sync(path)


def _facts(checkpoint: Checkpoint, form: int) -> dict[str, Any]:
    return {
        "format": form,
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
        "batch_index": checkpoint.batch_index,
        "metrics": encode({name: float(value) for name, value in checkpoint.metrics.items()}, "metrics")[0],
        "dropped": list(checkpoint.dropped),
    }


def hashes(folder: Path, files: Iterable[str]) -> dict[str, Any]:
    """What a manifest says of files."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in files}


def read_checkpoint(folder: Path, manifest: Mapping[str, Any], like: Like | None = None) -> Checkpoint:
    """A checkpoint that was verified.

    Args:
        like: makes the tensors to read into, given how its states are built; see `read_shards`. None: each is read as a
            whole.
    """
    with readable(folder):
        states = json.loads((folder / STRUCTURE).read_bytes())
        if like is None and manifest["format"] == FORMAT:
            model, tensors = _read_tensors(folder / MODEL), _read_tensors(folder / TENSORS)
        else:
            from apt.checkpoint.shards import WEIGHTS, read_shards

            tensors = read_shards(folder, manifest["files"], like(states) if like is not None else None)
            names = [name for name in tensors if name.startswith(WEIGHTS)]
            model = {name.removeprefix(WEIGHTS): tensors.pop(name) for name in names}
        return Checkpoint(
            step=manifest["step"],
            epoch=manifest["epoch"],
            batch_index=manifest["batch_index"],
            model=model,
            metrics=decode(manifest["metrics"], {}),
            dropped=manifest["dropped"],
            **{name: decode(structure, tensors) for name, structure in states.items()},
        )


def _load(folder: Path, step: int) -> Checkpoint:
    return read_checkpoint(folder, verify(folder, step))


def _load_weights(folder: Path, step: int) -> tuple[int, dict[str, Tensor]]:
    manifest = verify(folder, step, weights_only=True)
    with readable(folder):
        if manifest["format"] == FORMAT:
            return step, _read_tensors(folder / MODEL)
        from apt.checkpoint.shards import WEIGHTS, read_shards

        weights = read_shards(folder, filter(is_of_weights, manifest["files"]))
        return step, {name.removeprefix(WEIGHTS): weight for name, weight in weights.items()}


def _load_with_optimizer(folder: Path, step: int) -> tuple[int, dict[str, Tensor], Any]:
    checkpoint = _load(folder, step)
    return step, checkpoint.model, checkpoint.optimizer


def _read_tensors(path: Path) -> dict[str, Tensor]:
    # What load_file returns are windows on the file: unaligned, and at the mercy of whoever writes to it.
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new folder that is gone at the end, unless it has been renamed."""
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def explained(path: Path, needed: int) -> Iterator[None]:
    """Turn what the system says while `path` is written into a CheckpointError; safetensors tells it in words alone."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not isinstance(error, OSError) and system_code(error) is None:
            raise
        raise cannot_write(error, path, needed) from error
