"""Runs whose model is in shards, and one of whose processes fails: all end, or go on, together."""

from __future__ import annotations

from pathlib import Path

import distributed_workers as workers
import pytest
import torch
from distributed_workers import Config, alone, plain_config, records, store, weights

from apt.core.runs import RunFolder


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = plain_config(tmp_path)
    config["hardware"]["parallel"] = "fsdp"
    config["training"]["max_epochs"] = 2
    return config


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_with_a_checkpoint_that_resumes(
    config: Config, tmp_path: Path, rank: int
) -> None:
    other = workers.left_alone(config, tmp_path / "killed", rank)
    assert "what was saved before is kept" in other["message"], "a shard of step 7 is lost"
    run = other["run"]
    assert store(run).steps() == [6]
    alone(f"{run}/profile.yaml", resume=RunFolder(Path(run)))
    assert store(run).latest() == 12


@pytest.mark.parametrize(("rank", "save", "asynchronous"), [(1, 1, True), (1, 2, False), (0, 2, True)])
def test_a_process_that_is_killed_while_the_others_wait_for_its_shards_is_missed(
    config: Config, tmp_path: Path, rank: int, save: int, asynchronous: bool
) -> None:
    """Also in the last save, after which nothing is computed together."""
    config["checkpoint"] = {"asynchronous": asynchronous}
    ends = workers.run(2, config, tmp_path / "results", ("DieInSave", (rank, save)))
    assert ends[rank]["code"] == -workers.KILL
    other = ends[1 - rank]
    assert (other["error"], other["code"]) == ("PeerLostError", 2)
    assert "another process of the run was killed, or is out of reach" in other["message"]
    run = other["run"]
    assert store(run).steps() == [6 * done for done in range(1, save)]
    if save > 1:
        alone(f"{run}/profile.yaml", resume=RunFolder(Path(run)))
        assert store(run).latest() == 12


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_is_told_by_process_0_and_saved_by_all(
    config: Config, tmp_path: Path, rank: int
) -> None:
    failed = workers.run(3, config | {"training": config["training"] | {"batch_size": 6}}, tmp_path / "failed",
                         ("BrokenLayer", (4, rank)))  # fmt: skip
    assert [process["code"] for process in failed] == [2, 2, 2], failed
    wanted = "step 4 failed: RuntimeError: the fuse blew" if rank == 0 else "step 4 failed in process 1: RuntimeError"
    assert wanted in failed[0]["message"]
    assert "the fuse blew; the run is saved in" in failed[0]["message"]
    run = failed[0]["run"]
    assert store(run).steps() == [4]
    alone(f"{run}/profile.yaml", resume=RunFolder(Path(run)))


def test_a_disk_that_is_full_for_one_process_fails_the_save_for_all(config: Config, tmp_path: Path) -> None:
    config["checkpoint"] = {"every": 3}
    failed = workers.run(2, config, tmp_path / "results", ("FullDisk", 1))
    assert [process["code"] for process in failed] == [2, 2], failed
    assert any("the disk is full" in process["message"] for process in failed), failed
    run = Path(failed[0]["run"])
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    alone(f"{run}/profile.yaml", resume=RunFolder(run))


def test_without_memory_for_a_copy_in_one_process_all_wait(config: Config, tmp_path: Path) -> None:
    config["checkpoint"] = {"every": 3}
    one = workers.run(2, config, tmp_path / "one")
    several = workers.run(2, config, tmp_path / "several", ("NoMemory", 1))
    assert [process["error"] for process in several] == [None, None], several
    assert [any("no memory for a copy" in text for text in process["warnings"]) for process in several] == [False, True]
    for name, weight in weights(one[0]["run"]).items():
        assert torch.equal(weights(several[0]["run"])[name], weight), name


def test_hooks_that_fail_in_one_process_are_switched_off_in_all(config: Config, tmp_path: Path) -> None:
    several = workers.run(2, config, tmp_path / "results", ("FailAt", (3, 1)), ("Observer", 0))
    assert [(process["error"], process["calls"], process["looked"]) for process in several] == [(None, 4, 3)] * 2


def test_a_step_that_is_not_finite_in_one_process_is_passed_over_in_all(config: Config, tmp_path: Path) -> None:
    config["training"]["on_not_finite"] = "rollback"
    several = workers.run(2, config, tmp_path / "results", ("Poison", (8, 1)), ("Recorder", None))
    assert [process["error"] for process in several] == [None] * 2, several
    assert several[0]["losses"] == several[1]["losses"]
    assert [record["not_finite"] for record in records(several[0]["run"]) if "not_finite" in record] == [1]
