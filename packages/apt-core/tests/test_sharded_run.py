"""A run that two processes have saved in shards, in the hands of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import distributed_workers as workers
import pytest
import torch
from distributed_workers import plain_config, store
from fixture_types import RunApt

from apt.checkpoint.manifest import folders_of, read_manifest
from apt.core.runs import RunFolder
from apt.training.run_lock import only_trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    config = plain_config(folder, checkpoint={"every": 3})
    config["hardware"]["parallel"] = "fsdp"
    config["training"]["max_epochs"] = 1
    several = workers.run(2, config, folder / "results")
    assert [process["error"] for process in several] == [None, None], several
    return Path(several[0]["run"])


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> str:
    """A copy of it, with checkpoints of steps 3 and 6."""
    return str(shutil.copytree(trained, tmp_path / "run"))


def forms(run: str) -> dict[int, int]:
    folders = folders_of(RunFolder(Path(run)).checkpoints)
    return {step: read_manifest(folder, step)["format"] for step, folder in sorted(folders.items())}


def test_it_is_used_as_any_other_and_put_in_one_piece_by_one_command(run: str, run_apt: RunApt) -> None:
    def uses() -> list[str]:
        commands = (
            ("generate", run, "--prompt", "5 green", "--max-tokens", "8", "--seed", "1"),
            ("eval", run, "--json"),
            ("inspect", run, "--json"),
        )
        results = [run_apt(*command) for command in commands]
        assert [(result.code, result.err) for result in results] == [(0, "")] * 3
        inspected = json.loads(results[2].out)
        assert [checkpoint["whole"] for checkpoint in inspected["checkpoints"]] == [True, True]
        return [results[0].out, results[1].out, json.dumps([inspected["tensors"], inspected["numbers"]])]

    before, checkpoint = uses(), store(run).load()
    assert forms(run) == {3: 2, 6: 2}
    told = run_apt("consolidate", run)
    assert told.code == 0 and told.out.count("in one piece") == 2, told
    assert forms(run) == {3: 1, 6: 1}
    assert uses() == before
    after = store(run).load()
    assert all(torch.equal(after.model[name], weight) for name, weight in checkpoint.model.items())
    for index, state in checkpoint.optimizer["state"].items():
        for name, value in state.items():
            assert torch.equal(after.optimizer["state"][index][name], value)
    assert (after.rng["numpy"], after.extra, after.metrics) == (
        checkpoint.rng["numpy"],
        checkpoint.extra,
        checkpoint.metrics,
    )
    again = run_apt("consolidate", run)
    assert again.code == 0 and again.out == f"Nothing to do: no checkpoint of {run} is in shards\n"


def test_what_is_damaged_is_left_as_it_is(run: str, run_apt: RunApt) -> None:
    part = next((Path(run) / "checkpoints" / "step-00000003").glob("model-00001*"))
    part.write_bytes(part.read_bytes()[:-1])
    told = run_apt("consolidate", run)
    assert told.code == 0 and "is damaged" in told.err and told.err.rstrip().endswith("it is left as it is")
    assert forms(run) == {3: 2, 6: 1}


def test_a_run_that_is_trained_just_now_is_refused(run: str, run_apt: RunApt) -> None:
    with only_trainer(Path(run)):
        told = run_apt("consolidate", run)
    assert told.code == 2 and "is at work in" in told.err
    assert forms(run) == {3: 2, 6: 2}
