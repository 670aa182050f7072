"""A run whose experts and whose alignment go on in mid-training, because its profile says so: both plugins together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import Apt
from safetensors.torch import load_file
from small_run import StopAt, register_for_one_test, small_config
from torch import Tensor

from apt.core.runs import RunFolder
from apt.evaluation.evaluate import evaluate_run
from apt.training.metrics import read_metrics
from apt.training.signals import Interrupted
from apt.training.trainer import Trainer

Config = dict[str, Any]
MOE_AT, ALIGN_AT, STEPS = 6, 12, 24
"""The steps at which epochs 1 and 2 begin, and the length of the run: 4 epochs of 6."""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both plugins' providers, in the registry that scripts use, for the length of one test."""
    from apt_plugin_align import plugin as align
    from apt_plugin_moe import plugin as moe

    register_for_one_test(monkeypatch, moe, align)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    experts = {"enabled": True, "experts": 4, "jitter": 0.01, "bias_rate": 0.001}
    schedules = {
        "enable_moe_at_epoch": 1,
        "enable_align_at_epoch": 2,
        "route_temp": {"start": 1.5, "end": 0.8, "by": "epoch"},
        "moe_capacity": {"start": 1.5, "end": 1.1, "by": "step"},
    }
    model = {"moe": experts, "align_name": "bistate_default"}
    return small_config(tmp_path, model=model, schedules=schedules, training={"max_epochs": 4})


def checkpoint(run_dir: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    newest = max((run_dir / "checkpoints").iterdir())
    return load_file(newest / "model.safetensors"), load_file(newest / "state.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(run_dir: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if r["event"] == "train"}


@pytest.fixture
def whole(config: Config) -> Path:
    """The run without a stop."""
    trainer = Trainer(config, quiet=True)
    return trainer.train()


def test_a_run_stopped_before_at_and_after_each_switch_is_the_whole_run_bit_for_bit(
    config: Config, whole: Path
) -> None:
    weights, state = checkpoint(whole)
    assert any(name.endswith(".stable") for name in state)
    for stop in (MOE_AT - 1, MOE_AT, MOE_AT + 1, ALIGN_AT - 1, ALIGN_AT, ALIGN_AT + 1):
        trainer = Trainer(config, quiet=True)
        trainer.register_hook(StopAt(stop))
        with pytest.raises(Interrupted):
            trainer.train()
        run = RunFolder(trainer.run_dir)
        Trainer(str(run.profile), resume=run, quiet=True).train()
        own_weights, own_state = checkpoint(run.path)
        assert same(weights, own_weights), stop
        assert same(state, own_state), stop
        own = losses(run.path)
        assert all(own[step] == loss for step, loss in losses(whole).items() if step >= stop + 2), stop


def test_the_terms_are_in_the_metrics_from_their_switch_on(whole: Path) -> None:
    records = {r["step"]: r for r in read_metrics(whole / "metrics.jsonl") if r["event"] == "train"}
    assert records[MOE_AT - 1]["aux_loss"] == 0 < records[MOE_AT + 1]["aux_loss"]
    assert "align_kl" not in records[ALIGN_AT - 1]
    assert {"align_kl", "align_infonce", "moe.0.load_max", "moe_capacity"} <= records[ALIGN_AT + 1].keys()


def test_the_average_of_an_expert_is_upcycled_with_it_and_the_stable_state_can_be_measured(whole: Path) -> None:
    run = RunFolder(whole)
    plain = evaluate_run(run, device="cpu")["val_loss"]
    stable = evaluate_run(run, device="cpu", state="stable")["val_loss"]
    assert stable != plain
    assert stable == pytest.approx(plain, abs=1.0)


def test_the_console_tells_the_curriculum(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(config).train()
    said = capsys.readouterr().out
    places = [
        said.index(text)
        for text in (
            "Epoch 1/4", "MoE is on (epoch=1, step=6)", "MoE capacity 1.40", "Epoch 2/4", "MoE capacity 1.30",
            "Alignment is on (epoch=2, step=12)", "Epoch 3/4", "MoE capacity 1.20", "Epoch 4/4",
        )
    ]  # fmt: skip
    assert places == sorted(places)


def installed(folder: Path) -> Path:
    """A folder that makes both plugins known, as installing them does."""
    for name in ("moe", "align"):
        info = folder / f"apt_plugin_{name}-2.0.0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: apt-plugin-{name}\nVersion: 2.0.0\n")
        (info / "entry_points.txt").write_text(f"[apt.providers]\n{name} = apt_plugin_{name}.plugin\n")
    return folder


SHORT = ("--epochs", "5", "--data.stdlib.max_bytes", "60000", "--model.d_model", "32", "--model.max_seq_len", "32")


def test_the_small_profile_from_the_command_line(apt: Apt, tmp_path: Path) -> None:
    said = apt("train", "-p", "moe_reasoning_small", *SHORT, path=[installed(tmp_path / "site")])
    for text in ("MoE is on (epoch=2", "MoE capacity 1.50", "Alignment is on (epoch=3", "Epoch 5/5"):
        assert text in said.stdout
    assert said.stderr == ""
    run = tmp_path / "runs/moe_reasoning_small-1"
    lock = {slot["kind"]: slot for slot in json.loads((run / "plugins.lock.json").read_text())["slots"]}
    assert (lock["router"]["name"], lock["align"]["name"]) == ("topk_moe", "bistate_default")
    measured = apt("eval", str(run), "--state", "stable", "--json", path=[tmp_path / "site"])
    assert json.loads(measured.stdout)["val_loss"] < 4
    apt("generate", str(run), "--prompt", "def ", "--max-tokens", "5", path=[tmp_path / "site"])


def test_the_full_size_is_refused_with_what_it_needs_and_names_the_small_one(apt: Apt, tmp_path: Path) -> None:
    said = apt("train", "-p", "gpt5_moe_reasoning", path=[installed(tmp_path / "site")], expect=2)
    assert "7.4" in said.stderr or "7.3" in said.stderr
    assert "GB for weights, gradients and AdamW's moments" in said.stderr
    assert "apt train -p moe_reasoning_small" in said.stderr
    assert "Traceback" not in said.stderr
    assert not (tmp_path / "runs").exists()
