"""Runs whose weights are kept in fewer bits, and runs that train for it, with a scheme that a script brings."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import register_for_one_test
from torch import Tensor, nn

from apt.api import LoadedRun, RunFolder, load_run, save_run
from apt.core.errors import CheckpointError, ConfigError, FallbackWarning, ProviderError, ProviderNotFoundError
from apt.core.profiles import resolve
from apt.core.providers.quant import QuantProvider
from apt.core.registry import registry
from apt.training.trainer import Trainer


class HalfLinear(nn.Linear):
    """Its weight takes 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


class Halves(QuantProvider):
    """Every linear map of a block in bf16."""

    def get_name(self) -> str:
        return "halves"

    def get_version(self) -> str:
        return "1.0"

    def quantize(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = HalfLinear
                module.weight = nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)
        return model


class Heard(Halves):
    """Can be trained for, and notes what it hears."""

    said: list[str] = []  # noqa: RUF012

    def prepare(self, model: nn.Module) -> None:
        self.said.append(f"prepared {type(model).__name__}")

    def on_step_start(self, step: int) -> None:
        self.said.append(f"step {step}")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schemes, in the registry that scripts use, for the length of one test."""
    register_for_one_test(monkeypatch)
    registry.register("quant", "halves", Halves)
    registry.register("quant", "heard", Heard)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text("".join(f"{n} green bottles hanging on the wall\n" for n in range(12)))
    return {
        "output_dir": str(tmp_path / "runs"),
        "model": {"d_model": 16, "num_heads": 2, "num_layers": 1, "max_seq_len": 16},
        "data": {"train_path": str(tmp_path / "text.txt"), "cache_dir": str(tmp_path / "cache")},
        "training": {"max_steps": 2, "batch_size": 4},
        "hardware": {"device": "cpu"},
    }


@pytest.fixture
def run(config: dict[str, Any]) -> RunFolder:
    return RunFolder(Trainer(config, quiet=True).train())


def quantised(run: RunFolder, scheme: str = "halves") -> LoadedRun:
    """What `apt quantize` does of it, without the command."""
    loaded = load_run(run, device="cpu")
    config = resolve(run.profile, {"model.quant_name": scheme}).config
    model: Any = loaded.in_use.use("quant", scheme, lambda provider: provider.quantize(loaded.model))
    return replace(loaded, config=config, model=model)


TOKENS = torch.arange(10)[None]


def test_what_was_written_is_opened_as_it_was(run: RunFolder, tmp_path: Path) -> None:
    plain = load_run(run, device="cpu").model
    loaded = quantised(run)
    written = save_run(tmp_path / "out", loaded)
    opened = load_run(written, device="cpu")
    assert opened.step == 2
    assert opened.model.blocks[0].ffn.w_in.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(opened.model(TOKENS).logits, loaded.model(TOKENS).logits)
        assert not torch.equal(opened.model(TOKENS).logits, plain(TOKENS).logits)
    again = load_run(save_run(tmp_path / "again", load_run(run, device="cpu")), device="cpu").model
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(CheckpointError, match="keeps no averages"):
        load_run(written, device="cpu", state="stable")
    assert load_run(written, device="cpu", checkpoint="step-00000002").step == 2


def test_nothing_is_written_over_and_nothing_half(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = quantised(run)
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="there exists already"):
        save_run(tmp_path / "there", loaded)

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        save_run(tmp_path / "out", loaded)
    assert sorted(tmp_path.iterdir()) == before


def test_a_scheme_that_is_not_here_is_named(run: RunFolder) -> None:
    text = run.profile.read_text()
    fixes = {"int8": "apt-plugin-quant", "int3_of_somebody": "install the package that brings it"}
    for scheme, fix in fixes.items():
        registry._claims.pop(("quant", scheme), None)
        run.profile.write_text(text.replace("quant_name: null", f"quant_name: {scheme}"))
        with pytest.raises(ProviderNotFoundError, match=f"quant:{scheme} (is not installed|cannot be used).*{fix}"):
            load_run(run, device="cpu", no_plugins=True)


def test_weights_of_another_form_are_refused(run: RunFolder, tmp_path: Path) -> None:
    written = save_run(tmp_path / "out", quantised(run))
    written.profile.write_text(written.profile.read_text().replace("quant_name: halves", "quant_name: heard"))
    with pytest.raises(CheckpointError, match=r"was built with quant:halves 1\.0, and now quant:heard 1\.0 is"):
        load_run(written, device="cpu")


def test_a_quantised_model_is_not_trained(run: RunFolder, tmp_path: Path, config: dict[str, Any]) -> None:
    written = save_run(tmp_path / "out", quantised(run))
    with pytest.raises(ConfigError, match=r"model\.quant_name: halves: a quantised model cannot be trained"):
        Trainer(written.profile, resume=written)
    config["model"]["quant_name"] = "halves"
    with pytest.raises(ConfigError, match=r"set model\.qat_name"):
        Trainer(config)


def test_a_scheme_to_train_for_prepares_the_model_and_hears_the_run(config: dict[str, Any]) -> None:
    Heard.said.clear()
    config["model"]["qat_name"] = "heard"
    trainer = Trainer(config, quiet=True)
    trainer.train()
    assert Heard.said == ["prepared GPT", "step 0", "step 1"]
    assert load_run(RunFolder(trainer.run_dir), device="cpu").model.state_dict().keys()
    assert ("quant", "heard") in trainer.providers


def test_one_that_cannot_be_trained_for_is_passed_over_loudly(config: dict[str, Any]) -> None:
    config["model"]["qat_name"] = "halves"
    with pytest.warns(FallbackWarning, match="quant:halves cannot be trained for; using no quant instead"):
        Trainer(config, quiet=True).train()
    with pytest.raises(ProviderError, match="cannot be trained for"):
        Trainer(config, quiet=True, strict=True).train()
