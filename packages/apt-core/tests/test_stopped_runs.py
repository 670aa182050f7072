"""What a run that was stopped, or has failed, still has to do, and what it keeps: as if nothing had happened."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_disk import slow_down_saves
from small_run import StopAt, register_for_one_test, small_config, train
from torch import Tensor, nn

from apt.checkpoint.store import CheckpointStore
from apt.core.errors import AptError, AptWarning, TrainingError
from apt.core.registry import registry
from apt.core.runs import RunFolder
from apt.modeling.layers.ffn import DefaultFFN
from apt.training.metrics import read_metrics
from apt.training.signals import Interrupted
from apt.training.trainer import Trainer

Config = dict[str, Any]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run of 3 epochs of 6 steps."""
    return small_config(tmp_path, model={"d_model": 8, "num_heads": 1, "num_layers": 1})


def ended_early(config: Config | str, error: type[AptError], words: str, *hooks: object, **options: Any) -> RunFolder:
    """The folder of a run that ends with this error."""
    trainer = Trainer(config, quiet=True, **options)
    for hook in hooks:
        trainer.register_hook(hook)
    with pytest.raises(error, match=words):
        trainer.train()
    return RunFolder(trainer.run_dir)


def stopped(config: Config, step: int, *hooks: object) -> RunFolder:
    return ended_early(config, Interrupted, "saved", *hooks, StopAt(step))


def resumed(run: RunFolder, *hooks: object, **overrides: Any) -> Trainer:
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return train(str(run.profile), *hooks, resume=run, overrides=dotted)


def store_of(run: Trainer | RunFolder) -> CheckpointStore:
    return CheckpointStore((run if isinstance(run, RunFolder) else RunFolder(run.run_dir)).checkpoints)


def evaluations(run: Trainer | RunFolder) -> list[tuple[int, int, float]]:
    path = run.metrics if isinstance(run, RunFolder) else run.run_dir / "metrics.jsonl"
    return [(r["step"], r["epoch"], r["val_loss"]) for r in read_metrics(path) if r["event"] == "eval"]


class Fails:
    """Lets the forward pass of training fail in one step, again and again."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_model_built(self, model: nn.Module, trainer: Trainer) -> None:
        def forward(module: nn.Module, inputs: Any) -> None:
            if module.training and trainer.step == self.step:
                self.fail()

        model.register_forward_pre_hook(forward)

    def fail(self) -> None:
        raise RuntimeError("it broke")


class Exits(Fails):
    """Leaves the program in one step, as if all were well."""

    def fail(self) -> None:
        sys.exit(0)


# The state of plugins


class Counter:
    """Counts the steps, and at one of them does not say how many there were."""

    def __init__(self, silent_at: int | None = None) -> None:
        self.count, self.silent_at = 0, silent_at

    def on_step_end(self) -> None:
        self.count += 1

    def on_checkpoint_save(self, trainer: Trainer) -> dict[str, int]:
        if trainer.step == self.silent_at:
            raise ValueError("not just now")
        return {"count": self.count}

    def on_checkpoint_load(self, state: dict[str, int]) -> None:
        self.count = state["count"]


@pytest.fixture
def frugal(config: Config) -> Config:
    """Each checkpoint takes the place of the one before, and a plugin that fails ends the run, of 12 steps."""
    config["training"]["max_epochs"] = 2
    return {**config, "on_plugin_error": "stop", "checkpoint": {"every": 3, "keep_last": 1, "keep_best": False}}


@pytest.mark.parametrize("silent_at", [6, 9])
def test_a_state_that_is_not_given_does_not_cost_the_state_that_is_saved(frugal: Config, silent_at: int) -> None:
    frugal["checkpoint"]["asynchronous"] = False
    whole = Counter()
    trainer = train(frugal, whole)
    run = ended_early(frugal, TrainingError, "not just now", Counter(silent_at))
    kept = store_of(run).load()
    assert store_of(run).steps() == [kept.step] == [silent_at - 3]
    assert kept.plugins["Counter"] == {"count": kept.step}
    again = Counter()
    resumed(run, again)
    assert again.count == whole.count == 12
    weights = store_of(trainer).load().model
    assert all(torch.equal(weights[name], weight) for name, weight in store_of(run).load().model.items())


def test_nor_does_it_where_that_state_is_still_being_saved(frugal: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down_saves(monkeypatch, 0.3)
    run = ended_early(frugal, TrainingError, "not just now", Counter(silent_at=6))
    assert store_of(run).steps() == [3]


# Whoever leaves the program


def test_a_layer_that_calls_sys_exit_fails_and_the_run_is_saved(config: Config) -> None:
    run = ended_early(config, TrainingError, r"step 5 failed: .*sys\.exit\(0\) was called.*the run is saved", Exits(5))
    assert store_of(run).latest() == 5
    assert resumed(run).step == 18


def test_a_model_that_calls_sys_exit_cannot_be_trained(config: Config, tmp_path: Path) -> None:
    class ExitsAtOnce:
        def on_model_built(self, model: nn.Module) -> None:
            model.register_forward_pre_hook(lambda *_: sys.exit(0))

    with pytest.raises(TrainingError, match="the model cannot be trained: the first batch fails with SystemExit"):
        train(config, ExitsAtOnce())
    assert not (tmp_path / "runs").exists()


# What was due


class Worsens:
    """From the fourth step on makes the model so much worse that it is never again as good as after the third."""

    def on_step_end(self, step: int, trainer: Trainer) -> None:
        if 3 <= step < 9:
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.mul_(2.0)


@pytest.fixture
def best_early(config: Config) -> Config:
    """A run whose best checkpoint is that of its first evaluation, in mid-epoch."""
    config["training"] |= {"eval_every": 3}
    return {**config, "checkpoint": {"every": None, "keep_last": 1, "keep_best": True}}


def test_an_evaluation_that_was_due_when_the_run_was_stopped_is_made_when_it_goes_on(best_early: Config) -> None:
    whole = train(best_early, Worsens())
    assert store_of(whole).steps() == [3, 18], "the best and the last"
    run = stopped(best_early, 3, Worsens())
    assert evaluations(run) == []
    resumed(run, Worsens())
    assert evaluations(run) == evaluations(whole)
    assert store_of(run).steps() == [3, 18] and store_of(run).best() == 3


def test_so_is_one_that_was_due_when_the_run_failed(best_early: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    fuse = [False]

    class Fuse(DefaultFFN):
        """As a provider in use it is more than an observer: under `stop` its failure ends the run."""

        def get_name(self) -> str:
            return "short_fuse"

        def on_step_end(self, step: int) -> None:
            if fuse[0] and step == 2:
                raise ValueError("the fuse blew")

    register_for_one_test(monkeypatch)
    registry.register("ffn", "short_fuse", Fuse)
    best_early["model"]["ffn_name"] = "short_fuse"
    best_early["on_plugin_error"] = "stop"
    whole = train(best_early, Worsens())
    fuse[0] = True
    run = ended_early(best_early, TrainingError, "the fuse blew", Worsens())
    assert store_of(run).steps() == [3] and evaluations(run) == []
    fuse[0] = False
    resumed(run, Worsens())
    assert evaluations(run) == evaluations(whole)
    assert store_of(run).steps() == store_of(whole).steps() == [3, 18]


def test_an_evaluation_that_was_made_is_not_made_again(best_early: Config) -> None:
    whole = train(best_early)
    run = ended_early(best_early, TrainingError, "it broke", Fails(3))
    assert evaluations(run) == evaluations(whole)[:1]
    resumed(run)
    assert evaluations(run) == evaluations(whole)


def test_the_steps_since_the_last_record_are_recorded_when_the_run_is_stopped(config: Config) -> None:
    config["training"]["log_every"] = 10
    losses: list[float] = []

    class Look:
        def on_step_end(self, loss: Tensor) -> None:
            losses.append(loss.item())

    (record,) = read_metrics(stopped(config, 4, Look()).metrics)
    assert (record["event"], record["step"], record["epoch"]) == ("train", 3, 0)
    assert len(losses) == 4 and record["loss"] == pytest.approx(sum(losses) / 4)


def test_a_resume_that_fails_at_once_leaves_its_checkpoint_the_best(config: Config) -> None:
    run = RunFolder(train(config, overrides={"training.max_epochs": 1}).run_dir)
    before = store_of(run).load()
    assert store_of(run).best() == 6 and before.metrics["val_loss"] > 0
    longer = {"training.max_epochs": 3}
    ended_early(str(run.profile), TrainingError, "it broke.*the run is saved", Fails(6), resume=run, overrides=longer)
    assert store_of(run).best() == 6
    assert store_of(run).load().metrics == before.metrics


# How long it is


@pytest.mark.parametrize("end", [{"training__max_steps": 5}, {"training__max_steps": 8}, {"training__max_epochs": 1}])
def test_a_run_that_is_past_its_new_end_trains_no_further_step(config: Config, end: dict[str, int]) -> None:
    run = stopped(config, 8)
    before = store_of(run).load()
    steps: list[int] = []

    class Look:
        def on_step_start(self, step: int) -> None:
            steps.append(step)

    trainer = resumed(run, Look(), **end)
    assert (trainer.step, steps) == (8, [])
    after = store_of(run).load()
    assert after.step == 8 and all(torch.equal(after.model[name], weight) for name, weight in before.model.items())
    assert after.metrics["val_loss"] > 0, "it ends as every run does"


@pytest.mark.parametrize("batch_size", [4, 16])
def test_a_schedule_by_step_ends_with_the_run_also_where_its_epochs_have_become_others(
    config: Config, batch_size: int
) -> None:
    config["schedules"] = {"foo": {"start": 1.0, "end": 0.0, "by": "step"}}
    values: list[float | None] = []

    class Look:
        def on_step_start(self, step: int, trainer: Trainer) -> None:
            values.append(trainer.schedule.get_param("foo", step=step))

    run = stopped(config, 5, Look())
    with pytest.warns(AptWarning, match="dealt out in another way"):
        trainer = resumed(run, Look(), training__batch_size=batch_size)
    end = trainer.total_steps
    assert end == trainer.step != 3 * trainer.steps_per_epoch
    assert trainer.schedule.get_param("foo", step=end) == 0.0
    assert trainer.schedule.get_param("foo", step=end - 1) == values[-1] == pytest.approx(1 / end)


# What it goes on with


def test_what_a_hook_keeps_in_the_optimizer_keeps_its_dtype_and_value(config: Config) -> None:
    class Keeps:
        """A count too large, and numbers too fine, for the dtype of the weights."""

        def on_step_end(self, step: int, trainer: Trainer) -> None:
            if step == 0:
                for parameter in trainer.model.parameters():
                    fine = torch.full(parameter.shape, 1 / 3, dtype=torch.float64)
                    trainer.optimizer.state[parameter] |= {"fine": fine, "count": torch.tensor(2**53 + 1)}

    class Look:
        states: list[dict[str, Any]]

        def on_training_start(self, trainer: Trainer) -> None:
            self.states = [dict(trainer.optimizer.state[parameter]) for parameter in trainer.model.parameters()]

    look = Look()
    resumed(stopped(config, 4, Keeps()), look)
    assert len(look.states) > 5
    for state in look.states:
        assert state["fine"].dtype == torch.float64 and bool((state["fine"] == 1 / 3).all())
        assert state["count"].dtype == torch.int64 and state["count"].item() == 2**53 + 1
        assert state["exp_avg"].dtype == torch.float32


class Draws:
    """Draws from the generators that the run does not use itself."""

    def __init__(self) -> None:
        self.numbers: list[tuple[float, float]] = []

    def on_step_start(self) -> None:
        self.numbers.append((random.random(), float(np.random.rand())))


def test_all_random_numbers_are_those_of_the_seed(config: Config) -> None:
    one, two, other, half, rest = (Draws() for _ in range(5))
    train(config, one)
    train(config, two)
    assert len(one.numbers) == 18 and two.numbers == one.numbers
    train(config, other, overrides={"training.seed": 7})
    assert not {number for pair in other.numbers for number in pair} & {n for pair in one.numbers for n in pair}
    resumed(stopped(config, 8, half), rest)
    assert half.numbers + rest.numbers == one.numbers
