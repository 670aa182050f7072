"""Plugins in runs of several processes: experts and the alignment do there what they do in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distributed_workers as workers
import pytest
import torch
from safetensors.torch import load_file
from small_run import register_for_one_test
from torch import Tensor

from apt.checkpoint.store import CheckpointStore
from apt.core.runs import RunFolder
from apt.training.metrics import read_metrics
from apt.training.trainer import Trainer

Config = dict[str, Any]
TOLERANCE = 1e-4
"""Wider than without plugins: AdamW makes a step of full length of a moment that is all rounding."""

moe = pytest.importorskip("apt_plugin_moe.plugin", reason="apt-plugin-moe is not here")
align = pytest.importorskip("apt_plugin_align.plugin", reason="apt-plugin-align is not here")
MODULES = ("apt_plugin_moe.plugin", "apt_plugin_align.plugin")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugins' providers, in the registry that scripts use, for the length of one test."""
    register_for_one_test(monkeypatch, moe, align)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """3 epochs of 6 steps of 2 micro-batches; experts from epoch 1 on, the alignment from epoch 2."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} green bottles hanging on the wall\n" for n in range(24)))
    return {
        "name": "small",
        "output_dir": str(tmp_path / "runs"),
        "model": {
            "d_model": 16, "num_heads": 2, "num_layers": 2, "max_seq_len": 16, "align_name": "bistate_default",
            "moe": {"enabled": True, "experts": 4, "bias_rate": 0.01},
            # Groups that do not depend on how many tokens a micro-batch has.
            "bistate": {"beta": 0.0},
        },
        "data": {"train_path": str(text), "cache_dir": str(tmp_path / "cache")},
        "schedules": {"enable_moe_at_epoch": 1, "enable_align_at_epoch": 2},
        "training": {
            "max_epochs": 3, "batch_size": 4, "gradient_accumulation": 2, "log_every": 2, "learning_rate": 0.01,
        },
        "hardware": {"device": "cpu"},
    }  # fmt: skip


def weights(run: str) -> dict[str, Tensor]:
    return load_file(max((Path(run) / "checkpoints").iterdir()) / "model.safetensors")


def averages(run: str) -> list[Tensor]:
    state = CheckpointStore(RunFolder(Path(run)).checkpoints).load().optimizer["state"]
    return [entry["stable"] for entry in state.values()]


def test_experts_and_the_alignment_come_to_what_they_come_to_in_one_process(config: Config, tmp_path: Path) -> None:
    trainer = Trainer(config, quiet=True)
    trainer.train()
    one = str(trainer.run_dir)
    several = workers.run(2, config, tmp_path / "results", register=MODULES)
    assert [process["error"] for process in several] == [None, None], several
    two = several[0]["run"]
    ours, theirs = weights(two), weights(one)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=TOLERANCE, atol=TOLERANCE)
    assert any(ours[name].any() for name in ours if "selection_bias" in name), "the bias has moved"
    for a, b in zip(averages(two), averages(one), strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)

    def logged(run: str) -> list[dict[str, Any]]:
        return [record for record in read_metrics(Path(run) / "metrics.jsonl") if record["event"] == "train"]

    for a, b in zip(logged(two), logged(one), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"tokens_per_second", "event"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-3), (name, a["step"])
    assert "moe.0.load_max" in logged(two)[-1]
    assert "align_kl" in logged(two)[-1]


def test_experts_of_their_own_modules_that_some_process_does_not_use_are_trained(
    config: Config, tmp_path: Path
) -> None:
    """With two rows in each process an expert of these may have no token there."""
    config["model"]["moe"] = {"enabled": True, "experts": 8, "top_k": 1, "shared_experts": 1}
    config["training"] |= {"batch_size": 2, "gradient_accumulation": 1, "max_steps": 5}
    config["model"]["max_seq_len"] = 4
    config["model"]["align_name"] = None
    config["schedules"] = {}
    several = workers.run(2, config, tmp_path / "results", register=MODULES)
    assert [process["error"] for process in several] == [None, None], several
    assert all(torch.isfinite(weight).all() for weight in weights(several[0]["run"]).values())
