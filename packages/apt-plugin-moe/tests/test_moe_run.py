"""Experts inside runs: dense until the switch, unchanged at it, in the metrics after it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import register_for_one_test, small_config, train
from torch import Tensor

from apt.core.errors import AptWarning
from apt.core.runs import RunFolder
from apt.evaluation.evaluate import evaluate, evaluate_run
from apt.training.metrics import read_metrics
from apt.training.trainer import Trainer
from apt_plugin_moe import plugin
from apt_plugin_moe.layer import MoEFFN

Config = dict[str, Any]
EXPERTS = 4


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin's router, in the registry that scripts use, for the length of one test."""
    register_for_one_test(monkeypatch, plugin)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """3 epochs of 6 steps, experts from epoch 1 on, at the shipped capacity."""
    model = {"dropout": 0.0, "moe": {"enabled": True, "experts": EXPERTS}}
    return small_config(tmp_path, model=model, schedules={"enable_moe_at_epoch": 1})


def layers(trainer: Any) -> list[MoEFFN]:
    return [block.ffn for block in trainer.model.blocks]


def losses(trainer: Trainer) -> dict[int, float]:
    records = read_metrics(trainer.run_dir / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if record["event"] == "train"}


class AcrossTheSwitch:
    """Compares what the model computes, in training, before and after the step that switches the experts on; before it
    makes the routers prefer one expert by far."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.difference = -1.0
        self.overflowed = False

    def on_step_end(self, step: int, trainer: Any) -> None:
        if step + 1 == self.step:
            with torch.no_grad():
                for layer in layers(trainer):
                    layer.router.weight[0] += 5 * layer.router.weight[1].sign()
            self.tokens = torch.randint(0, 100, (8, 16), generator=torch.Generator().manual_seed(0))
            self.before = self.logits(trainer)

    def on_step_start(self, step: int, trainer: Any) -> None:
        if step == self.step:
            assert all(layer.active for layer in layers(trainer))
            self.difference = (self.logits(trainer) - self.before).abs().max().item()
            self.overflowed = any(float(layer.load.overflow) > 0.05 for layer in layers(trainer))
            for layer in layers(trainer):
                self.check_state(trainer.optimizer, layer)

    @staticmethod
    def check_state(optimizer: Any, layer: MoEFFN) -> None:
        for name, dense in layer.dense.named_parameters():
            (copies,) = layer.experts.copies_of(name)
            state, own = optimizer.state[dense], optimizer.state[copies]
            assert state.keys() == own.keys()
            assert own["step"] == state["step"] > 0
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(own[key], state[key].expand_as(copies))
                assert own[key].data_ptr() != state[key].data_ptr()

    @torch.no_grad()
    def logits(self, trainer: Any) -> Tensor:
        assert trainer.model.training
        found: Tensor = trainer.model(self.tokens).logits
        return found


def test_the_function_is_unchanged_at_the_switch_though_the_router_is_skewed(config: Config) -> None:
    watch = AcrossTheSwitch(6)
    train(config, watch)
    assert 0 <= watch.difference <= 1e-5
    assert watch.overflowed  # so that capacity took part in it


def test_until_the_switch_it_is_the_dense_run_and_then_it_is_not(config: Config) -> None:
    moe = losses(train(config))
    del config["model"]["moe"], config["schedules"]
    dense = losses(train(config))
    assert [moe[step] for step in (1, 3, 5)] == [dense[step] for step in (1, 3, 5)]
    assert moe[11] != dense[11]
    assert moe[17] < moe[5]


def test_what_is_gated_is_not_trained_and_what_is_left_behind_neither(config: Config) -> None:
    seen: dict[str, Tensor] = {}

    class Watch:
        def on_epoch_end(self, epoch: int, trainer: Any) -> None:
            layer = layers(trainer)[0]
            seen[f"dense {epoch}"] = layer.dense.w_in.weight.detach().clone()
            seen[f"router {epoch}"] = layer.router.weight.detach().clone()
            seen[f"experts {epoch}"] = next(layer.experts.copies_of("w_in.weight")).detach().clone()

        def on_training_start(self, trainer: Any) -> None:
            self.on_epoch_end(-1, trainer)

    train(config, Watch())
    assert torch.equal(seen["router -1"], seen["router 0"])
    assert torch.equal(seen["experts -1"], seen["experts 0"])
    assert not torch.equal(seen["dense -1"], seen["dense 0"])
    assert torch.equal(seen["dense 0"], seen["dense 2"])
    assert not torch.equal(seen["router 0"], seen["router 1"])
    drifted = seen["experts 2"] - seen["dense 2"]
    assert all(part.abs().max() > 0 for part in drifted)
    assert not torch.equal(drifted[0], drifted[1])


def test_the_load_is_in_the_metrics_and_the_schedule_is_followed(config: Config) -> None:
    config["schedules"] |= {
        "moe_capacity": {"start": 1.5, "end": 1.1, "from_epoch": 1},
        "route_temp": {"start": 1.5, "end": 0.8, "by": "step"},
    }
    trainer = train(config)
    records = [r for r in read_metrics(trainer.run_dir / "metrics.jsonl") if r["event"] == "train"]
    assert not any(key.startswith("moe") for record in records[:3] for key in record)
    for record in records[3:]:
        for index in range(2):
            assert 0 <= record[f"moe.{index}.load_min"] <= 1 <= record[f"moe.{index}.load_max"] <= EXPERTS / 2
            assert 0 <= record[f"moe.{index}.overflow"] < 1
            assert record[f"moe.{index}.dropped"] == 0
        assert record["aux_loss"] > 0
    assert [record["moe_capacity"] for record in records[3:]] == [1.5] * 3 + [pytest.approx(1.3)] * 3
    assert [record["moe_temperature"] for record in records[3:]] == [
        pytest.approx(1.5 - 0.7 * record["step"] / 18) for record in records[3:]
    ]


def test_the_console_says_when_they_went_on_and_each_epochs_capacity(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config["schedules"]["moe_capacity"] = {"start": 1.5, "end": 1.1, "from_epoch": 1}
    Trainer(config).train()
    said = capsys.readouterr().out
    first, second = said.index("MoE is on (epoch=1, step=6)"), said.index("MoE capacity 1.50")
    assert said.index("Epoch 1/3") < first < second < said.index("Epoch 2/3") < said.index("MoE capacity 1.30")


def test_a_checkpoint_says_whether_the_experts_are_on(config: Config) -> None:
    config["schedules"] = {"enable_moe_at_epoch": 1, "route_temp": {"start": 1.5, "end": 0.8}}
    trainer = train(config)
    own = evaluate(trainer.model, trainer.data.val, 8, trainer.device)["val_loss"]
    run = RunFolder(trainer.run_dir)
    assert evaluate_run(run, device="cpu")["val_loss"] == pytest.approx(own, abs=1e-6)

    config["schedules"] = {"enable_moe_at_epoch": 2}
    config["training"]["max_steps"] = 6
    dense = train(config)
    own = evaluate(dense.model, dense.data.val, 8, dense.device)["val_loss"]
    assert evaluate_run(RunFolder(dense.run_dir), device="cpu")["val_loss"] == pytest.approx(own, abs=1e-6)


def test_without_a_schedule_they_are_on_at_once_each_drawn_on_its_own(config: Config) -> None:
    del config["schedules"]
    drawn: list[Tensor] = []

    class Watch:
        def on_training_start(self, trainer: Any) -> None:
            assert all(layer.active for layer in layers(trainer))
            drawn.append(next(layers(trainer)[0].experts.copies_of("w_in.weight")).detach().clone())

    found = losses(train(config, Watch()))
    assert found[17] < found[1]
    assert all(not torch.equal(drawn[0][0], other) for other in drawn[0][1:])
    assert torch.allclose(drawn[0].std(dim=(1, 2)), torch.full((EXPERTS,), 0.02), rtol=0.2)


def test_a_capacity_below_one_is_said_and_taken_as_one(config: Config) -> None:
    config["schedules"]["moe_capacity"] = {"start": 1.2, "end": 0.6}
    with pytest.warns(AptWarning, match="moe_capacity: 0.8 leaves some tokens no expert, and is taken as 1"):
        trainer = train(config)
    assert layers(trainer)[0].capacity == 1.0


def test_the_bias_evens_the_load_without_a_loss(config: Config) -> None:
    config["model"]["moe"] |= {"balance_loss": 0.0, "bias_rate": 0.01}
    trainer = train(config)
    assert all(layer.selection_bias.abs().sum() > 0 for layer in layers(trainer))
    records = [r for r in read_metrics(trainer.run_dir / "metrics.jsonl") if r["event"] == "train"]
    assert records[-1]["aux_loss"] == 0


def test_accumulated_micro_batches_and_bf16_train(config: Config) -> None:
    config["training"] |= {"gradient_accumulation": 2, "mixed_precision": "bf16"}
    found = losses(train(config))
    assert found[max(found)] < found[min(found)]


def test_a_compiled_run_compiles_what_is_around_the_experts_once(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many rows each expert gets is another matter in every step."""
    config["schedules"] = {}
    plain = losses(train(config))
    config["training"]["compile"] = True
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # the graphs alone count here
    counters = torch._dynamo.utils.counters
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = losses(train(config))
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
