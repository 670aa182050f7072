"""Checkpoints that several processes write: what is read is what was written, whole or not at all."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import listing, make, same
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from apt.checkpoint import sharded
from apt.checkpoint.codec import portable
from apt.checkpoint.manifest import MANIFEST, read_manifest, seal
from apt.checkpoint.sharded import ShardedStore
from apt.checkpoint.shards import ShardReader, ShardWriter, read_shards, write_shards
from apt.checkpoint.store import CheckpointStore, hashes
from apt.checkpoint.summary import tensors_of
from apt.core.errors import AptWarning, CheckpointError
from apt.core.world import World

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, list[int]], int]:
    """Tensors, where each is cut along its first dimension, and into how many parts."""
    parts = draw(st.integers(1, 4))
    tensors, cuts = {}, {}
    for number in range(draw(st.integers(1, 5))):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        name = draw(st.sampled_from(["model.", "optimizer.state[0].", "plugins.a."])) + str(number)
        tensors[name] = torch.randint(0, 2, shape).to(draw(st.sampled_from(DTYPES)))
        rows = shape[0] if shape else 0
        cuts[name] = [0, *sorted(draw(st.lists(st.integers(0, rows), min_size=parts - 1, max_size=parts - 1))), rows]
    return tensors, cuts, parts


@given(cut_tensors())
@settings(max_examples=40, deadline=None)
def test_parts_add_up_to_what_was_cut(tmp_path_factory: pytest.TempPathFactory, case: Any) -> None:
    tensors, cuts, parts = case
    folder = tmp_path_factory.mktemp("cut")
    files = []
    for part in range(parts):
        for kind in ("model", "state"):
            held, header = {}, {}
            for name, tensor in tensors.items():
                if name.startswith("model.") != (kind == "model"):
                    continue
                start, stop = cuts[name][part : part + 2]
                key = name.removeprefix("model.")
                if tensor.ndim == 0 or not tensor.numel():
                    if part == 0:
                        held[key] = tensor
                elif stop > start:
                    held[key] = tensor[start:stop].clone()
                    header[key] = {"shape": list(tensor.shape), "offsets": [start] + [0] * (tensor.ndim - 1)}
            files.append(f"{kind}-{part:05d}-of-{parts:05d}.safetensors")
            save_file(held, folder / files[-1], metadata={"shards": json.dumps(header)})
    found = read_shards(folder, files)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    shapes = {shape.name: shape.shape for shape in tensors_of(folder)}
    assert shapes == {n.removeprefix("model."): tuple(t.shape) for n, t in tensors.items() if n.startswith("model.")}


def test_what_one_process_alone_writes_is_read_as_it_was(tmp_path: Path) -> None:
    tensors = {
        "model.a": torch.randn(3, 2),
        "rng.torch": torch.arange(4),
        "extra.n": torch.tensor(7),
        "x": torch.ones(0),
    }
    files = write_shards(tensors, tmp_path, 0, 3)
    assert files == ["model-00000-of-00003.safetensors", "state-00000-of-00003.safetensors"] == listing(tmp_path)
    with safe_open(tmp_path / files[0], framework="pt") as file:
        assert list(file.keys()) == ["a"], "as in the file of a single process"
    found = read_shards(tmp_path, files)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    halved = read_shards(tmp_path, files, lambda name, size, dtype: torch.empty(size, dtype=torch.float64))
    assert halved["model.a"].dtype == torch.float64, "read into what is given"
    assert ShardWriter.validate_checkpoint_id(tmp_path) and not ShardReader.validate_checkpoint_id(tmp_path / "none")


def test_a_part_that_is_in_no_file_is_noticed(tmp_path: Path) -> None:
    header = {"shards": json.dumps({"a": {"shape": [4, 2], "offsets": [2, 0]}})}
    save_file({"a": torch.ones(2, 2)}, tmp_path / "model-00001-of-00002.safetensors", metadata=header)
    with pytest.raises(CheckpointError, match=r"lacks a part of model\.a"):
        read_shards(tmp_path, ["model-00001-of-00002.safetensors"])


# Several processes, each a thread


class Notes(World):
    """A world whose store is a dict."""

    def __init__(self, rank: int, size: int, notes: dict[str, str]) -> None:
        super().__init__(rank, size)
        self.notes = notes

    def tell(self, what: str, message: Any) -> None:
        self.notes[what] = json.dumps(message)

    def told(self, what: str) -> Any:
        return json.loads(self.notes[what]) if what in self.notes else None


class Store(ShardedStore):
    """What a process keeps of a tensor is its own: as names, where a test has no shards."""

    def _kept(self, tensors: Mapping[str, Tensor], where: str, copy: bool) -> dict[str, Tensor]:
        end = f" of {self._world.rank}" if self._world.rank else ""
        return {name + end: tensor for name, tensor in portable(tensors, where, copy=copy).items()}


@pytest.fixture
def stores(tmp_path: Path) -> list[Store]:
    notes: dict[str, str] = {}
    return [Store(tmp_path / "checkpoints", 3, world=Notes(rank, 3, notes), parameters={}) for rank in range(3)]


def save(stores: list[Store], step: int) -> list[str]:
    """Save in all of them; what each raises, or ""."""
    said = [""] * len(stores)

    def one(rank: int) -> None:
        try:
            stores[rank].save(make(step))
        except CheckpointError as error:
            said[rank] = error.message

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(stores))]
    random.Random(step).shuffle(threads)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return said


def test_each_process_writes_its_own_and_the_manifest_holds_all(stores: list[Store]) -> None:
    for step in (1, 2, 3, 4):
        assert save(stores, step) == ["", "", ""]
    folder = stores[0].folder
    assert listing(folder) == ["step-00000002", "step-00000003", "step-00000004"], "rotated once, by process 0"
    newest = folder / "step-00000004"
    manifest = read_manifest(newest, 4)
    files = [f"{kind}-{rank:05d}-of-00003.safetensors" for kind in ("model", "state") for rank in range(3)]
    assert sorted(manifest["files"]) == sorted([*files, "state.json"])
    assert listing(newest) == sorted([*files, "state.json", MANIFEST])
    weights = CheckpointStore(folder).load_weights(4)[1]
    assert torch.equal(weights["embed.weight of 2"], weights["embed.weight"])


def test_in_one_piece_it_is_the_checkpoint_that_it_was(stores: list[Store], tmp_path: Path) -> None:
    alone = [ShardedStore(tmp_path / "alone", world=Notes(0, 1, {}), parameters={})]
    assert save(alone, 5) == [""]  # type: ignore[arg-type]
    read = CheckpointStore(tmp_path / "alone").load()
    assert same(read, make(5))
    CheckpointStore(tmp_path / "alone").save(read)
    assert read_manifest(tmp_path / "alone" / "step-00000005", 5)["format"] == 1
    assert same(CheckpointStore(tmp_path / "alone").load(), make(5))


def test_a_damaged_file_of_any_process_is_passed_over_with_its_checkpoint(stores: list[Store]) -> None:
    save(stores, 1)
    save(stores, 2)
    for file in ("model-00001-of-00003.safetensors", "state-00002-of-00003.safetensors", "state.json"):
        path = stores[0].folder / "step-00000002" / file
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]):
            path.write_bytes(damaged)
            with pytest.warns(AptWarning, match=f"{file} is damaged"):
                assert CheckpointStore(stores[0].folder).load().step == 1
        path.write_bytes(whole)
    assert CheckpointStore(stores[0].folder).load().step == 2


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_fails_in_one_process_fails_in_all_and_leaves_the_others_checkpoint(
    stores: list[Store], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    save(stores, 1)
    write = sharded.write_shards

    def fail(tensors: Any, folder: Path, own: int, size: int) -> list[str]:
        if own == rank:
            raise OSError(28, "No space left on device")
        return write(tensors, folder, own, size)

    monkeypatch.setattr(sharded, "write_shards", fail)
    said = save(stores, 2)
    assert all("step-00000002: the disk is full" in text for text in said), said
    assert listing(stores[0].folder) == ["step-00000001"]
    monkeypatch.undo()
    assert save(stores, 2) == ["", "", ""]


def test_what_process_0_cannot_begin_the_others_do_not_wait_for(stores: list[Store]) -> None:
    stores[0].folder.write_text("no folder")
    said = save(stores, 1)
    assert all("cannot write" in text for text in said), said


def test_who_waits_for_one_that_is_gone_gives_up(stores: list[Store]) -> None:
    threading.Timer(0.2, lambda: [store.give_up() for store in stores[:2]]).start()
    said = save(stores[:2], 1)
    assert all("another process of the run is gone" in text for text in said), said
    assert listing(stores[0].folder) == []


def test_a_folder_that_is_not_the_same_one_everywhere_is_named(stores: list[Store], tmp_path: Path) -> None:
    class Elsewhere(Notes):
        def gather(self, message: Any) -> list[Any]:
            return [1, None]

    store = Store(tmp_path / "other", world=Elsewhere(1, 2, {}), parameters={})
    with pytest.raises(CheckpointError, match="process 1 finds no checkpoint of step 1"):
        store.load()


LIES: list[Any] = [
    *({"offsets": lie} for lie in ([3, 0], [-1, 0], [0], [2, "a"], 7, None, {}, [2**70, 0], [0.5, 0], [[2], 0])),
    *({"shape": lie} for lie in ([2**62, 2], [2**70, 2], [-4, 2], [4], [4, 2, 1], [4, "a"], "42", None, {}, [0, 0])),
    None, [], 7, "a",
]  # fmt: skip


@pytest.mark.parametrize("lie", [{}, *LIES])
def test_a_header_that_lies_is_damage(tmp_path: Path, stores: list[Store], lie: Any) -> None:
    save(stores, 1)
    folder = stores[0].folder / "step-00000001"
    halves = torch.arange(8.0).view(4, 2).split(2)
    files = [f"model-{rank:05d}-of-00003.safetensors" for rank in (0, 1)]
    for rank, file in enumerate(files):
        part: Any = {"shape": [4, 2], "offsets": [2 * rank, 0]}
        if rank == 1:
            part = part | lie if isinstance(lie, dict) else lie
        save_file({"cut": halves[rank].clone()}, folder / file, metadata={"shards": json.dumps({"cut": part})})
    manifest = read_manifest(folder, 1)
    manifest["files"] |= hashes(folder, files)
    (folder / MANIFEST).write_bytes(seal(manifest))
    if lie == {}:  # the truth
        assert torch.equal(CheckpointStore(stores[0].folder).load(1).model["cut"], torch.cat(halves))
        return
    with pytest.raises(CheckpointError, match=r"damaged|lacks a part"):
        CheckpointStore(stores[0].folder).load(1)
