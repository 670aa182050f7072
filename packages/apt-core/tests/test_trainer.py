"""The trainer: the order of events, resuming bit for bit, failures, and what a run leaves behind."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_types import MakeDistribution
from safetensors.torch import load_file
from small_disk import slow_down_saves
from small_run import StopAt, small_config, train
from torch import Tensor

from apt import hookspecs
from apt.checkpoint.store import CheckpointStore, Snapshot
from apt.core.errors import (
    AptWarning,
    CheckpointError,
    ConfigError,
    DeviceError,
    PluginError,
    ProviderError,
    RunInUseError,
    TrainingError,
)
from apt.core.registry import registry
from apt.core.runs import RunFolder
from apt.modeling.layers.ffn import DefaultFFN
from apt.training.metrics import read_metrics
from apt.training.signals import Interrupted
from apt.training.trainer import Trainer

Config = dict[str, Any]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run of 3 epochs of 6 steps, with dropout, so that the random state matters."""
    return small_config(tmp_path)


def interrupted_run(config: Config, step: int, *hooks: object) -> RunFolder:
    trainer = Trainer(config, quiet=True)
    for hook in (*hooks, StopAt(step)):
        trainer.register_hook(hook)
    with pytest.raises(Interrupted) as stopped:
        trainer.train()
    assert stopped.value.exit_code == 130
    return RunFolder(trainer.run_dir)


def last_weights(run_dir: Path) -> dict[str, Tensor]:
    newest = max((run_dir / "checkpoints").iterdir())
    return load_file(newest / "model.safetensors")


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class EventRecorder:
    """Writes down every event it hears."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_config_resolved(self, config: Any) -> None:
        self.events.append("config")

    def on_model_built(self, model: Any, trainer: Any) -> None:
        self.events.append("model")

    def on_optimizer_built(self, optimizer: Any, trainer: Any) -> None:
        self.events.append("optimizer")

    def on_checkpoint_load(self, state: Any, trainer: Any) -> None:
        self.events.append(f"load {state['n']}")

    def on_training_start(self, trainer: Any) -> None:
        self.events.append("start")

    def on_epoch_start(self, epoch: int, trainer: Any) -> None:
        self.events.append(f"epoch {epoch}")

    def on_step_start(self, step: int, batch: Any, trainer: Any) -> None:
        assert trainer.step == step
        assert batch.tokens.shape == (trainer.config.training.batch_size, 16)
        self.events.append(f"step {step}")

    def extra_losses(
        self, trainer: Any, batch: Any, logits: Tensor, targets: Tensor, model_state: dict[str, Any]
    ) -> None:
        assert logits.shape[:2] == targets.shape == model_state["tokens"].shape
        self.events.append("losses")

    def on_before_optimizer_step(self, optimizer: Any, trainer: Any) -> None:
        assert all(p.grad is not None for p in trainer.model.parameters())
        self.events.append("before")

    def on_step_end(self, step: int, loss: Tensor, trainer: Any) -> None:
        assert trainer.step == step + 1
        assert loss.ndim == 0
        assert not loss.requires_grad
        self.events.append("end")

    def on_log(self, record: Any) -> None:
        self.events.append(f"log {record['event']}")

    def on_evaluation_end(self, metrics: Any, trainer: Any) -> None:
        assert metrics["val_loss"] > 0
        self.events.append("eval")

    def on_epoch_end(self, epoch: int, trainer: Any) -> None:
        self.events.append(f"epoch end {epoch}")

    def on_checkpoint_save(self, trainer: Any) -> dict[str, int]:
        self.events.append("save")
        return {"n": len(self.events)}

    def on_training_end(self, trainer: Any) -> None:
        self.events.append("done")


def test_every_event_fires_once_and_in_the_documented_order(config: Config) -> None:
    config["training"] |= {"max_epochs": 2, "gradient_accumulation": 2, "batch_size": 8, "log_every": 2}
    del config["training"]["learning_rate"]
    recorder = EventRecorder()
    recorder.on_step_start = lambda step, batch, trainer: recorder.events.append(f"step {step}")  # type: ignore[method-assign]
    train(config, recorder)
    step = ["losses", "losses", "before", "end"]
    epoch = ["step 0", *step, "step 1", *step, "log train", "step 2", *step, "log train"]
    assert recorder.events == [
        "config", "model", "optimizer", "start",
        "epoch 0", *epoch, "eval", "log eval", "epoch end 0", "save",
        "epoch 1", "step 3", *step, "log train", "step 4", *step, "step 5", *step, "log train",
        "eval", "log eval", "epoch end 1", "save",
        "done",
    ]  # fmt: skip


def test_evaluations_and_checkpoints_within_an_epoch(config: Config) -> None:
    config["training"] |= {"max_epochs": 1, "eval_every": 2, "log_every": 100}
    config["checkpoint"] = {"every": 3, "keep_best": False, "keep_last": 9}
    recorder = EventRecorder()
    trainer = train(config, recorder)
    kept = [event for event in recorder.events if event in ("eval", "save")]
    assert kept == ["eval", "save", "eval", "eval", "save"], "after 2, 3, 4 and at the end, once"
    assert [path.name for path in sorted((trainer.run_dir / "checkpoints").iterdir())] == [
        "step-00000003",
        "step-00000006",
    ]


def test_a_run_learns_and_leaves_what_it_should(config: Config) -> None:
    trainer = train(config)
    run = RunFolder(trainer.run_dir)
    assert run.path.name == "small-1"
    records = list(read_metrics(run.metrics))
    losses = [record["loss"] for record in records if record["event"] == "train"]
    assert len(losses) == 9
    assert losses[-1] < losses[0] - 0.5
    lock = json.loads(run.lock.read_text())
    slots = {slot["kind"]: slot for slot in lock["slots"]}
    assert slots["attention"]["name"] == "tva_default"
    assert slots["attention"]["fallback"] is False
    assert any("w_in" in key for key in slots["attention"]["weights"])
    assert train(str(run.profile)).run_dir.name == "small-2", "a run's profile runs as it is"


@pytest.mark.parametrize("step", [1, 5, 6, 7, 12, 17, 18])
def test_k_steps_and_the_rest_after_a_resume_are_the_whole_run_bit_for_bit(
    config: Config, step: int, tmp_path: Path
) -> None:
    config["training"]["gradient_accumulation"] = 2 if step == 5 else 1
    config["training"]["batch_size"] = 4 if step == 5 else 8
    whole = train(config)
    run = interrupted_run(config, step)
    assert train(str(run.profile), resume=run).run_dir == run.path
    assert_same(last_weights(whole.run_dir), last_weights(run.path))

    def facts(folder: Path) -> list[tuple[Any, ...]]:
        records = read_metrics(folder / "metrics.jsonl")
        return [(r["event"], r["step"], r["epoch"], r.get("val_loss")) for r in records if r["event"] == "eval"]

    assert facts(whole.run_dir) == facts(run.path), "no step is recorded twice or lost"


def test_the_state_of_plugins_is_kept_per_plugin_and_carried_where_it_is_absent(config: Config) -> None:
    class Counter:
        def __init__(self) -> None:
            self.state: dict[str, Any] = {"n": 0, "ema": torch.zeros(3)}
            self.loaded: list[Any] = []

        def on_step_end(self) -> None:
            self.state["n"] += 1
            self.state["ema"] = self.state["ema"] + 1

        def on_checkpoint_save(self) -> dict[str, Any]:
            return self.state

        def on_checkpoint_load(self, state: dict[str, Any]) -> None:
            self.state = state
            self.loaded.append(state["n"])

    run = interrupted_run(config, 4, Counter())
    trainer = Trainer(str(run.profile), resume=run, quiet=True)
    trainer.register_hook(StopAt(5))
    with pytest.warns(AptWarning, match="holds state of 'Counter', which is not here"), pytest.raises(Interrupted):
        trainer.train()
    counter = Counter()
    train(str(run.profile), counter, resume=run)
    assert counter.loaded == [4]
    assert counter.state["n"] == 4 + 13
    assert torch.equal(counter.state["ema"], torch.full((3,), 17.0))


def test_a_finished_run_can_be_resumed_with_more_epochs(config: Config) -> None:
    first = train(config)
    run = RunFolder(first.run_dir)
    again = train(str(run.profile), resume=run)
    assert again.step == first.step, "nothing was left to do"
    longer = train(str(run.profile), resume=run, overrides={"training.max_epochs": 4})
    assert (longer.step, longer.epoch) == (24, 4)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(config: Config) -> None:
    run = RunFolder(train(config).run_dir)
    newest = max(run.checkpoints.iterdir()) / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    with pytest.warns(AptWarning, match="damaged"):
        assert train(str(run.profile), resume=run).step == 18


def test_resuming_with_another_model_is_refused(config: Config) -> None:
    run = RunFolder(train(config).run_dir)
    with pytest.raises(CheckpointError, match="does not fit"):
        train(str(run.profile), resume=run, overrides={"model.d_ff": 32})
    with pytest.raises(CheckpointError, match="built with attention:tva_default"):
        train(str(run.profile), resume=run, overrides={"model.attention_name": "mha"})


def test_a_changed_text_is_pointed_out(config: Config) -> None:
    run = interrupted_run(config, 4)
    path = Path(config["data"]["train_path"])
    path.write_text(path.read_text().replace("green", "brown"))
    with pytest.warns(AptWarning, match="not the one this run began with"):
        train(str(run.profile), resume=run)


def test_a_folder_that_holds_a_run_is_not_overwritten(config: Config, tmp_path: Path) -> None:
    train(config, run_dir=tmp_path / "mine")
    with pytest.raises(CheckpointError, match="holds a run already"):
        train(config, run_dir=tmp_path / "mine")


def test_what_fails_while_building_leaves_no_folder(config: Config, tmp_path: Path) -> None:
    config["data"]["tokenizer"] = "bite"
    with pytest.raises(ValueError, match="did you mean 'byte'"):
        train(config)
    assert not (tmp_path / "runs").exists()


def test_an_observer_that_fails_changes_nothing(config: Config) -> None:
    class Broken:
        def on_step_end(self) -> None:
            raise ValueError("broken observer")

    whole = train(config)
    with pytest.warns(AptWarning, match="broken observer"):
        disturbed = train(config, Broken())
    assert_same(last_weights(whole.run_dir), last_weights(disturbed.run_dir))
    assert "Traceback" in (disturbed.run_dir / "run.log").read_text()


class BrokenEffect:
    """Adds a loss, until it fails at the third step."""

    def __init__(self) -> None:
        self.calls = 0

    def extra_losses(self, logits: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == 3:
            raise ValueError("broken effect")
        return {"penalty": 0.01 * logits.square().mean()}


def test_an_effect_that_fails_is_dropped_recorded_and_stays_off_after_a_resume(config: Config) -> None:
    effect = BrokenEffect()
    trainer = Trainer(config, quiet=True)
    trainer.register_hook(effect)
    trainer.register_hook(StopAt(7))
    with pytest.warns(AptWarning, match="training goes on without it"), pytest.raises(Interrupted):
        trainer.train()
    assert effect.calls == 3
    records = list(read_metrics(trainer.run_dir / "metrics.jsonl"))
    assert "penalty" in records[0]
    assert records[1]["dropped"] == ["BrokenEffect.extra_losses"]
    run, fresh = RunFolder(trainer.run_dir), BrokenEffect()
    with pytest.warns(AptWarning, match=r"going on without BrokenEffect\.extra_losses"):
        train(str(run.profile), fresh, resume=run)
    assert fresh.calls == 0


def test_under_stop_an_effect_that_fails_ends_the_run_after_saving(config: Config) -> None:
    config["on_plugin_error"] = "stop"
    trainer = Trainer(config, quiet=True)
    trainer.register_hook(BrokenEffect())
    with pytest.raises(TrainingError, match="broken effect"):
        trainer.train()
    assert [path.name for path in (trainer.run_dir / "checkpoints").iterdir()] == ["step-00000002"]


def test_state_that_no_checkpoint_can_hold_costs_that_plugin_alone_its_state(config: Config) -> None:
    class Wrong:
        def on_checkpoint_save(self) -> dict[str, Any]:
            return {"file": open}

    with pytest.warns(AptWarning, match=r"Wrong\.on_checkpoint_save failed"):
        trainer = train(config, Wrong())
    assert max((trainer.run_dir / "checkpoints").iterdir()).name == "step-00000018"


@pytest.mark.parametrize("returned", [{"x": 3.0}, [1], {"x": torch.zeros(2)}])
def test_an_extra_loss_of_a_wrong_type_is_a_failed_effect(config: Config, returned: Any) -> None:
    class Wrong:
        def extra_losses(self) -> Any:
            return returned

    with pytest.warns(AptWarning, match="must return a dict of 0-d tensors"):
        assert train(config, Wrong()).step == 18


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(config: Config) -> None:
    class Poison:
        def extra_losses(self, trainer: Trainer) -> dict[str, Tensor]:
            return {"poison": torch.tensor(float("nan") if trainer.step >= 8 else 0.0)}

    trainer = Trainer(config, quiet=True)
    trainer.register_hook(Poison())
    with pytest.raises(TrainingError, match=r"not finite.*the checkpoint of step 6 is kept"):
        trainer.train()
    assert all(torch.isfinite(w).all() for w in last_weights(trainer.run_dir).values())


def test_an_error_in_a_layer_stops_the_run_after_saving_it(config: Config) -> None:
    class Fuse(DefaultFFN):
        def get_name(self) -> str:
            return "fuse"

        def create_layer(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
            layer = super().create_layer(*args, **kwargs)
            layer.register_forward_pre_hook(self.blow)
            return layer

        def blow(self, module: torch.nn.Module, inputs: Any) -> None:
            if module.training and FUSE["calls"] <= 0:
                raise RuntimeError("the fuse blew")
            FUSE["calls"] -= module.training

    FUSE = {"calls": 2 * 7}
    registry.register("ffn", "fuse", Fuse)
    config["model"]["ffn_name"] = "fuse"
    trainer = Trainer(config, quiet=True)
    with pytest.raises(TrainingError, match=r"the fuse blew.*saved.*--resume") as failed:
        trainer.train()
    assert isinstance(failed.value.__cause__, RuntimeError)
    assert max((trainer.run_dir / "checkpoints").iterdir()).name == "step-00000007"


def test_two_trainers_in_one_process_share_nothing(config: Config, tmp_path: Path) -> None:
    alone = train(config)
    one, two = (
        Trainer(config, quiet=True),
        Trainer({**config, "plugins": []}, quiet=True, overrides={"training.seed": 5}),
    )

    class Inner:
        """Runs the second trainer in the middle of the first."""

        def on_epoch_end(self, epoch: int) -> None:
            if epoch == 0:
                state = torch.get_rng_state()
                two.train()
                torch.set_rng_state(state)

    one.register_hook(Inner())
    one.train()
    assert one.run_dir != two.run_dir
    assert one.providers.keys() == two.providers.keys()
    assert all(one.providers[key] is not two.providers[key] for key in one.providers)
    assert "Inner" not in two.hooks.names()
    assert_same(last_weights(alone.run_dir), last_weights(one.run_dir))


def test_two_trainers_with_different_plugins_do_not_touch_each_other(
    config: Config, make_distribution: MakeDistribution
) -> None:
    make_distribution(
        "apt-counting",
        plugins={"counting": "counting_plugin"},
        modules={
            "counting_plugin": """
from apt.hookspecs import hookimpl
API_VERSION = (1, 0)
seen = []

@hookimpl
def apt_register_providers(registry):
    registry.register("ffn", "counted", "apt.modeling.layers.ffn:SwiGLU", version="1.0")

@hookimpl
def on_step_end(trainer):
    seen.append(id(trainer))

@hookimpl
def on_checkpoint_save(trainer):
    return {"seen": seen.count(id(trainer))}
"""
        },
    )
    plain = train(config, plugins=[])
    one = Trainer(config, plugins=["counting"], overrides={"model.ffn_name": "counted"}, quiet=True)
    two = Trainer(config, no_plugins=True, quiet=True)
    one.train()
    two.train()
    import counting_plugin  # type: ignore[import-not-found]

    assert set(counting_plugin.seen) == {id(one)}
    assert ("ffn", "counted") in one.providers
    assert "counted" not in two.registry.list_providers("ffn")["ffn"]
    assert "counting" not in two.hooks.names()
    assert_same(last_weights(plain.run_dir), last_weights(two.run_dir))


TABLE_ROW = re.compile(r"^\| (`.+?`) \|", re.MULTILINE)


def documented(heading: str, following: str) -> list[str]:
    """The names in the first column of one of the tables in `apt.hookspecs`."""
    table = (hookspecs.__doc__ or "").partition(heading)[2].partition(following)[0]
    return [name for row in TABLE_ROW.findall(table) for name in re.findall(r"`(\w+)`", row)]


def test_what_the_tables_promise_to_hooks_is_there(config: Config) -> None:
    seen: dict[str, set[str]] = {}

    class Look:
        def extra_losses(self, trainer: Trainer, model_state: dict[str, Any]) -> None:
            attributes = documented("What a hook may rely on, `trainer`", "and `model_state`")
            assert len(attributes) > 10
            seen["missing"] = {name for name in attributes if getattr(trainer, name, None) is None}
            seen["state"] = set(model_state)

        def on_step_end(self, trainer: Trainer) -> None:
            trainer.extra_metrics["mine"] = torch.tensor(0.25)

    trainer = train(config, Look())
    assert seen == {"missing": set(), "state": set(documented("and `model_state`", "and `generator`"))}
    records = [record for record in read_metrics(trainer.run_dir / "metrics.jsonl") if record["event"] == "train"]
    assert all(record["mine"] == 0.25 for record in records)


def test_metrics_go_to_the_trackers_of_the_profile(config: Config) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config["training"]["trackers"] = ["tensorboard"]
    trainer = train(config)
    events = EventAccumulator(str(trainer.run_dir / "tensorboard"))
    events.Reload()
    written = {event.step: event.value for event in events.Scalars("train/loss")}
    recorded = {r["step"]: r["loss"] for r in read_metrics(trainer.run_dir / "metrics.jsonl") if r["event"] == "train"}
    assert written == pytest.approx(recorded)
    config["training"]["trackers"] = ["wandbb"]
    with pytest.warns(AptWarning, match="using no tracker instead"):
        train(config)


def test_strict_refuses_a_fallback_that_else_is_loud(config: Config) -> None:
    config["model"]["attention_name"] = "flash_v2"
    with pytest.warns(AptWarning, match=r"using attention:tva_default instead.*apt-plugin-flash"):
        trainer = train(config)
    slot = trainer.in_use.slots["attention", "flash_v2"]
    assert (slot.name, slot.is_fallback) == ("tva_default", True)
    with pytest.raises(ProviderError, match=r"flash_v2 .*not installed"):
        train(config, strict=True)


def test_unknown_plugins_and_slips_are_errors_and_absent_ones_warn(config: Config) -> None:
    with pytest.raises(PluginError, match="there is no plugin 'frobnicate'"):
        Trainer(config, plugins=["frobnicate"])
    with pytest.raises(PluginError, match="did you mean 'align'"):
        Trainer(config, plugins=["aling"])


def test_a_schedule_that_nothing_reads_is_pointed_out(config: Config) -> None:
    config["schedules"] = {"route_temp": {"start": 1.5, "end": 0.8, "by": "epoch"}}
    with pytest.warns(AptWarning, match="route_temp"):
        train(config)


def test_the_guides_snippet_of_hooks_runs(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    class DummyHook:
        def on_epoch_start(self, epoch, trainer):  # type: ignore[no-untyped-def]
            print(f"hook: epoch {epoch} starts")

        def on_step_end(self, step, loss, trainer):  # type: ignore[no-untyped-def]
            if step % 10 == 0:
                print(f"hook: step {step}, loss={loss}")

    trainer = Trainer(config)
    trainer.register_hook(DummyHook())
    trainer.train()
    said = capsys.readouterr().out
    assert "hook: epoch 2 starts" in said
    assert "hook: step 10, loss=" in said
    for words in (
        "Epoch 1/3 (epoch=0): loss=",
        "val_loss=",
        "Training is complete",
        "apt generate",
        "tva_default 1.0.0",
    ):
        assert words in said


def test_bf16_and_compile_are_honoured(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    compile_: Callable[[Any], Any] = lambda forward: compiled.append(forward) or forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", compile_)
    config["training"] |= {"mixed_precision": "bf16", "compile": True, "max_steps": 3}
    seen: list[torch.dtype] = []

    class Look:
        def extra_losses(self, logits: Tensor) -> None:
            seen.append(logits.dtype)

    trainer = train(config, Look())
    assert set(seen) == {torch.bfloat16}
    assert compiled == [block.forward for block in trainer.model.blocks]


def test_learned_positions_rmsnorm_swiglu_and_document_masks_train(config: Config) -> None:
    config["model"] |= {"positions": "learned", "norm": "rmsnorm", "ffn_name": "swiglu", "tie_embeddings": False}
    config["data"]["document_mask"] = True
    config["training"]["max_steps"] = 3
    assert train(config).step == 3


def test_an_unknown_device_is_refused(config: Config) -> None:
    config["hardware"]["device"] = "toaster"
    with pytest.raises(Exception, match=r"hardware\.device"):
        train(config)


def test_a_wrong_profile_is_refused_at_once(config: Config) -> None:
    config["model"]["d_model"] = 15
    with pytest.raises(ConfigError, match="not divisible by num_heads"):
        Trainer(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config["model"]["d_model"] = 16
        Trainer(config)


def resumed(run: RunFolder, *hooks: object, **overrides: Any) -> Trainer:
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return train(str(run.profile), *hooks, resume=run, overrides=dotted)


@pytest.mark.parametrize("change", [{"training__batch_size": 16}, {"training__batch_size": 2}, {"training__seed": 7}])
def test_a_text_that_is_dealt_out_otherwise_goes_on_at_the_same_share_of_the_epoch(
    config: Config, change: dict[str, Any]
) -> None:
    run = interrupted_run(config, 5)
    with pytest.warns(AptWarning, match="dealt out in another way"):
        trainer = resumed(run, **change)
    assert (trainer.epoch, trainer.batch_index) == (3, 0) and trainer.step == trainer.total_steps


def test_a_shorter_text_does_not_hold_a_resumed_run_up(config: Config) -> None:
    run = interrupted_run(config, 5)
    path = Path(config["data"]["train_path"])
    path.write_text(path.read_text()[:450])
    with pytest.warns(AptWarning, match="not the one this run began with"):
        trainer = resumed(run)
    assert (trainer.epoch, trainer.batch_index) == (3, 0) and trainer.step == trainer.total_steps


def test_a_run_that_is_dealt_out_otherwise_ends_after_its_epochs_however_often_it_is_resumed(config: Config) -> None:
    """Its steps are no multiple of those of an epoch from then on."""
    run = interrupted_run(config, 5)
    with pytest.warns(AptWarning, match="dealt out in another way"):
        trainer = resumed(run, training__batch_size=4, training__max_epochs=4)
    assert (trainer.epoch, trainer.batch_index) == (4, 0)
    steps = trainer.step
    trainer = resumed(run)
    assert (trainer.epoch, trainer.step, trainer.total_steps) == (4, steps, steps), "nothing is left to do"
    trainer = resumed(run, training__max_epochs=5)
    assert (trainer.epoch, trainer.step) == (5, steps + trainer.steps_per_epoch)


def test_what_the_profile_says_of_the_optimizer_counts_after_a_resume(config: Config) -> None:
    run = interrupted_run(config, 5)
    trainer = resumed(run, training__weight_decay=0.0, training__beta2=0.5)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0}
    assert {tuple(group["betas"]) for group in trainer.optimizer.param_groups} == {(0.9, 0.5)}


def test_a_step_that_failed_is_done_again_as_it_would_have_been(config: Config) -> None:
    whole = train(config)

    class Fails:
        def on_before_optimizer_step(self, trainer: Trainer) -> None:
            if trainer.step == 8:
                raise ValueError("once")

    trainer = Trainer(config, strict=True, quiet=True)
    trainer.register_hook(Fails())
    with pytest.raises(TrainingError, match="once"):
        trainer.train()
    run = RunFolder(trainer.run_dir)
    assert max(run.checkpoints.iterdir()).name == "step-00000008"
    resumed(run)
    assert_same(last_weights(whole.run_dir), last_weights(run.path))


def test_memory_that_runs_out_is_told_with_what_takes_less(config: Config) -> None:
    config["model"]["dropout"] = 0.0
    whole = train(config)
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of ...")

    class Full:
        def on_model_built(self, model: torch.nn.Module, trainer: Trainer) -> None:
            def forward(*_: object) -> None:
                if trainer.step == at:
                    raise full

            model.register_forward_pre_hook(forward)

    less = f"--training.batch_size {config['training']['batch_size'] // 2} --training.gradient_accumulation 2"
    at = 0
    trainer = Trainer(config, quiet=True)
    trainer.register_hook(Full())
    with pytest.raises(
        DeviceError, match=r"^out of memory: there are no 20.00 MiB left on cpu in the first batch"
    ) as no:
        trainer.train()
    assert no.value.hint == f"the same steps take less with {less}"
    at = 8
    trainer = Trainer(config, quiet=True)
    trainer.register_hook(Full())
    with pytest.raises(DeviceError, match=f"in step 8; the run is saved in {trainer.config.output_dir}") as no:
        trainer.train()
    assert no.value.hint == f"the same steps take less with {less}; go on with: apt train --resume {trainer.run_dir}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = resumed(
            RunFolder(trainer.run_dir),
            training__batch_size=config["training"]["batch_size"] // 2,
            training__gradient_accumulation=2,
        )
    assert again.step == whole.step
    for name, weight in last_weights(whole.run_dir).items():
        torch.testing.assert_close(last_weights(again.run_dir)[name], weight, rtol=1e-4, atol=1e-5)


def test_a_state_that_cannot_be_saved_does_not_keep_a_strict_run_from_being_saved(config: Config) -> None:
    class Broken:
        def on_checkpoint_save(self) -> None:
            raise ValueError("no state")

        def on_exception(self) -> None:
            raise ValueError("and not even this")

    trainer = Trainer(config, strict=True, quiet=True)
    trainer.register_hook(Broken())
    with pytest.raises(TrainingError, match="no state"), warnings.catch_warnings():
        warnings.simplefilter("ignore", AptWarning)
        trainer.train()
    assert [path.name for path in (trainer.run_dir / "checkpoints").iterdir()] == ["step-00000006"]


def test_what_observers_do_to_metrics_does_not_touch_the_run(config: Config) -> None:
    class Slips:
        def on_step_end(self, step: int, trainer: Trainer) -> None:
            trainer.extra_metrics |= {"vector": torch.zeros(2), "set": {1}, "step": 7.0, "fine": step}

        def on_evaluation_end(self, metrics: dict[str, float], trainer: Trainer) -> None:
            trainer.extra_metrics["bleu"] = 0.5
            metrics.pop("val_loss")

    with pytest.warns(AptWarning, match="'vector' is passed over"):
        trainer = train(config, Slips())
    records = list(read_metrics(trainer.run_dir / "metrics.jsonl"))
    losses = [record for record in records if record["event"] == "train"]
    assert [record["step"] for record in losses] == [1, 3, 5, 7, 9, 11, 13, 15, 17]
    assert all(record["extra.step"] == 7.0 and record["fine"] == record["step"] for record in losses)
    assert all(record["val_loss"] > 0 for record in records if record["event"] == "eval")
    assert any(record.get("bleu") == 0.5 for record in records if record["event"] == "eval")


def test_a_loss_with_a_name_of_the_records_own_replaces_nothing(config: Config) -> None:
    class Named:
        def extra_losses(self, logits: Tensor) -> dict[str, Tensor]:
            return {"loss": 7.0 + 0.0 * logits.sum()}

    records = list(read_metrics(train(config, Named()).run_dir / "metrics.jsonl"))
    first = next(record for record in records if record["event"] == "train")
    assert first["extra.loss"] == pytest.approx(7.0)
    assert first["loss"] > 7.0


def test_a_trainer_trains_once(config: Config) -> None:
    trainer = train(config)
    before = last_weights(trainer.run_dir)
    with pytest.raises(TrainingError, match="has trained already"):
        trainer.train()
    assert_same(before, last_weights(trainer.run_dir))


def test_what_cannot_train_leaves_no_folder(config: Config, tmp_path: Path) -> None:
    class Wrong(DefaultFFN):
        def create_layer(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
            layer = super().create_layer(*args, **kwargs)
            layer.register_forward_hook(lambda *_: torch.zeros(3))
            return layer

    registry.register("ffn", "wrong_shape", Wrong)
    config["model"]["ffn_name"] = "wrong_shape"
    with pytest.raises(TrainingError, match="the first batch fails with RuntimeError"):
        train(config)
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_on_resume_leaves_the_profile_whole(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = interrupted_run(config, 5)
    before = run.profile.read_bytes()

    def full(path: Path) -> None:
        if path.name.startswith("profile"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("apt.checkpoint.durable.sync", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        resumed(run)
    assert run.profile.read_bytes() == before


def test_a_hook_that_samples_from_the_run_does_not_change_it(config: Config) -> None:
    from apt.inference.generator import Generator

    texts: list[str] = []

    class Sample:
        def on_epoch_start(self, epoch: int, trainer: Trainer) -> None:
            if epoch:
                assert trainer.last_saved() == 6 * epoch
                generator = Generator.from_run(RunFolder(trainer.run_dir))
                texts.append("".join(generator.stream("1", max_new_tokens=5, seed=0)))

    whole = train(config)
    assert_same(last_weights(whole.run_dir), last_weights(train(config, Sample()).run_dir))
    assert len(texts) == 2


def test_a_model_that_a_plugin_has_changed_is_opened_as_it_was_trained(config: Config) -> None:
    from apt.evaluation.evaluate import evaluate_run

    class Adds(DefaultFFN):
        def get_name(self) -> str:
            return "adds"

        def on_model_built(self, model: torch.nn.Module) -> None:
            model.add_module("added", torch.nn.Linear(2, 2))

    registry.register("ffn", "adds", Adds)
    config["model"]["ffn_name"] = "adds"
    run = RunFolder(train(config).run_dir)
    assert evaluate_run(run, strict=True)["val_loss"] > 0


def test_a_third_partys_tokenizer_is_loaded_by_its_own_provider(config: Config) -> None:
    from apt.data.tokenizers import ByteTokenizer, ByteTokenizerProvider
    from apt.evaluation.evaluate import evaluate_run

    class Mine(ByteTokenizer):
        def save(self, path: Path) -> None:
            path.write_text("mine alone")

    class MyTokenizer(ByteTokenizerProvider):
        name = "mine"

        def build(self, pieces: Any) -> Any:
            return Mine()

        def load(self, path: Path) -> Any:
            assert path.read_text() == "mine alone"
            return Mine()

    registry.register("tokenizer", "mine", MyTokenizer)
    config["data"]["tokenizer"] = "mine"
    run = interrupted_run(config, 5)
    assert resumed(run).step == 18
    assert evaluate_run(run)["val_loss"] > 0


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(config: Config, tmp_path: Path) -> None:
    config["model"]["vocab_size"] = 100
    with pytest.raises(ConfigError, match=r"model\.vocab_size 100 is smaller than the tokenizer's 256"):
        train(config)
    assert not (tmp_path / "runs").exists()


def test_a_resume_with_nothing_left_to_do_changes_nothing(config: Config) -> None:
    run = RunFolder(train(config).run_dir)
    before = run.profile.read_bytes()
    resumed(run, training__max_steps=4)
    assert run.profile.read_bytes() == before


def test_a_second_trainer_in_the_same_folder_is_refused(config: Config) -> None:
    refused: list[str] = []

    class Second:
        """Tries to go on with the run while it is under way, and to begin another one in its folder."""

        def on_epoch_end(self, epoch: int, trainer: Trainer) -> None:
            run = RunFolder(trainer.run_dir)
            for options in ({"resume": run}, {"run_dir": run.path}):
                with pytest.raises(RunInUseError) as error:
                    Trainer(config, quiet=True, **options).train()  # type: ignore[arg-type]
                refused.append(str(error.value))

    config["training"]["max_epochs"] = 1
    whole = train(config)
    disturbed = train(config, Second())
    assert len(refused) == 2 and all("is at work in" in text for text in refused)
    assert_same(last_weights(whole.run_dir), last_weights(disturbed.run_dir))
    assert train(config, resume=RunFolder(disturbed.run_dir)).step == 6
    assert not (disturbed.run_dir / "trainer.lock").exists()


def test_a_save_that_fails_in_the_background_ends_the_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config["checkpoint"] = {"every": 4}
    steps: list[int] = []

    class FullAtFour:
        def on_step_end(self, step: int) -> None:
            steps.append(step)

    write = CheckpointStore.write

    def full(store: CheckpointStore, snapshot: Snapshot) -> Path:
        if snapshot.facts["step"] == 4:
            raise CheckpointError("the disk is full")
        return write(store, snapshot)

    monkeypatch.setattr(CheckpointStore, "write", full)
    trainer = Trainer(config, quiet=True)
    trainer.register_hook(FullAtFour())
    with pytest.raises(CheckpointError, match="the disk is full"):
        trainer.train()
    assert len(steps) < 18, "it is raised at the end of a step, and not at the end of the run"
    monkeypatch.undo()
    run = RunFolder(trainer.run_dir)
    if run.has_checkpoints():
        train(str(run.profile), resume=run)


def test_the_last_save_is_on_the_disk_before_the_end_is_told(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down_saves(monkeypatch, 0.2)
    there: list[int | None] = []

    class Look:
        def on_training_end(self, trainer: Trainer) -> None:
            there.append(trainer.saver.store.latest())

    train(config, Look())
    assert there == [18]
    run = interrupted_run(config, 4)
    assert max(run.checkpoints.iterdir()).name == "step-00000004"


def test_in_the_background_and_in_line_the_run_is_the_same(config: Config) -> None:
    config["checkpoint"] = {"every": 1, "keep_last": 99}
    background = train(config)
    config["checkpoint"]["asynchronous"] = False
    in_line = train(config)
    for step in range(1, 19):
        name = f"checkpoints/step-{step:08d}"
        for file in ("model.safetensors", "state.safetensors"):
            assert (background.run_dir / name / file).read_bytes() == (in_line.run_dir / name / file).read_bytes()
