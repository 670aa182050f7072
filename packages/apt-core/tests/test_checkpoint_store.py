"""The store: whatever happens to a save or to a file, what is loaded is what was saved, or it is said."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import FILES, listing, make, same
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from apt.checkpoint import manifest
from apt.checkpoint.manifest import SHARDED, seal
from apt.checkpoint.store import MANIFEST, MODEL, STRUCTURE, TENSORS, CheckpointStore
from apt.core.errors import AptWarning, CheckpointError


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """No warning passes a test unless it is asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", AptWarning)
        yield


def test_what_is_saved_is_loaded(store: CheckpointStore) -> None:
    saved = make(1000, val_loss=1.5)
    folder = store.save(saved)
    assert folder == store.folder / "step-00001000"
    assert listing(folder) == sorted(FILES)
    assert listing(store.folder) == ["step-00001000"]
    assert same(store.load(), saved) and same(store.load(1000), saved)
    assert store.steps() == [1000] and store.latest() == 1000 and store.best() == 1000


def test_the_model_file_is_plain_safetensors_under_the_modules_keys(store: CheckpointStore) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    checkpoint = make(1)
    checkpoint.model = model.state_dict()
    weights = load_file(store.save(checkpoint) / MODEL)
    assert weights.keys() == model.state_dict().keys()
    torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)).load_state_dict(weights)
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(store.load_weights()[1][key], value) for key, value in weights.items())


def test_nothing_in_a_checkpoint_is_a_pickle(store: CheckpointStore) -> None:
    folder = store.save(make(1))
    for name in (MANIFEST, STRUCTURE):
        json.loads((folder / name).read_text(), parse_constant=pytest.fail)
    for name in (MODEL, TENSORS):
        load_file(folder / name)


def test_files_may_be_read_by_whom_the_umask_allows(store: CheckpointStore) -> None:
    before = os.umask(0o022)
    try:
        folder = store.save(make(1))
    finally:
        os.umask(before)
    assert {name: oct((folder / name).stat().st_mode & 0o777) for name in FILES} == dict.fromkeys(FILES, "0o644")


def test_loaded_tensors_outlive_and_outvote_the_file(store: CheckpointStore) -> None:
    folder = store.save(make(1))
    _, weights = store.load_weights()
    with open(folder / MODEL, "r+b") as file:
        file.write(b"\xff" * (folder / MODEL).stat().st_size)
    assert torch.equal(weights["embed.weight"], torch.full((2, 2), 1.0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1 / 3, 5])
def test_metrics_come_back_exactly(store: CheckpointStore, value: float) -> None:
    checkpoint = make(1)
    checkpoint.metrics = {"val_loss": value}
    store.save(checkpoint)
    assert repr(store.load().metrics["val_loss"]) == repr(float(value))


def test_what_cannot_be_kept_is_named_and_nothing_is_left(store: CheckpointStore) -> None:
    store.save(make(1))
    broken = make(2)
    broken.plugins["moe"]["router"] = object()
    with pytest.raises(CheckpointError, match=r"plugins\.moe\.router is of type object"):
        store.save(broken)
    broken = make(2)
    broken.model["norm._extra_state"] = {"a": 1}  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"model\.norm\._extra_state is of type dict"):
        store.save(broken)
    assert listing(store.folder) == ["step-00000001"]


# Order, and what is kept


def test_order_is_by_step_not_by_clock(store: CheckpointStore) -> None:
    for step in (9, 10, 100_000_000):
        store.save(make(step))
        store.keep_last = 3
    for age, step in enumerate(store.steps()):
        os.utime(store.folder / f"step-{step:08d}", (age * -1000, age * -1000))
    assert store.steps() == [9, 10, 100_000_000]
    assert store.load().step == store.latest() == 100_000_000


def test_the_newest_and_the_best_are_kept(store: CheckpointStore) -> None:
    for step, loss in [(1, 3.0), (2, 1.0), (3, math.nan), (4, 2.0), (5, -math.inf), (6, 1.0), (7, 4.0)]:
        store.save(make(step, loss))
    assert store.steps() == [2, 6, 7]
    assert store.best() == 2
    store.keep_best = False
    store.save(make(8))
    assert store.steps() == [7, 8]


def test_one_of_each_so_many_steps_is_kept_for_good(store: CheckpointStore) -> None:
    store.keep_last, store.keep_every = 1, 100
    for step in range(30, 420, 30):  # 120 is the first at or after 100, 210 after 200, 300 is 300 itself
        store.save(make(step))
    assert store.steps() == [120, 210, 300, 390]


def test_what_cannot_be_read_just_now_may_be_the_best(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.keep_last = 1
    store.save(make(1, val_loss=1.0))
    store.save(make(2, val_loss=2.0))
    whole = manifest.read_file

    def busy(path: Path) -> bytes:
        if path.parent.name == "step-00000001":
            raise OSError(errno.EIO, "Input/output error")
        return whole(path)

    monkeypatch.setattr(manifest, "read_file", busy)
    store.save(make(3, val_loss=3.0))
    assert 1 in store.steps() and store.best() == 2
    monkeypatch.setattr(manifest, "read_file", whole)
    store.save(make(4, val_loss=4.0))
    assert store.steps() == [1, 4]


@pytest.mark.parametrize(
    "changes",
    [{"epoch": "x"}, {"files": {}}, {"files": {"../x": {"bytes": 1, "sha256": ""}}}, 
     {"metrics": {"val_loss": {"$float": "x"}}},
     {"dropped": 3}],
)  # fmt: skip
def test_a_manifest_that_no_store_has_written(store: CheckpointStore, changes: dict[str, Any]) -> None:
    path = store.save(make(1, val_loss=1.0)) / MANIFEST
    content = json.loads(path.read_bytes())
    del content["sha256"]
    path.write_bytes(seal(content | changes))
    with pytest.raises(CheckpointError, match=r"is damaged|does not name model\.safetensors"):
        store.load(1)
    assert store.best() is None or "files" in changes


def best_of(losses: dict[int, float | None]) -> int | None:
    finite = [(loss, step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
    return min(finite)[1] if finite else None


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.sampled_from([None, math.nan, math.inf, -math.inf, 1.0, 2.0, 3.0])), max_size=8
    ),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([None, 1, 4, 10]),
)
def test_retention_follows_its_definition(
    saves: list[tuple[int, float | None]], keep_last: int, keep_best: bool, keep_every: int | None
) -> None:
    there: dict[int, float | None] = {}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        store = CheckpointStore(folder, keep_last, keep_best, keep_every)
        for step, loss in saves:
            store.save(make(step, loss))
            there[step] = loss
            best = best_of({s: value for s, value in there.items() if s <= step})
            past = sorted(s for s in there if s <= step)
            firsts = (
                {min(s for s in past if s >= multiple) for multiple in range(keep_every, step + 1, keep_every)}
                if keep_every
                else set()
            )
            for old in past[:-keep_last]:
                if not (keep_best and old == best) and old not in firsts:
                    del there[old]
            assert store.steps() == sorted(there)
            assert store.best() == best_of(there)
            assert store.load(step).step == step
            assert all(name.startswith("step-") and "." not in name for name in listing(Path(folder)))


def test_later_steps_are_left_alone_when_the_run_goes_back(store: CheckpointStore) -> None:
    store.keep_last = 1
    store.save(make(10))
    store.save(make(5))
    store.save(make(7))
    assert store.steps() == [7, 10]


def test_one_of_a_later_step_is_not_the_best_of_a_run_that_went_back(store: CheckpointStore) -> None:
    store.keep_last = 1
    store.save(make(10, val_loss=0.5))
    for step, loss in [(3, 1.0), (5, 2.0), (7, 3.0)]:
        store.save(make(step, loss))
    assert store.steps() == [3, 7, 10], "the best of those up to the last, and the last; nothing of what lies ahead"


def test_the_same_step_again_replaces_it(store: CheckpointStore) -> None:
    store.save(make(1))
    store.save(make(2))
    store.save(make(2, tag=1))
    assert listing(store.folder) == ["step-00000001", "step-00000002"]
    assert same(store.load(), make(2, tag=1))


def test_what_dead_runs_left_is_cleared_away(store: CheckpointStore) -> None:
    store.save(make(1))
    (store.folder / "step-00000002.tmp").mkdir()
    (store.folder / "step-00000002.tmp" / MODEL).write_bytes(b"half")
    shutil.copytree(store.folder / "step-00000001", store.folder / "step-00000001.old")
    (store.folder / "notes.txt").write_text("mine")
    assert store.steps() == [1]
    store.save(make(3))
    assert listing(store.folder) == ["notes.txt", "step-00000001", "step-00000003"]


def test_one_that_stepped_aside_is_found_and_put_back(store: CheckpointStore) -> None:
    store.save(make(1))
    os.replace(store.folder / "step-00000001", store.folder / "step-00000001.old")
    assert same(store.load(), make(1))
    store.save(make(2))
    assert listing(store.folder) == ["step-00000001", "step-00000002"]


def test_an_old_one_that_cannot_be_removed_is_named_and_the_save_stands(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.keep_last = 1
    store.save(make(1))

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **options: None if options else refuse(path))
        with pytest.warns(AptWarning, match=r"cannot remove the old checkpoint .*step-00000001: Permission denied"):
            store.save(make(2))
    assert store.load().step == 2 and store.steps() == [2]
    store.save(make(3))
    assert listing(store.folder) == ["step-00000003"]


def test_what_a_link_leads_to_is_left_alone(store: CheckpointStore, tmp_path: Path) -> None:
    elsewhere = tmp_path / "large_disk"
    store.keep_last = 1
    os.rename(store.save(make(1)), elsewhere)
    (store.folder / "step-00000001").symlink_to(elsewhere)
    assert same(store.load(), make(1))
    store.save(make(2))
    assert listing(store.folder) == ["step-00000002"]
    assert listing(elsewhere) == sorted(FILES)


# Damage


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_noticed(store: CheckpointStore, name: str) -> None:
    path = store.save(make(1, val_loss=1.0)) / name
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name):
            store.load(1)
    path.write_bytes(whole)
    assert store.load().step == 1


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["cut", "empty", "longer", "missing", "folder"])
def test_every_other_damage_is_noticed(store: CheckpointStore, name: str, harm: str) -> None:
    store.save(make(1))
    path = store.save(make(2)) / name
    whole = path.read_bytes()
    path.unlink()
    if harm == "folder":
        path.mkdir()
    elif harm != "missing":
        path.write_bytes({"cut": whole[:-1], "empty": b"", "longer": whole + b"\0"}[harm])
    with pytest.raises(CheckpointError) as caught:
        store.load(2)
    assert str(path) in caught.value.message and caught.value.hint and caught.value.exit_code == 2
    with pytest.warns(AptWarning) as told:
        assert same(store.load(), make(1))
    assert len(told) == 1 and str(path) in str(told[0].message) and "step-00000001 instead" in str(told[0].message)


def test_a_file_too_many_is_named(store: CheckpointStore) -> None:
    folder = store.save(make(1))
    (folder / "extra.bin").write_bytes(b"?")
    with pytest.warns(AptWarning, match=r"step-00000001 also holds extra\.bin"):
        assert same(store.load(), make(1))


def test_a_file_of_another_checkpoint_is_noticed(store: CheckpointStore) -> None:
    first, second = store.save(make(1)), store.save(make(2))
    for name in FILES:
        kept = (second / name).read_bytes()
        shutil.copy(first / name, second / name)
        with pytest.raises(CheckpointError):
            store.load(2)
        (second / name).write_bytes(kept)
    os.rename(first, store.folder / "step-00000009")
    with pytest.raises(CheckpointError, match="belongs to step 1"):
        store.load(9)


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "{}", "nul", '{"sha256": NaN}', "[" * 100_000])
def test_a_manifest_that_is_none(store: CheckpointStore, text: str) -> None:
    folder = store.save(make(1, val_loss=1.0))
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="is damaged"):
        store.load(1)
    assert store.best() is None


def test_another_format_is_named(store: CheckpointStore) -> None:
    path = store.save(make(1)) / MANIFEST
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_bytes(seal({**content, "format": SHARDED + 1}))
    with pytest.raises(CheckpointError, match=f"format {SHARDED + 1}"):
        store.load(1)


def test_weights_are_verified_alone(store: CheckpointStore) -> None:
    folder = store.save(make(1))
    (folder / TENSORS).write_bytes(b"")
    step, weights = store.load_weights()
    assert step == 1 and torch.equal(weights["embed.weight"], make(1).model["embed.weight"])
    (folder / MODEL).write_bytes(b"")
    with pytest.raises(CheckpointError, match=MODEL):
        store.load_weights(1)


def test_no_good_checkpoint_at_all(store: CheckpointStore) -> None:
    assert store.steps() == [] and store.latest() is None and store.best() is None
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        store.load()
    for step in (1, 2):
        (store.save(make(step)) / MODEL).unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: .*step-00000002.*step-00000001"):
        store.load_weights()
    with pytest.raises(CheckpointError, match="no checkpoint of step 3") as caught:
        store.load(3)
    assert caught.value.hint == "there are: 1, 2"


def test_a_folder_that_cannot_be_read(store: CheckpointStore) -> None:
    store.folder.parent.mkdir()
    store.folder.write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.load()
    with pytest.raises(CheckpointError, match="cannot write"):
        store.save(make(1))
