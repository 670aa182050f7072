"""The store of a run whose processes hold a shard of the model each: every process writes its own, in its own thread.

Process 0 does what a store does; in place of writing everything it writes its part and waits until the others have
written theirs. They talk through the run's key-value store, which any thread may use, and never through what carries
the gradients:

    "save"       from process 0: {"number", "folder"} once there is one to write to, {"number", "outcome"} at the end
    "saved R"    from process R: {"number", "files"}, what the manifest is to say of its files; or {"number", "error"}
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from apt.checkpoint.codec import decode, portable
from apt.checkpoint.durable import write
from apt.checkpoint.manifest import SHARDED, STRUCTURE, read_manifest, verify
from apt.checkpoint.shards import WEIGHTS, Like, write_shards
from apt.checkpoint.store import Checkpoint, CheckpointStore, Snapshot, explained, hashes, read_checkpoint
from apt.core.errors import CheckpointError
from apt.core.world import World

POLL_SECONDS = 0.01


class ShardedStore(CheckpointStore):
    """The checkpoints of one run. All its processes save together, and load together.

    Args:
        folder, *keep: as those of `CheckpointStore`.
        world: the processes.
        parameters: {name: DTensor} of the model: what is loaded is sharded as they are.
    """

    format = SHARDED

    def __init__(self, folder: Path, *keep: Any, world: World, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(folder, *keep)
        self._world = world
        self._parameters = dict(parameters)
        self._given_up = Event()
        self.number = 0
        """How many saves have begun."""

    def snapshot(self, checkpoint: Checkpoint, *, copy: bool = False) -> Snapshot:
        self.number += 1
        return super().snapshot(checkpoint, copy=copy)

    def write(self, snapshot: Snapshot) -> Path:
        step = snapshot.facts["step"]
        if not self._world.is_first:
            return self._write_beside(snapshot, self.folder / f"step-{step:08d}")
        outcome = "it was interrupted"
        try:
            folder = super().write(snapshot)
            outcome = ""
            return folder
        except CheckpointError as error:
            outcome = error.message
            raise
        finally:
            self._world.tell("save", {"number": self.number, "folder": None, "outcome": outcome})

    def load(self, step: int | None = None) -> Checkpoint:
        """As that of `CheckpointStore`; weights and moments are in shards. Process 0 verifies for all."""
        chosen = self._first_good(step, _verified) if self._world.is_first else None
        step = int(self._world.gather(chosen)[0])
        folder = self._folders().get(step)
        if folder is None:
            raise CheckpointError(
                f"process {self._world.rank} finds no checkpoint of step {step} in {self.folder}, and process 0 does",
                hint="the run's folder must be the same one on every machine",
            )
        return read_checkpoint(folder, read_manifest(folder, step), self._like)

    def give_up(self) -> None:
        """A save that is on its way waits for the other processes no more: one is gone."""
        self._given_up.set()

    def _kept(self, tensors: Mapping[str, Tensor], where: str, copy: bool) -> dict[str, Tensor]:
        shards = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
        kept: dict[str, Tensor] = {name: shard.detach().to("cpu", copy=copy) for name, shard in shards.items()}
        if self._world.is_first:  # what every process holds
            kept |= portable({name: x for name, x in tensors.items() if name not in shards}, where, copy=copy)
        return kept

    def _write_files(self, folder: Path, snapshot: Snapshot) -> dict[str, Any]:
        self._world.tell("save", {"number": self.number, "folder": folder.name})
        try:
            write(folder / STRUCTURE, snapshot.structure)
            files = hashes(folder, [STRUCTURE, *self._write_own(folder, snapshot)])
        finally:  # the folder stays until nobody writes to it any more
            said = [self._await(f"saved {rank}", self._is_of_this_save) for rank in range(1, self._world.size)]
        for other in said:
            if "error" in other:
                raise CheckpointError(other["error"], hint=other["hint"])
            files |= other["files"]
        return files

    def _write_beside(self, snapshot: Snapshot, final: Path) -> Path:
        """What a process other than the first does of a save."""
        said = self._await("save", self._has_begun)
        if said.get("folder"):
            report: dict[str, Any] = {"error": f"{final}: process {self._world.rank} could not write it", "hint": None}
            try:
                with explained(final, snapshot.nbytes):
                    folder = self.folder / said["folder"]
                    report = {"files": hashes(folder, self._write_own(folder, snapshot))}
            except CheckpointError as error:
                report = {"error": error.message, "hint": error.hint}
                raise
            finally:
                self._world.tell(f"saved {self._world.rank}", {"number": self.number, **report})
            said = self._await("save", self._has_ended)
        if said.get("outcome"):
            raise CheckpointError(said["outcome"], hint="see what process 0 says")
        return final

    def _write_own(self, folder: Path, snapshot: Snapshot) -> list[str]:
        tensors = {WEIGHTS + name: weight for name, weight in snapshot.weights.items()} | snapshot.tensors
        return write_shards(tensors, folder, self._world.rank, self._world.size)

    def _is_of_this_save(self, said: Mapping[str, Any]) -> bool:
        return bool(said["number"] == self.number)

    def _has_begun(self, said: Mapping[str, Any]) -> bool:
        return bool(said["number"] >= self.number)

    def _has_ended(self, said: Mapping[str, Any]) -> bool:
        # Process 0 begins another save only after one that went well.
        return "outcome" in said if said["number"] == self.number else self._has_begun(said)

    def _await(self, what: str, is_it: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any]:
        """What was told, as soon as it is what is waited for."""
        while not self._given_up.is_set():
            said = self._world.told(what)
            if said is not None and is_it(said):
                return dict(said)
            time.sleep(POLL_SECONDS)
        raise CheckpointError(
            f"{self.folder}: a checkpoint was not finished: another process of the run is gone",
            hint="what was saved before is kept",
        )

    def _like(self, structures: Mapping[str, Any]) -> Like:
        """Makes shards for what belongs to a parameter, under whatever name, and whole tensors for the rest."""
        optimizer: Any = decode(structures["optimizer"], _Names())
        owners = {WEIGHTS + name: parameter for name, parameter in self._parameters.items()}
        for group in optimizer["param_groups"]:
            for index, name in zip(group["params"], group["param_names"], strict=True):
                if name in self._parameters:
                    state = optimizer["state"].get(index, {})
                    owners |= {key: self._parameters[name] for key in state.values() if isinstance(key, str)}

        def like(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
            owner = owners.get(name)
            if owner is None or owner.size() != size:
                return torch.empty(size, dtype=dtype)
            return torch.empty_like(owner, dtype=dtype, requires_grad=False)

        return like


class _Names(dict[str, Any]):
    """Stands for tensors whose names alone matter."""

    def __missing__(self, name: str) -> str:
        return name


def _verified(folder: Path, step: int) -> int:
    verify(folder, step)
    return step
