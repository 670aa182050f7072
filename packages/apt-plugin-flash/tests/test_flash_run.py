"""Runs whose attention is one of this package: trained, resumed and opened with another, and what falls back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import register_for_one_test

from apt.api import AptError, AptWarning, FallbackWarning, ProviderError, Trainer
from apt.cli.main import main
from apt.core.registry import registry
from apt.core.runs import RunFolder
from apt.evaluation.evaluate import evaluate_run
from apt.inference.loading import load_run
from apt_plugin_flash import plugin
from apt_plugin_flash.flex import FlexLayer
from apt_plugin_flash.sdpa import SDPALayer

Config = dict[str, Any]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin's attentions, in the registry that scripts use, for the length of one test."""
    register_for_one_test(monkeypatch, plugin)
    for variable in ("APT_PLUGINS", "APT_DISABLE_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """One epoch of 6 steps, documents apart."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} green bottles hanging on the wall"}) + "\n" for n in range(24)))
    return {
        "name": "small",
        "output_dir": str(tmp_path / "runs"),
        "model": {
            "d_model": 16, "num_heads": 2, "num_layers": 2, "max_seq_len": 16,
            "attention_name": "mha", "mha": {"num_kv_heads": 1, "qk_norm": True},
        },
        "data": {"train_path": str(text), "cache_dir": str(tmp_path / "cache"), "document_mask": True},
        "training": {"max_epochs": 1, "batch_size": 8, "learning_rate": 0.01, "mixed_precision": "off"},
        "hardware": {"device": "cpu"},
    }  # fmt: skip


def train(config: Config, attention: str = "mha", **options: Any) -> Trainer:
    trainer = Trainer(config, overrides={"model.attention_name": attention}, quiet=True, **options)
    trainer.train()
    return trainer


def loss_of(run: RunFolder, attention: str) -> float:
    return evaluate_run(run, overrides={"model.attention_name": attention})["val_loss"]


def test_trained_with_torchs_fused_kernels_it_is_the_run_of_mha(config: Config) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", AptWarning)
        ours, theirs = train(config, "flash_sdpa"), train(config)
    assert isinstance(ours.model.blocks[0].attention, SDPALayer)
    assert ours.metrics["val_loss"] == pytest.approx(theirs.metrics["val_loss"], abs=1e-5)
    for own, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-4)


def test_a_run_of_mha_goes_on_and_is_opened_with_any_of_them(config: Config) -> None:
    run = RunFolder(train(config).run_dir)
    wanted = loss_of(run, "mha")
    for attention in ("flash_sdpa", "flex"):
        with pytest.warns(AptWarning, match=f"goes on with attention:{attention} 1.0.0, whose weights have the same"):
            assert loss_of(run, attention) == pytest.approx(wanted, abs=1e-6)
    with pytest.warns(AptWarning, match="goes on with attention:flash_sdpa"):
        resumed = Trainer(
            run.profile, overrides={"model.attention_name": "flash_sdpa", "training.max_epochs": 2},
            quiet=True, resume=run,
        )  # fmt: skip
        resumed.train()
    assert resumed.step == 2 * resumed.steps_per_epoch and resumed.metrics["val_loss"] < wanted


def test_a_window_is_kept_by_all_of_them_and_refused_by_mha(config: Config) -> None:
    config["model"]["mha"]["window"] = 4
    run = RunFolder(train(config, "flash_sdpa").run_dir)
    with pytest.warns(AptWarning, match="goes on with attention:flex"):
        assert loss_of(run, "flex") == pytest.approx(loss_of(run, "flash_sdpa"), abs=1e-6)
    with pytest.raises(AptError, match=r"attention:mha: its section does not fit: window: unknown key"):
        loss_of(run, "mha")


def test_what_cannot_be_had_gives_way_to_what_reads_the_same_weights(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run made on a GPU, on a machine without one."""
    run = RunFolder(train(config).run_dir)
    run.profile.write_text(run.profile.read_text().replace("attention_name: mha", "attention_name: flash_v2"))
    lock = json.loads(run.lock.read_text())
    for slot in lock["slots"]:
        if slot["kind"] == "attention":
            slot["requested"] = slot["name"] = "flash_v2"
    run.lock.write_text(json.dumps(lock))
    with pytest.warns(FallbackWarning, match="needs the package flash-attn.* using attention:flash_sdpa instead"):
        loaded = load_run(run, device="cpu")
    assert isinstance(loaded.model.blocks[0].attention, SDPALayer)
    with pytest.raises(ProviderError, match="needs the package flash-attn"):
        load_run(run, device="cpu", strict=True)
    monkeypatch.setattr(registry, "_claims", {k: c for k, c in registry._claims.items() if "fl" not in k[1]})
    with pytest.warns(FallbackWarning, match="flash_v2 is not installed; using attention:mha instead"):
        load_run(run, device="cpu", no_plugins=True)


@pytest.mark.parametrize(
    "attention, reason",
    [
        ("flash_v2", "attention:flash_v2 needs"),
        ("flex", "attention:flex: FlexAttention has no backward pass on the CPU"),
    ],
)
def test_a_new_run_that_cannot_have_it_falls_back_before_it_begins(config: Config, attention: str, reason: str) -> None:
    with pytest.warns(FallbackWarning, match=f"{reason}.* using attention:tva_default instead") as told:
        trainer = train(config, attention)
    assert len([w for w in told if issubclass(w.category, FallbackWarning)]) == 1
    assert trainer.in_use.slots["attention", attention].name == "tva_default"
    with pytest.raises(ProviderError, match=reason):
        train(config, attention, strict=True)


def test_flex_evaluates_what_another_trains_on_a_cpu(config: Config) -> None:
    """It is refused for training, so a run of it that is resumed on a CPU goes on with flash_sdpa."""
    run = RunFolder(train(config).run_dir)
    options: Config = {"overrides": {"model.attention_name": "flex", "training.max_epochs": 2}, "resume": run}
    with pytest.warns(FallbackWarning, match="no backward pass on the CPU; using attention:flash_sdpa instead"):
        Trainer(run.profile, quiet=True, **options).train()
    with pytest.warns(AptWarning, match="goes on with attention:flex"):
        loaded = load_run(run, overrides={"model.attention_name": "flex"})
    assert isinstance(loaded.model.blocks[0].attention, FlexLayer)


def test_the_same_text_from_the_command_line(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = str(train(config).run_dir)
    monkeypatch.chdir(tmp_path)
    texts = []
    for attention in ("mha", "flash_sdpa", "flex"):
        command = ["generate", run, "--prompt", "7 green", "--max-tokens", "8", "--temperature", "0"]
        assert main([*command, "--model.attention_name", attention]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] and texts[0].startswith("7 green")
    assert main(["eval", run, "--training.seed", "1"]) == 2
    assert "error: apt eval: --training.seed is no key of the model" in capsys.readouterr().err
