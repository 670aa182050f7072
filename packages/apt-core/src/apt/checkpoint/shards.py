"""Tensors that several processes hold in shards, as files: storage for `torch.distributed.checkpoint` (DCP) that is
safetensors and JSON alone.

    model-00001-of-00004.safetensors    what process 1 of 4 held of the weights
    state-00001-of-00004.safetensors    what it held of every other tensor

The header of each file says, as JSON under "shards", of which whole its tensors are parts and where they begin in it:
{name: {"shape": [...], "offsets": [...]}}. A tensor that is not named there is whole. So the files of a checkpoint in
one piece can be read in the same way, whatever shards are asked for: DCP's planner says which rows of which file go
where.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from apt.checkpoint.codec import portable
from apt.checkpoint.durable import sync
from apt.checkpoint.manifest import is_of_weights, parts_in
from apt.core.errors import CheckpointError

WEIGHTS = "model."
"""Stands before the names of weights, where they are among other tensors."""

Like = Callable[[str, torch.Size, torch.dtype], Tensor]
"""Makes a tensor to read into: of the name, the size and the dtype that the checkpoint has."""


def write_shards(tensors: Mapping[str, Tensor], folder: Path, rank: int, size: int) -> list[str]:
    """Write what this process holds, and sync it.

    Args:
        tensors: DTensors, and what else this process alone shall write; names of weights begin with `WEIGHTS`.
        folder: where to.
        rank, size: which process this is, of how many.

    Returns:
        The names of the files.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=True)
    writer = ShardWriter(folder, rank, size)
    results = writer.write_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
    return sorted({result.storage_data for result in results})


def read_shards(folder: Path, files: Iterable[str], like: Like | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU and whole, or in the shards that `like` makes.

    Args:
        folder: the checkpoint's, verified.
        files: its files.

    Raises:
        CheckpointError: a part of a tensor is in none of them.
    """
    reader = ShardReader(folder, files)
    metadata = reader.read_metadata()
    tensors = {}
    for name, known in metadata.state_dict_metadata.items():
        assert isinstance(known, TensorStorageMetadata)
        dtype = known.properties.dtype
        tensors[name] = like(name, known.size, dtype) if like else torch.empty(known.size, dtype=dtype)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(tensors, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
    return tensors


class ShardWriter(StorageWriter):
    """Writes the files of one process. What the whole consists of is for its manifest to say.

    Args:
        folder: where to.
        rank, size: which process this is, of how many.
    """

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self.folder = folder
        self._end = f"-{rank:05d}-of-{size:05d}.safetensors"
        self._is_first = rank == 0

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors: dict[str, dict[str, Tensor]] = {"model": {}, "state": {}}
        shards: dict[str, dict[str, Any]] = {"model": {}, "state": {}}
        results = []
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            assert item.tensor_data is not None
            whole, chunk = item.tensor_data.size, item.tensor_data.chunk
            if not (tensor.numel() or (self._is_first and not whole.numel())):
                continue  # a tensor with fewer rows than there are processes
            key = item.index.fqn
            name, kind = (key.removeprefix(WEIGHTS), "model") if key.startswith(WEIGHTS) else (key, "state")
            tensors[kind][name] = tensor
            if whole != chunk.sizes:
                shards[kind][name] = {"shape": list(whole), "offsets": list(chunk.offsets)}
            results.append(WriteResult(item.index, tensor.nbytes, kind + self._end))
        for kind, parts in tensors.items():
            if parts:
                path = self.folder / (kind + self._end)
                save_file(portable(parts), path, metadata={"format": "pt", "shards": json.dumps(shards[kind])})
                # safetensors makes files that only their owner can read, whatever the umask says.
                path.chmod(self.folder.stat().st_mode & 0o666)
                sync(path)
        return _done(results)

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The files say themselves what is in them."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()


class ShardReader(StorageReader):
    """Reads the files of a checkpoint, of one process or of several.

    Args:
        folder: the checkpoint's.
        files: its files; those that hold no tensors are passed over.
    """

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self.folder = folder
        self.files = sorted(file for file in files if file.endswith(".safetensors"))
        self._homes: dict[MetadataIndex, tuple[str, str]] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the headers of the files say.

        Raises:
            CheckpointError: a part of a tensor is in none of them.
        """
        found: dict[str, TensorStorageMetadata] = {}
        for file in self.files:
            prefix = WEIGHTS if is_of_weights(file) else ""
            with safe_open(self.folder / file, framework="pt") as opened:
                shards = parts_in(opened.metadata())
                for key in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(key)
                    sizes = part.get_shape()
                    shard = shards.get(key, {"shape": sizes, "offsets": [0] * len(sizes)})
                    name, offsets = prefix + key, torch.Size(shard["offsets"])
                    whole = torch.Size(shard["shape"])
                    if name not in found:
                        dtype = (part[:0] if sizes else opened.get_tensor(key)).dtype
                        found[name] = TensorStorageMetadata(TensorProperties(dtype), whole, [])
                    if found[name].size != whole or not _lies_within(offsets, sizes, whole):
                        raise CheckpointError(f"{self.folder / file} is damaged: {key}", hint="load another step")
                    found[name].chunks.append(ChunkStorageMetadata(offsets, torch.Size(sizes)))
                    self._homes[MetadataIndex(name, offsets)] = (file, key)
        for name, known in found.items():
            if sum(prod(chunk.sizes) for chunk in known.chunks) != prod(known.size):
                raise CheckpointError(f"{self.folder} lacks a part of {name}", hint="load another step")
        return Metadata(dict(found))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file = defaultdict(list)
        for item in plan.items:
            file, key = self._homes[item.storage_index]
            by_file[file].append((key, item))
        for file, items in by_file.items():
            with safe_open(self.folder / file, framework="pt") as opened:
                for key, item in items:
                    rows = tuple(slice(a, a + n) for a, n in zip(item.storage_offsets, item.lengths, strict=True))
                    part = opened.get_slice(key)[rows] if rows else opened.get_tensor(key)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        return _done(None)

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """`read_metadata` has found everything."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()


def _lies_within(offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> bool:
    axes = zip(offsets, sizes, shape, strict=True)
    return all(offset >= 0 and offset + size <= whole for offset, size, whole in axes)


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future
