"""Runs of several processes on CPUs: the same trajectory as one, one writer, and an end that all of them share."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import distributed_workers as workers
import pytest
import torch
from distributed_workers import TOLERANCE, Config, alone, assert_near, plain_config, records, weights

from apt.core.runs import RunFolder


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return plain_config(tmp_path)


@pytest.mark.parametrize(("size", "batch", "accumulation"), [(2, 8, 1), (4, 4, 2), (2, 2, 4)])
def test_the_trajectory_is_that_of_one_process(
    config: Config, tmp_path: Path, size: int, batch: int, accumulation: int
) -> None:
    config["training"] |= {"batch_size": batch, "gradient_accumulation": accumulation}
    one = alone(config, ("Recorder", None))
    several = workers.run(size, config, tmp_path / "results", ("Recorder", None))
    assert [process["error"] for process in several] == [None] * size, several
    for process in several:
        assert process["losses"] == pytest.approx(one["losses"], rel=TOLERANCE), "each is told the loss of all"
    for step, rows in one["rows"].items():
        assert [row for process in several for row in process["rows"][step]] == rows, "each row once, in order"
    assert_near(several[0]["run"], one["run"])
    ours, theirs = records(several[0]["run"]), records(one["run"])
    for name in ("loss", "grad_norm", "learning_rate"):
        assert [r[name] for r in ours] == pytest.approx([r[name] for r in theirs], rel=TOLERANCE)
    ours, theirs = records(several[0]["run"], "eval"), records(one["run"], "eval")
    assert [r["val_loss"] for r in ours] == pytest.approx([r["val_loss"] for r in theirs], rel=TOLERANCE)
    assert ours[0]["step"] == theirs[0]["step"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_pairs_count_by_their_tokens_wherever_they_are(config: Config, tmp_path: Path, accumulation: int) -> None:
    """The targets of one process are longer than those of another one."""
    choose = random.Random(0)
    sources = ["".join(choose.choices("abc", k=choose.randint(1, 6))) for _ in range(45)]
    Path(config["data"]["train_path"]).write_text(
        "".join(f"{text}\t{text[: len(text) // 2 + 1]}\n" for text in sources)
    )
    config["model"] |= {"backbone": "encdec", "num_layers": 1, "max_seq_len": 8}
    config["data"]["tokenizer"] = "char"
    config["training"] |= {"batch_size": 8 // accumulation, "gradient_accumulation": accumulation}
    config["training"]["max_epochs"] = 2
    one = alone(config, ("Recorder", None))
    several = workers.run(2, config, tmp_path / "results", ("Recorder", None))
    assert [process["error"] for process in several] == [None] * 2, several
    assert several[1]["losses"] == pytest.approx(one["losses"], rel=TOLERANCE)
    assert_near(several[0]["run"], one["run"])


def test_a_step_that_is_not_finite_in_one_process_is_passed_over_in_all(config: Config, tmp_path: Path) -> None:
    config["training"]["on_not_finite"] = "rollback"
    several = workers.run(2, config, tmp_path / "results", ("Poison", (8, 1)), ("Recorder", None))
    assert [process["error"] for process in several] == [None] * 2, several
    assert several[0]["losses"] == several[1]["losses"]
    assert len(several[0]["losses"]) == 17
    assert [record["not_finite"] for record in records(several[0]["run"]) if "not_finite" in record] == [1]


def test_process_0_alone_writes(config: Config, tmp_path: Path) -> None:
    several = workers.run(2, config, tmp_path / "results", ("Recorder", None), run_dir=tmp_path / "mine")
    assert [process["run"] for process in several] == [str(tmp_path / "mine")] * 2
    assert [bool(process["events"]) for process in several] == [True, False]
    kept = sorted(path.name for path in (tmp_path / "mine").iterdir())
    assert kept == ["checkpoints", "metrics.jsonl", "plugins.lock.json", "profile.yaml", "run.log", "tokenizer.json"]
    steps = [record["step"] for record in records(str(tmp_path / "mine"))]
    assert steps == sorted(set(steps)), "no record stands there twice"
    assert not (tmp_path / "runs").exists()


def test_with_dropout_each_process_draws_its_own_and_a_resumed_run_is_the_whole_run_bit_for_bit(
    config: Config, tmp_path: Path
) -> None:
    config["model"]["dropout"] = 0.1
    whole = workers.run(2, config, tmp_path / "whole", ("Recorder", None))
    assert not set(whole[0]["numbers"]) & set(whole[1]["numbers"])
    assert len(set(whole[1]["numbers"])) == 18
    stopped = workers.run(2, config, tmp_path / "stopped", ("Recorder", None), ("StopAt", (8, int(signal.SIGTERM), 1)))
    assert [process["code"] for process in stopped] == [143, 143]
    assert "stopped by SIGTERM after step 8 of 18; saved" in stopped[0]["message"]
    run = stopped[0]["run"]
    resumed = workers.run(2, f"{run}/profile.yaml", tmp_path / "resumed", ("Recorder", None), resume=run)
    assert resumed[1]["numbers"] == whole[1]["numbers"][8:]
    for name, weight in weights(whole[0]["run"]).items():
        assert torch.equal(weights(run)[name], weight), name


def test_four_then_two_then_one_process_read_each_sample_once(config: Config, tmp_path: Path) -> None:
    one = alone(config, ("Recorder", None))
    first = workers.run(4, config, tmp_path / "4", ("Recorder", None), ("StopAt", (4, int(signal.SIGINT), 2)))
    assert [process["code"] for process in first] == [130] * 4
    run = first[0]["run"]
    profile = f"{run}/profile.yaml"
    second = workers.run(
        2, profile, tmp_path / "2", ("Recorder", None), ("StopAt", (9, int(signal.SIGINT), 0)), resume=run
    )
    assert [process["code"] for process in second] == [130] * 2
    third = alone(profile, ("Recorder", None), resume=RunFolder(Path(run)))
    read: dict[str, list[int]] = {}
    for process in (*first, *second, third):
        for step, rows in process["rows"].items():
            read.setdefault(step, []).extend(rows)
    assert read == one["rows"]
    assert_near(run, one["run"])


@pytest.mark.parametrize(("rank", "saved"), [(1, "step-00000007"), (0, "step-00000006")])
def test_a_killed_process_ends_the_run_with_a_checkpoint_that_resumes(
    config: Config, tmp_path: Path, rank: int, saved: str
) -> None:
    other = workers.left_alone(config, tmp_path / "killed", rank)
    run = other["run"]
    assert max((Path(run) / "checkpoints").iterdir()).name == saved, "process 0, if it is left, saves the whole step"
    alone(f"{run}/profile.yaml", resume=RunFolder(Path(run)))
    assert_near(run, alone(config)["run"])


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_is_told_by_process_0_and_saved(config: Config, tmp_path: Path, rank: int) -> None:
    failed = workers.run(2, config, tmp_path / "failed", ("BrokenLayer", (4, rank)))
    assert [process["code"] for process in failed] == [2, 2]
    wanted = "step 4 failed: RuntimeError: the fuse blew" if rank == 0 else "step 4 failed in process 1: RuntimeError"
    assert wanted in failed[0]["message"]
    assert "the fuse blew; the run is saved in" in failed[0]["message"]
    run = failed[0]["run"]
    assert max((Path(run) / "checkpoints").iterdir()).name == "step-00000004"
    alone(f"{run}/profile.yaml", resume=RunFolder(Path(run)))
    assert_near(run, alone(config)["run"])


def test_an_effect_that_fails_in_one_process_is_dropped_in_all(config: Config, tmp_path: Path) -> None:
    several = workers.run(2, config, tmp_path / "results", ("FailAt", (3, 1)))
    assert [(process["error"], process["calls"]) for process in several] == [(None, 4), (None, 4)]
    told = [text for text in several[0]["warnings"] if "broken effect" in text]
    assert told == ["FailAt.extra_losses failed in process 1: ValueError: broken effect; training goes on without it"]
    dropped = [record.get("dropped") for record in records(several[0]["run"])]
    assert dropped == [None] + [["FailAt.extra_losses"]] * 8


def test_an_observer_that_fails_in_one_process_is_switched_off_in_all(config: Config, tmp_path: Path) -> None:
    several = workers.run(2, config, tmp_path / "results", ("Observer", 1))
    assert [(process["error"], process["looked"]) for process in several] == [(None, 3), (None, 3)]
    assert any("Observer.on_step_end failed in process 1" in text for text in several[0]["warnings"])


def test_parameters_that_a_plugin_uses_outside_of_the_model_are_trained_alike(config: Config, tmp_path: Path) -> None:
    config["training"]["gradient_accumulation"] = 2
    config["training"]["batch_size"] = 4
    one = alone(config, ("Head", None))
    several = workers.run(2, config, tmp_path / "results", ("Head", None))
    assert [process["error"] for process in several] == [None, None], several
    assert_near(several[0]["run"], one["run"])


def test_a_batch_that_cannot_be_dealt_out_is_refused_with_what_can(config: Config, tmp_path: Path) -> None:
    config["training"] |= {"batch_size": 6, "gradient_accumulation": 2}
    refused = workers.run(5, config, tmp_path / "results")
    assert {process["code"] for process in refused} == {2}
    assert "use 1, 2, 3, 4, 6, 12 processes" in refused[0]["message"]
    assert json.dumps(refused)
