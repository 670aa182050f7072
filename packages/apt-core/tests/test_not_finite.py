"""NaN, inf and -inf in a loss, a gradient, a weight or a moment: what each policy makes of them, and that no checkpoint
holds any."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import small_config
from torch import Tensor

from apt.checkpoint.store import CheckpointStore
from apt.core.errors import NotFiniteError
from apt.core.runs import RunFolder
from apt.training.finite import MAX_ROLLBACKS, MAX_SKIPPED, all_finite
from apt.training.metrics import read_metrics
from apt.training.signals import Interrupted
from apt.training.trainer import Trainer

Config = dict[str, Any]
VALUES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run of 12 steps, 6 an epoch, with a checkpoint after every third."""
    return small_config(
        tmp_path,
        plugins=[],
        model={"d_model": 8, "num_heads": 1, "num_layers": 1},
        training={"max_epochs": 2},
        checkpoint={"every": 3, "keep_last": 99},
    )


class Poison:
    """Puts a value that is no number somewhere, at the steps given."""

    def __init__(self, where: str, value: float, *steps: int) -> None:
        self.where, self.value, self.steps = where, value, steps
        self.taken: list[int] = []

    def extra_losses(self, trainer: Trainer) -> dict[str, Tensor]:
        bad = self.where == "loss" and trainer.step in self.steps
        return {"extra": torch.tensor(self.value if bad else 0.0)}

    def on_before_optimizer_step(self, trainer: Trainer) -> None:
        if self.where == "gradient" and trainer.step in self.steps:
            next(iter(trainer.model.parameters())).grad.view(-1)[0] = self.value  # type: ignore[union-attr]

    def on_step_end(self, step: int, trainer: Trainer) -> None:
        self.taken.append(step)
        if step not in self.steps:
            return
        weight = next(iter(trainer.model.parameters()))
        with torch.no_grad():
            if self.where == "weight":
                weight.view(-1)[0] = self.value
            if self.where == "moment":
                trainer.optimizer.state[weight]["exp_avg_sq"].view(-1)[0] = self.value


def run(config: Config, policy: str, *hooks: object, resume: RunFolder | None = None) -> Trainer:
    config["training"]["on_not_finite"] = policy
    trainer = Trainer(config, quiet=True, resume=resume)
    for hook in hooks:
        trainer.register_hook(hook)
    trainer.train()
    return trainer


def stopped(config: Config, policy: str, poison: Poison) -> tuple[CheckpointStore, NotFiniteError]:
    trainer = Trainer({**config, "training": {**config["training"], "on_not_finite": policy}}, quiet=True)
    trainer.register_hook(poison)
    with pytest.raises(NotFiniteError) as error:
        trainer.train()
    assert error.value.exit_code == 2
    assert_finite(trainer.saver.store)
    return trainer.saver.store, error.value


def assert_finite(store: CheckpointStore) -> None:
    for step in store.steps():
        checkpoint = store.load(step)
        moments = [value for state in checkpoint.optimizer["state"].values() for value in state.values()]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in (*checkpoint.model.values(), *moments)), step


@pytest.mark.parametrize("where", ["loss", "gradient", "weight", "moment"])
@pytest.mark.parametrize(("value", "every"), [(math.nan, 1), (math.nan, 3), (math.inf, 1), (-math.inf, 3)])
def test_stop_ends_the_run_and_keeps_what_was_good(config: Config, where: str, value: float, every: int) -> None:
    config["checkpoint"]["every"] = every
    store, error = stopped(config, "stop", Poison(where, value, 7))
    # Poisoned in the eighth step. Whether a checkpoint is due just then or later, none holds it.
    assert store.latest() == (7 if every == 1 else 6)
    assert f"the checkpoint of step {store.latest()} is kept" in error.message


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
@pytest.mark.parametrize("where", ["loss", "gradient", "weight"])
def test_nothing_is_saved_where_the_first_step_is_bad(config: Config, policy: str, where: str) -> None:
    if policy == "skip" and where != "weight":
        assert run(config, policy, Poison(where, math.nan, 0)).step == 12
        return
    store, error = stopped(config, policy, Poison(where, math.nan, 0))
    assert store.steps() == [] and "nothing was saved yet" in error.message


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_skip_passes_the_step_over(config: Config, where: str, value: float) -> None:
    poison = Poison(where, value, 2, 7, 8, 11)
    trainer = run(config, "skip", poison)
    assert (trainer.step, trainer.epoch) == (12, 2)
    assert poison.taken == [0, 1, 3, 4, 5, 6, 9, 10]
    assert trainer.saver.store.steps() == [3, 6, 9, 12]
    assert_finite(trainer.saver.store)
    records = list(read_metrics(trainer.run_dir / "metrics.jsonl"))
    assert sum(record.get("not_finite", 0) for record in records) == 4
    assert all(record["loss"] is not None for record in records if record["event"] == "train")
    wrong = "the loss, by 'extra' of Poison" if where == "loss" else "the gradients"
    assert f"not finite at step 3: {wrong}; passed over" in (trainer.run_dir / "run.log").read_text()


def test_a_step_that_is_passed_over_leaves_weights_and_moments_alone(config: Config) -> None:
    config["checkpoint"]["every"] = 1
    store = run(config, "skip", Poison("gradient", math.nan, 4)).saver.store
    before, after, later = (store.load(step) for step in (4, 5, 6))
    assert all(torch.equal(after.model[name], weight) for name, weight in before.model.items())
    for index, state in before.optimizer["state"].items():
        assert all(torch.equal(after.optimizer["state"][index][name], value) for name, value in state.items())
    assert not all(torch.equal(later.model[name], weight) for name, weight in before.model.items())


def test_skip_gives_up_where_nothing_is_trained_any_more(config: Config) -> None:
    store, error = stopped(config, "skip", Poison("loss", math.nan, *range(1, 99)))
    assert f"at step {MAX_SKIPPED + 2}, after {MAX_SKIPPED} steps that were passed over: the loss" in error.message
    assert store.steps(), "what was good is saved meanwhile"


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_skip_cannot_mend_what_is_kept(config: Config, where: str) -> None:
    store, error = stopped(config, "skip", Poison(where, math.inf, 6))
    assert store.latest() == 6 and "the checkpoint of step 6 is kept" in error.message


@pytest.mark.parametrize(
    ("where", "value"),
    [("loss", math.nan), ("loss", -math.inf), ("gradient", math.inf), ("weight", math.nan), ("moment", math.inf)],
)
def test_rollback_goes_on_from_the_last_checkpoints_weights(config: Config, where: str, value: float) -> None:
    trainer = run(config, "rollback", Poison(where, value, 7))
    assert (trainer.step, trainer.epoch) == (12, 2)
    assert_finite(trainer.saver.store)
    log = (trainer.run_dir / "run.log").read_text()
    assert "; going on with the state of step 6" in log
    assert trainer.saver.store.latest() == 12


def test_what_is_rolled_back_is_the_state_of_the_checkpoint(config: Config) -> None:
    seen: list[bool] = []
    states: list[int] = []

    class Look:
        """Compares the weights before step 8 with those of the checkpoint of step 6."""

        def on_step_start(self, step: int, trainer: Trainer) -> None:
            if step == 8:
                kept = trainer.saver.store.load(6)
                seen.append(all(torch.equal(kept.model[k], v) for k, v in trainer.model.state_dict().items()))
                moments = trainer.optimizer.state_dict()["state"]
                seen.extend(
                    torch.equal(moments[index][name], value)
                    for index, state in kept.optimizer["state"].items()
                    for name, value in state.items()
                )

        def on_checkpoint_save(self, trainer: Trainer) -> dict[str, int]:
            return {"step": trainer.step}

        def on_checkpoint_load(self, state: dict[str, int]) -> None:
            states.append(state["step"])

    run(config, "rollback", Poison("loss", math.nan, 7), Look())
    assert len(seen) > 10 and all(seen)
    assert states == [6]


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_run_that_has_met_them_resumes_bit_for_bit(config: Config, policy: str) -> None:
    class StopAt:
        def on_step_end(self, step: int) -> None:
            if step == 9:
                signal.raise_signal(signal.SIGINT)

    whole = run(config, policy, Poison("loss", math.nan, 4, 7))
    trainer = Trainer(config, quiet=True)
    trainer.register_hook(Poison("loss", math.nan, 4, 7))
    trainer.register_hook(StopAt())
    with pytest.raises(Interrupted):
        trainer.train()
    half = RunFolder(trainer.run_dir)
    again = run(config, policy, Poison("loss", math.nan, 4, 7), resume=half)
    a, b = whole.saver.store.load(12), again.saver.store.load(12)
    assert all(torch.equal(a.model[name], b.model[name]) for name in a.model)


def test_rollback_gives_up_where_it_leads_nowhere(config: Config) -> None:
    config["checkpoint"]["every"] = 100
    store, error = stopped(config, "rollback", Poison("loss", math.nan, *range(7, 99)))
    assert store.steps() == [6]
    tried = f"after {MAX_ROLLBACKS} returns to the last checkpoint: the loss, by 'extra' of Poison"
    assert f"{tried}; the checkpoint of step 6 is kept" in str(error)


class TwoLosses:
    """A loss that is sound at every step, and one that is none at one of them."""

    def __init__(self, step: int) -> None:
        self.step = step

    def extra_losses(self, trainer: Trainer, logits: Tensor) -> dict[str, Tensor]:
        return {"sound": 0.01 * logits.mean(), "bad": logits.mean() * (math.nan if trainer.step == self.step else 0.0)}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("policy", "log_every"), [("stop", 1), ("stop", 4), ("stop", 99), ("rollback", 2)])
def test_the_plugin_whose_loss_it_was_is_named(config: Config, policy: str, log_every: int, accumulation: int) -> None:
    config["training"] |= {"log_every": log_every, "batch_size": 8 // accumulation, "on_not_finite": policy}
    config["training"]["gradient_accumulation"] = accumulation
    trainer = Trainer(config, quiet=True)
    trainer.register_hook(Poison("loss", 0.0))
    trainer.register_hook(TwoLosses(1 if policy == "rollback" else 7))  # there is nothing to go back to before step 3
    with pytest.raises(NotFiniteError) as error:
        trainer.train()
    # What came after it, the cross-entropy included, is not finite either.
    assert ": the loss, by 'bad' of TwoLosses; " in error.value.message
    assert error.value.hint == "mend 'bad' of TwoLosses, or train without it"


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_no_plugin_is_blamed_for_what_the_model_made(config: Config, policy: str) -> None:
    config["training"]["on_not_finite"] = policy
    trainer = Trainer(config, quiet=True)
    trainer.register_hook(TwoLosses(99))  # its losses come of the logits
    trainer.register_hook(Poison("weight", math.nan, 6))
    with pytest.raises(NotFiniteError) as error:
        trainer.train()
    assert "TwoLosses" not in str(error.value)
    assert error.value.hint == "lower training.learning_rate, or set training.gradient_clip"


class Buffer:
    """Gives the model a buffer, and puts a value in it at one step."""

    def __init__(self, value: float, step: int, *, persistent: bool = True) -> None:
        self.value, self.step, self.persistent = value, step, persistent

    def on_model_built(self, model: torch.nn.Module) -> None:
        model.register_buffer("seen", torch.zeros(3), persistent=self.persistent)

    def on_step_end(self, step: int, trainer: Trainer) -> None:
        if step == self.step:
            trainer.model.get_buffer("seen")[1] = self.value


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_buffer_that_is_saved_and_is_no_number_ends_the_run(config: Config, policy: str) -> None:
    config["training"]["on_not_finite"] = policy
    trainer = Trainer(config, quiet=True)
    trainer.register_hook(Buffer(math.nan, 7))
    # It is noticed when the run is to be saved, for no loss shows it.
    with pytest.raises(NotFiniteError, match=r"at step 9: a buffer of the model; the checkpoint of step 6 is kept"):
        trainer.train()
    store = trainer.saver.store
    assert store.steps() == [3, 6]
    assert all(bool(torch.isfinite(store.load(step).model["seen"]).all()) for step in store.steps())


def test_rollback_takes_a_buffer_back_too(config: Config) -> None:
    trainer = run(config, "rollback", Buffer(math.nan, 7))
    assert "a buffer of the model; going on with the state of step 6" in (trainer.run_dir / "run.log").read_text()
    assert torch.equal(trainer.saver.store.load(12).model["seen"], torch.zeros(3))


@pytest.mark.parametrize(("value", "persistent"), [(math.inf, True), (-math.inf, True), (math.nan, False)])
def test_a_buffer_may_hold_infinity_and_anything_if_it_is_not_saved(
    config: Config, value: float, persistent: bool
) -> None:
    trainer = run(config, "stop", Buffer(value, 7, persistent=persistent))
    assert trainer.step == 12 and trainer.saver.store.steps() == [3, 6, 9, 12]
    saved = trainer.saver.store.load(12).model
    assert saved["seen"][1].item() == value if persistent else "seen" not in saved


def test_a_run_never_ends_well_with_weights_that_are_not(config: Config) -> None:
    store, _ = stopped(config, "rollback", Poison("weight", math.nan, 11))
    assert store.latest() == 9


def test_all_finite_follows_its_definition() -> None:
    big = torch.full((3,), 3e38)
    assert all_finite([]) and all_finite([big, torch.arange(4), torch.empty(0), torch.ones(2, dtype=torch.float64)])
    assert not bool(torch.isfinite(big.sum())), "a sum that overflows says nothing"
    for value in VALUES.values():
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            bad = torch.zeros(5, dtype=dtype)
            bad[3] = value
            assert not all_finite([torch.ones(2), bad]) and not all_finite([big, bad])
    assert not all_finite([torch.tensor([math.inf, -math.inf])])
