"""What goes wrong in one of several processes, under both kinds of parallelism: what is said, and what is kept."""

from __future__ import annotations

from pathlib import Path

import distributed_workers as workers
import pytest
from distributed_workers import Config, alone, assert_near, plain_config, store

from apt.core.runs import RunFolder

BOTH = pytest.mark.parametrize("parallel", ["ddp", "fsdp"])


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run of 2 epochs of 6 steps."""
    return plain_config(tmp_path, training={"max_epochs": 2})


def in_parallel(config: Config, parallel: str) -> Config:
    return config | {"hardware": config["hardware"] | {"parallel": parallel}}


def test_what_fails_before_the_first_step_is_told_by_process_0(config: Config, tmp_path: Path) -> None:
    hook = ("FailInHook", ("on_model_built", None, 1, "no room"))
    failed = workers.run(2, config | {"on_plugin_error": "stop"}, tmp_path / "failed", hook)
    assert [process["code"] for process in failed] == [2, 2], failed
    assert failed[0]["message"].startswith("process 1: TrainingError: FailInHook.on_model_built failed: RuntimeError: ")
    assert failed[0]["message"].endswith("no room; before the first step")


@BOTH
def test_an_error_before_the_weights_change_costs_no_step(config: Config, tmp_path: Path, parallel: str) -> None:
    """Also where the others are in the middle of clipping, which takes all processes under fsdp."""
    config = in_parallel(config, parallel) | {"on_plugin_error": "stop"}
    hook = ("FailInHook", ("on_before_optimizer_step", 3, 1, "broken"))
    failed = workers.run(2, config, tmp_path / "failed", hook)
    assert [process["code"] for process in failed] == [2, 2], failed
    run = failed[0]["run"]
    # Under ddp process 0 may have taken the step by the time it hears of it.
    assert store(run).latest() in ((3, 4) if parallel == "ddp" else (3,)), failed
    alone(f"{run}/profile.yaml", resume=RunFolder(Path(run)))
    assert_near(run, alone(config)["run"])


@BOTH
def test_what_sounds_like_a_lost_process_and_is_a_plugins_own_is_isolated(
    config: Config, tmp_path: Path, parallel: str
) -> None:
    hook = ("FailInHook", ("on_step_end", None, 1, "tracker at http://mlflow:5000: Connection refused"))
    several = workers.run(2, in_parallel(config, parallel), tmp_path / "results", hook)
    assert [process["error"] for process in several] == [None, None], several
    assert any("Connection refused" in text for text in several[0]["warnings"])


@BOTH
def test_a_device_that_waits_for_a_process_that_is_gone_is_not_waited_for(
    config: Config, tmp_path: Path, parallel: str
) -> None:
    failed = workers.run(
        2, in_parallel(config, parallel), tmp_path / "failed", ("StuckDevice", 0), ("BrokenLayer", (8, 1))
    )
    assert [process["code"] for process in failed] == [2, 2], failed
    assert "step 8 failed in process 1: RuntimeError: the fuse blew; what was saved" in failed[0]["message"]
    assert store(failed[0]["run"]).steps() == [6]


@BOTH
def test_a_device_that_has_failed_is_not_asked_again(config: Config, tmp_path: Path, parallel: str) -> None:
    config = in_parallel(config, parallel) | {"on_plugin_error": "stop"}
    failed = workers.run(2, config, tmp_path / "failed", ("BrokenDevice", 8))
    assert [process["code"] for process in failed] == [2, 2], failed
    assert "device-side assert triggered" in failed[0]["message"], "and no internal error"
    assert store(failed[0]["run"]).steps() == [6]


@BOTH
def test_two_runs_one_after_the_other_in_the_same_processes(config: Config, tmp_path: Path, parallel: str) -> None:
    """What the processes told each other in the first one is not taken for what they say in the second."""
    several = workers.run(2, in_parallel(config, parallel), tmp_path / "results", again=True)
    assert [process["error"] for process in several] == [None, None], several
    runs = [RunFolder(path) for path in sorted(Path(config["output_dir"]).iterdir())]
    assert len(runs) == 2
    assert_near(str(runs[0].path), str(runs[1].path))


@BOTH
def test_buffers_of_every_kind_are_those_of_process_0(config: Config, tmp_path: Path, parallel: str) -> None:
    several = workers.run(2, in_parallel(config, parallel), tmp_path / "results", ("Buffers", None))
    assert [process["error"] for process in several] == [None, None], several
    assert [process["buffers"] for process in several] == [[0.0] * 4] * 2


def test_a_process_that_prepares_its_data_for_long_is_waited_for(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than the transport waits for anything."""
    several = workers.run(2, config, tmp_path / "results", ("Slow", (1, 4.0)), ("Impatient", 2.0))
    assert [process["error"] for process in several] == [None, None], several
