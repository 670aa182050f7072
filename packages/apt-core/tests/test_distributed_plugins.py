"""Plugins in runs of several processes: experts and the alignment do there what they do in one."""

from __future__ import annotations

from pathlib import Path

import distributed_workers as workers
import pytest
import scaled_ffn
import torch
from distributed_workers import Config, alone, plain_config, records, store, weights
from small_run import register_for_one_test
from torch import Tensor

TOLERANCE = 1e-4
"""Wider than without plugins: AdamW makes a step of full length of a moment that is all rounding."""

moe = pytest.importorskip("apt_plugin_moe.plugin", reason="apt-plugin-moe is not here")
align = pytest.importorskip("apt_plugin_align.plugin", reason="apt-plugin-align is not here")
MODULES = ("apt_plugin_moe.plugin", "apt_plugin_align.plugin", "scaled_ffn")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugins' providers, in the registry that scripts use, for the length of one test."""
    register_for_one_test(monkeypatch, moe, align, scaled_ffn)


@pytest.fixture(params=["ddp", "fsdp"])
def config(tmp_path: Path, request: pytest.FixtureRequest) -> Config:
    """3 epochs of 6 steps of 2 micro-batches; experts from epoch 1 on, the alignment from epoch 2."""
    config = plain_config(tmp_path, schedules={"enable_moe_at_epoch": 1, "enable_align_at_epoch": 2})
    config["model"] |= {
        "align_name": "bistate_default",
        "moe": {"enabled": True, "experts": 4, "bias_rate": 0.01},
        "bistate": {"beta": 0.0},  # groups that do not depend on how many tokens a micro-batch has
    }
    config["training"] |= {"batch_size": 4, "gradient_accumulation": 2}
    config["hardware"]["parallel"] = request.param
    return config


def averages(run: str) -> list[Tensor]:
    return [entry["stable"] for entry in store(run).load().optimizer["state"].values()]


def assert_same(two: str, one: str) -> None:
    ours, theirs = weights(two), weights(one)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=TOLERANCE, atol=TOLERANCE)


def test_experts_and_the_alignment_come_to_what_they_come_to_in_one_process(config: Config, tmp_path: Path) -> None:
    one = alone(config)["run"]
    several = workers.run(2, config, tmp_path / "results", register=MODULES)
    assert [process["error"] for process in several] == [None, None], several
    two = several[0]["run"]
    assert_same(two, one)
    assert any(weight.any() for name, weight in weights(two).items() if "selection_bias" in name), "the bias has moved"
    for a, b in zip(averages(two), averages(one), strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
    for ours, theirs in zip(records(two), records(one), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"tokens_per_second", "event"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-3), (name, ours["step"])
    assert "moe.0.load_max" in records(two)[-1]
    assert "align_kl" in records(two)[-1]


def test_experts_of_their_own_modules_that_some_process_does_not_use_are_trained(
    config: Config, tmp_path: Path
) -> None:
    """With one row of 4 tokens in each process most experts have no token there."""
    config["model"] |= {"ffn_name": "scaled", "max_seq_len": 4, "align_name": None}
    # Capacity and balance loss would count the tokens of one process.
    section = {"enabled": True, "experts": 8, "top_k": 1, "shared_experts": 1, "balance_loss": 0.0, "capacity": None}
    config["model"]["moe"] = section
    # A weight moves by the learning rate, whatever its gradient is: of a few tokens here and there that is rounding.
    config["training"] |= {"batch_size": 2, "gradient_accumulation": 1, "max_steps": 5, "learning_rate": 1e-4}
    config["schedules"] = {}
    one = alone(config, ("Recorder", None))
    several = workers.run(2, config, tmp_path / "results", ("Recorder", None), register=MODULES)
    assert [process["error"] for process in several] == [None, None], several
    assert several[0]["losses"] == pytest.approx(one["losses"], rel=TOLERANCE)
    assert any(".experts.each.7." in name for name in weights(one["run"])), "each expert is a module"
    assert_same(several[0]["run"], one["run"])
