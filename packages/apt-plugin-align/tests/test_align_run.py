"""Alignment inside runs: when it goes on, that it starts paired, resumes bit for bit, accumulates, and is recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from small_run import StopAt, register_for_one_test, small_config, train
from torch import Tensor

from apt.core.errors import AptWarning, ConfigError
from apt.core.registry import registry
from apt.core.runs import RunFolder
from apt.evaluation.evaluate import evaluate, evaluate_run
from apt.training.metrics import read_metrics
from apt.training.signals import Interrupted
from apt.training.trainer import Trainer
from apt_plugin_align import plugin
from apt_plugin_align.align import BistateAlign

Config = dict[str, Any]
SWITCH = 4


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin's providers, in the registry that scripts use, for the length of one test."""
    register_for_one_test(monkeypatch, plugin)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """2 epochs of 6 steps with dropout, alignment from step 4 on."""
    return small_config(
        tmp_path,
        model={"align_name": "bistate_default", "bistate": {"stable_lag": 0.2}},
        schedules={"enable_align_at_step": SWITCH},
        training={"max_epochs": 2, "log_every": 1},
    )


class Weights:
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_step_end(self, trainer: Any) -> None:
        self.after.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})


def records(trainer: Trainer) -> list[dict[str, Any]]:
    return [r for r in read_metrics(trainer.run_dir / "metrics.jsonl") if r["event"] == "train"]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def averages(trainer: Trainer) -> dict[str, Tensor]:
    return {name: trainer.optimizer.state[p]["stable"] for name, p in trainer.model.named_parameters()}


# The provider


def test_it_is_made_with_and_without_a_section() -> None:
    align = BistateAlign()
    assert (align.alpha, align.beta, align.tau_align, align.enabled) == (0.35, 0.20, 0.15, False)
    assert (align.get_name(), align.get_version()) == ("bistate_default", "1.0.0")
    assert BistateAlign({"alpha": 0.5}).alpha == 0.5
    assert isinstance(registry.get("align", "bistate_default", {"beta": 0.1}), BistateAlign)


@pytest.mark.parametrize(
    "section", [{"alpha": -1}, {"tau_align": 0}, {"stable_lag": 1}, {"contrast_tokens": 1}, {"gamma": 1}]
)
def test_a_section_that_cannot_be_used_is_refused(section: dict[str, float], config: Config) -> None:
    with pytest.raises(ValidationError):
        BistateAlign(section)
    config["model"]["bistate"] = section
    with pytest.raises(ConfigError, match=f"bistate.{next(iter(section))}"):
        Trainer(config, quiet=True)


def states() -> tuple[Tensor, Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    logits, stable = torch.randn(2, 2, 3, 5).unbind()
    hidden, stable_hidden = torch.randn(2, 2, 3, 4).unbind()
    targets = torch.randint(0, 5, (2, 3))
    model_state = {
        "stable": {"logits": stable.requires_grad_(), "hidden": stable_hidden.requires_grad_()},
        "align": {"hidden": hidden.requires_grad_()},
    }
    return logits.requires_grad_(), targets, model_state


def test_the_loss_is_zero_while_disabled_and_where_a_state_is_missing() -> None:
    align = BistateAlign()
    logits, targets, model_state = states()
    assert align.compute_align_loss(logits, targets, model_state).item() == 0
    align.enabled = True
    assert align.compute_align_loss(logits, targets, model_state).item() > 0
    for state in ("stable", "align"):
        for lacking in ({k: v for k, v in model_state.items() if k != state}, {**model_state, state: None}):
            loss = align.compute_align_loss(logits, targets, lacking)
            assert loss.item() == 0
            assert loss.ndim == 0


def test_alpha_and_beta_weigh_the_two_terms() -> None:
    logits, targets, model_state = states()

    def loss(alpha: float, beta: float) -> float:
        align = BistateAlign({"alpha": alpha, "beta": beta})
        align.enabled = True
        return align.compute_align_loss(logits, targets, model_state).item()

    assert loss(0, 0) == 0
    assert loss(1, 0) > 0
    assert loss(0, 1) > 0
    assert loss(0.35, 0.2) == pytest.approx(0.35 * loss(1, 0) + 0.2 * loss(0, 1), rel=1e-5)


# In a run


def test_until_the_switch_the_run_is_the_one_without_the_plugin_bit_for_bit(config: Config) -> None:
    plain, aligned = Weights(), Weights()
    train(config, aligned)
    del config["model"]["align_name"], config["schedules"]
    train(config, plain)
    assert all(same(a, b) for a, b in zip(plain.after[:SWITCH], aligned.after[:SWITCH], strict=True))
    assert not same(plain.after[SWITCH], aligned.after[SWITCH])


def test_the_terms_are_in_the_metrics_from_the_switch_on_and_it_is_said_once(config: Config) -> None:
    notes: list[str] = []
    trainer = Trainer(config, quiet=True)
    trainer.note = notes.append  # type: ignore[assignment, method-assign]
    trainer.train()
    assert notes == [f"Alignment is on (epoch=0, step={SWITCH}): alpha 0.35, beta 0.2, tau 0.15"]
    for record in records(trainer):
        assert ("align_kl" in record) == ("align_infonce" in record) == (record["step"] >= SWITCH)
        if record["step"] >= SWITCH:
            assert record["align_kl"] > 0
            assert record["align_infonce"] > 0


def test_it_goes_on_at_an_epoch_and_without_a_schedule_at_once(config: Config) -> None:
    config["schedules"] = {"enable_align_at_epoch": 1}
    assert [r["step"] for r in records(train(config)) if "align_kl" in r] == list(range(6, 12))
    config["schedules"] = {}
    assert [r["step"] for r in records(train(config)) if "align_kl" in r] == list(range(12))


class Compare:
    """In each micro-batch, the terms that were returned beside the loss computed from the states they came from."""

    def __init__(self) -> None:
        self.pairs: list[tuple[float, float]] = []

    def attach(self, trainer: Trainer) -> None:
        align: Any = trainer.providers["align", "bistate_default"]
        inner: Callable[..., dict[str, Tensor]] = align.extra_losses

        def spy(trainer: Any, batch: Any, logits: Tensor, targets: Tensor, model_state: Any) -> dict[str, Tensor]:
            terms = inner(trainer, batch, logits, targets, model_state)
            whole = align.compute_align_loss(logits, targets, model_state)
            if terms:
                assert not model_state["stable"]["logits"].requires_grad
                assert not model_state["stable"]["hidden"].requires_grad
                self.pairs.append((sum(t.item() for t in terms.values()), whole.item()))
            return terms

        align.extra_losses = spy


def spied(config: Config) -> list[tuple[float, float]]:
    trainer, compare = Trainer(config, quiet=True), Compare()
    # The provider is built when the run's view first uses it; the spy has to be there before its hooks are taken.
    trainer.in_use.use("align", "bistate_default", lambda provider: provider)
    compare.attach(trainer)
    trainer.train()
    return compare.pairs


def test_the_terms_add_up_to_the_loss_and_their_weight_is_scheduled(config: Config) -> None:
    pairs = spied(config)
    assert len(pairs) == 12 - SWITCH
    assert all(terms == pytest.approx(whole, rel=1e-5) for terms, whole in pairs)
    config["schedules"]["align_weight"] = {"start": 2.0, "end": 0.0, "by": "step", "to_step": 8}
    pairs = spied(config)
    assert len(pairs) == 8 - SWITCH, "at a weight of zero nothing is computed"
    assert [terms / whole for terms, whole in pairs] == pytest.approx([1.0, 0.75, 0.5, 0.25], rel=1e-4)


def test_the_gradient_reaches_both_of_the_models_states_and_neither_of_the_stable_ones() -> None:
    logits, targets, model_state = states()
    align = BistateAlign()
    align.enabled = True
    stable, aligned = model_state["stable"], model_state["align"]
    without_graph = {key: x.detach() for key, x in stable.items()}
    align.compute_align_loss(logits, targets, {"stable": without_graph, "align": aligned}).backward()
    for x in (logits, aligned["hidden"]):
        assert x.grad is not None
        assert x.grad.abs().max() > 0


def test_accumulation_adds_up_the_terms_of_its_micro_batches(config: Config) -> None:
    """KL is a mean per token: dealt out to two micro-batches, the run is the same but for rounding."""
    config["model"] |= {"dropout": 0.0, "bistate": {"beta": 0.0, "stable_lag": 0.2}}
    one, two = Weights(), Weights()
    whole = records(train(config, one))
    config["training"] |= {"batch_size": 4, "gradient_accumulation": 2}
    halves = records(train(config, two))
    for name, weight in one.after[-1].items():
        torch.testing.assert_close(two.after[-1][name], weight, rtol=1e-3, atol=1e-4)
    assert [r["align_kl"] for r in halves if "align_kl" in r] == pytest.approx(
        [r["align_kl"] for r in whole if "align_kl" in r], rel=1e-2
    )


@pytest.mark.parametrize("stop", [SWITCH - 2, SWITCH, SWITCH + 1, SWITCH + 3])
def test_stopped_and_resumed_it_equals_the_uninterrupted_run(config: Config, stop: int) -> None:
    whole = train(config)
    trainer = Trainer(config, quiet=True)
    trainer.register_hook(StopAt(stop))
    with pytest.raises(Interrupted):
        trainer.train()
    resumed = train(config, resume=RunFolder(trainer.run_dir))
    assert same(dict(whole.model.named_parameters()), dict(resumed.model.named_parameters()))
    assert same(averages(whole), averages(resumed))
    assert not same(averages(whole), dict(whole.model.named_parameters()))


def test_evaluation_takes_the_stable_state_for_the_weights(config: Config) -> None:
    trainer = train(config)
    run = RunFolder(trainer.run_dir)
    assert evaluate_run(run, device="cpu")["val_loss"] == pytest.approx(trainer.metrics["val_loss"])
    stable = evaluate_run(run, device="cpu", state="stable")["val_loss"]
    trainer.model.load_state_dict({**trainer.model.state_dict(), **averages(trainer)})
    expected = evaluate(trainer.model, trainer.data.val, 8, trainer.device)["val_loss"]
    assert stable == pytest.approx(expected)
    assert stable != pytest.approx(trainer.metrics["val_loss"])


def test_documents_and_bf16_go_through_the_stable_pass(config: Config) -> None:
    config["data"]["document_mask"] = True
    config["training"]["mixed_precision"] = "bf16"
    rows = records(train(config))
    assert all(0 < r["align_infonce"] < 1 for r in rows if r["step"] > SWITCH)


class AddsAux(torch.nn.Module):
    """An FFN with an auxiliary loss, as a mixture of experts has one."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.linear = torch.nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), self.linear.weight.square().mean()


def test_a_layer_with_an_auxiliary_loss_is_no_hindrance(config: Config) -> None:
    class AuxFFN:
        def __init__(self, config: Any) -> None: ...

        def get_name(self) -> str:
            return "aux"

        def get_version(self) -> str:
            return "1"

        def create_layer(self, d_model: int, d_ff: int, **config: Any) -> AddsAux:
            return AddsAux(d_model)

    registry.register("ffn", "aux", AuxFFN)
    config["model"]["ffn_name"] = "aux"
    rows = records(train(config))
    assert {"aux_loss", "align_kl", "align_infonce"} <= rows[-1].keys()


def test_dropped_after_a_failure_the_run_goes_on_without_its_losses(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr("apt_plugin_align.align.stable_output", fails)
    with pytest.warns(AptWarning, match="training goes on without it"):
        trainer = train(config)
    rows = records(trainer)
    assert len(rows) == 12
    assert rows[-1]["dropped"] == ["align.bistate_default.extra_losses"]
    assert not any("align_kl" in r for r in rows)
    assert averages(trainer), "the average goes on"
