"""A model in shards over several processes on CPUs: the run of one process, saved by all of them, and opened by any
number."""

from __future__ import annotations

import random
import signal
import warnings
from pathlib import Path
from typing import Any

import distributed_workers as workers
import pytest
import torch
from distributed_workers import TOLERANCE, Config, alone, assert_near, plain_config, records, store, weights

from apt.core.config import RunConfig
from apt.core.errors import ConfigError
from apt.core.runs import RunFolder
from apt.core.world import World
from apt.training.sharding import shard, shards_of


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = plain_config(tmp_path)
    config["hardware"]["parallel"] = "fsdp"
    config["training"]["max_epochs"] = 2
    return config


@pytest.mark.parametrize(("size", "batch", "accumulation"), [(4, 4, 2), (2, 2, 4)])
def test_the_trajectory_is_that_of_one_process(
    config: Config, tmp_path: Path, size: int, batch: int, accumulation: int
) -> None:
    config["training"] |= {"batch_size": batch, "gradient_accumulation": accumulation}
    one = alone(config, ("Recorder", None), ("Weigh", None))
    several = workers.run(size, config, tmp_path / "results", ("Recorder", None), ("Weigh", None))
    assert [process["error"] for process in several] == [None] * size, several
    for process in several:
        assert process["losses"] == pytest.approx(one["losses"], rel=TOLERANCE), "each is told the loss of all"
        assert process["bytes"] <= 1.1 * one["bytes"] / size + 1000, "each holds its share"
    assert_near(several[0]["run"], one["run"])
    ours, theirs = records(several[0]["run"]), records(one["run"])
    assert [r["grad_norm"] for r in ours] == pytest.approx([r["grad_norm"] for r in theirs], rel=TOLERANCE)
    ours, theirs = records(several[0]["run"], "eval"), records(one["run"], "eval")
    assert [r["val_loss"] for r in ours] == pytest.approx([r["val_loss"] for r in theirs], rel=TOLERANCE)


def test_pairs_and_their_questions_come_to_what_they_come_to_in_one_process(config: Config, tmp_path: Path) -> None:
    """The encoder is called outside of the model's forward, where each process answers by itself."""
    choose = random.Random(0)
    sources = ["".join(choose.choices("abc", k=choose.randint(1, 6))) for _ in range(45)]
    text = Path(config["data"]["train_path"])
    text.write_text("".join(f"{source}\t{source[: len(source) // 2 + 1]}\n" for source in sources))
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "abc", "answer": "ab"}\n{"prompt": "c", "answer": "c"}\n')
    config["model"] |= {"backbone": "encdec", "num_layers": 1, "max_seq_len": 8}
    config["data"] |= {"tokenizer": "char", "answers_path": str(questions), "answers_max_tokens": 4}
    one = alone(config, ("Recorder", None))
    several = workers.run(2, config, tmp_path / "results", ("Recorder", None))
    assert [process["error"] for process in several] == [None] * 2, several
    assert several[1]["losses"] == pytest.approx(one["losses"], rel=TOLERANCE)
    assert_near(several[0]["run"], one["run"])
    ours, theirs = records(several[0]["run"], "eval"), records(one["run"], "eval")
    assert [r["accuracy"] for r in ours] == [r["accuracy"] for r in theirs]


def test_four_then_two_then_one_process_read_each_sample_once(config: Config, tmp_path: Path) -> None:
    """Shards of 4 processes are opened by 2, those of 2 by two that hold all of it, and what these save by 2 again."""
    config["training"]["max_epochs"] = 3
    one = alone(config, ("Recorder", None))
    read: dict[str, list[int]] = {}

    def go_on(size: int, results: str, stop: int, *, run: str | None = None, parallel: str = "fsdp") -> str:
        options: dict[str, Any] = {"resume": run, "overrides": {"hardware.parallel": parallel}} if run else {}
        stopping = ("StopAt", (stop, int(signal.SIGINT), size - 1))
        source = f"{run}/profile.yaml" if run else config
        several = workers.run(size, source, tmp_path / results, ("Recorder", None), stopping, **options)
        assert [process["code"] for process in several] == [130] * size, several
        for process in several:
            for step, rows in process["rows"].items():
                read.setdefault(step, []).extend(rows)
        return str(several[0]["run"])

    run = go_on(4, "4", 4)
    for results, stop, parallel in (("2", 8, "fsdp"), ("2 whole", 11, "ddp"), ("2 again", 14, "fsdp")):
        go_on(2, results, stop, run=run, parallel=parallel)
    last = alone(f"{run}/profile.yaml", ("Recorder", None), resume=RunFolder(Path(run)))
    assert read | last["rows"] == one["rows"]
    assert_near(run, one["run"])


def test_a_resumed_run_is_the_whole_run_bit_for_bit(config: Config, tmp_path: Path) -> None:
    config["model"]["dropout"] = 0.1
    whole = workers.run(2, config, tmp_path / "whole", ("Recorder", None))
    stopped = workers.run(2, config, tmp_path / "stopped", ("Recorder", None), ("StopAt", (8, int(signal.SIGTERM), 1)))
    assert [process["code"] for process in stopped] == [143, 143]
    run = stopped[0]["run"]
    resumed = workers.run(2, f"{run}/profile.yaml", tmp_path / "resumed", ("Recorder", None), resume=run)
    assert resumed[1]["numbers"] == whole[1]["numbers"][8:]
    for name, weight in weights(whole[0]["run"]).items():
        assert torch.equal(weights(run)[name], weight), name


def test_parameters_that_a_plugin_uses_outside_of_the_model_are_trained_alike(config: Config, tmp_path: Path) -> None:
    config["training"] |= {"gradient_accumulation": 2, "batch_size": 4}
    one = alone(config, ("Head", None))
    several = workers.run(2, config, tmp_path / "results", ("Head", None))
    assert [process["error"] for process in several] == [None, None], several
    assert_near(several[0]["run"], one["run"])


def test_in_bf16_masters_and_moments_stay_in_fp32(config: Config, tmp_path: Path) -> None:
    config["training"] |= {"mixed_precision": "bf16", "gradient_accumulation": 2, "batch_size": 4}
    one = alone(config, ("Recorder", None))
    several = workers.run(2, config, tmp_path / "results", ("Recorder", None))
    assert [process["error"] for process in several] == [None] * 2, several
    assert several[0]["losses"] == pytest.approx(one["losses"], rel=1e-2)
    checkpoint = store(several[0]["run"]).load()
    moments = [value for state in checkpoint.optimizer["state"].values() for value in state.values()]
    assert {tensor.dtype for tensor in (*checkpoint.model.values(), *moments)} == {torch.float32}


def test_only_several_processes_under_fsdp_have_shards() -> None:
    config = RunConfig.model_validate({"hardware": {"parallel": "fsdp"}})
    assert shards_of(config, World()) == 1
    assert shards_of(config, World(1, 4)) == 4
    assert shards_of(RunConfig(), World(1, 4)) == 1


def test_a_parameter_of_one_number_is_named() -> None:
    model = torch.nn.Module()
    model.alone = torch.nn.Parameter(torch.tensor(1.0))
    with warnings.catch_warnings(), pytest.raises(ConfigError, match="cannot shard alone, which is one number"):
        warnings.simplefilter("ignore")
        shard(model, World(0, 2), torch.device("cpu"), bf16=False)
