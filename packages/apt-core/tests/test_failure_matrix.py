"""Every hook that raises, on every carrier, under `drop` and under `stop`: the run goes on or ends as `apt.hookspecs`
says, with one clear line, and nothing that was saved is lost.

The hooks are found by looking, so that a new one is in the matrix from its first day.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_types import MakeDistribution, RunApt
from safetensors.torch import load_file
from small_run import StopAt, small_config
from torch import Tensor

from apt.checkpoint.store import CheckpointStore
from apt.core.discovery import Selection, discover
from apt.core.errors import AptWarning, TrainingError
from apt.core.hooks import GENERATION, MAX_OBSERVER_FAILURES, OBSERVERS, SPEC_NAMES
from apt.core.registry import registry
from apt.core.runs import RunFolder
from apt.inference.generator import Generator
from apt.modeling.layers.ffn import DefaultFFN
from apt.training.metrics import read_metrics
from apt.training.signals import Interrupted
from apt.training.trainer import Trainer

Config = dict[str, Any]

BROKEN = "APT_TEST_BROKEN"
"""While the environment holds this, the broken hook is broken."""
WORDS = "failed: ValueError: broken on purpose"

CARRIERS = {"object": "Broken", "plugin": "broken", "provider": "ffn.broken"}
"""What carries the broken hook, and the name that messages give it."""
REGISTRATION = {name for name in SPEC_NAMES if name.startswith("apt_register_")}
RUN_HOOKS = sorted(SPEC_NAMES - REGISTRATION - GENERATION)
BUILDING = {"on_model_built", "on_optimizer_built"}
AFTER_THE_LAST_RECORD = {"on_training_end", "on_exception"}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small(tmp_path)


def small(folder: Path) -> Config:
    """Two epochs of two steps, with dropout, so that the random state matters."""
    training = {"max_epochs": 2, "batch_size": 24, "log_every": 1}
    return small_config(folder, model={"num_layers": 1}, training=training)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights of the run in which nothing fails."""
    trainer = Trainer(small(tmp_path_factory.mktemp("undisturbed")), quiet=True)
    return last_weights(RunFolder(trainer.train()))


def last_weights(run: RunFolder) -> dict[str, Tensor]:
    return load_file(max(run.checkpoints.iterdir()) / "model.safetensors")


def source(hook: str) -> str:
    """A plugin whose `hook` raises, and which has state to load."""
    state = "" if hook == "on_checkpoint_save" else "@hookimpl\ndef on_checkpoint_save():\n    return {'n': 1}\n"
    return (
        "import os\nfrom apt.hookspecs import hookimpl\nAPI_VERSION = (1, 0)\n"
        f"@hookimpl\ndef {hook}():\n    if {BROKEN!r} in os.environ:\n        raise ValueError('broken on purpose')\n"
        + state
    )


def methods(hook: str) -> dict[str, Any]:
    """The same as methods of a class."""

    def fails(self: object) -> None:
        if BROKEN in os.environ:
            raise ValueError("broken on purpose")

    return {"on_checkpoint_save": lambda self: {"n": 1}, hook: fails}


class Case:
    """One cell of the matrix: a hook that raises, and what carries it."""

    def __init__(self, config: Config, hook: str, carrier: str, make_distribution: MakeDistribution) -> None:
        self.config, self.hook, self.carrier = config, hook, carrier
        self.where = f"{CARRIERS[carrier]}.{hook}"
        self.effect = carrier == "provider" or hook not in OBSERVERS
        if carrier == "plugin":
            make_distribution(
                "apt-broken", plugins={"broken": "broken_plugin"}, modules={"broken_plugin": source(hook)}
            )
        if carrier == "provider":
            own = {"get_name": lambda self: "broken", **methods(hook)}
            registry.register("ffn", "broken", type("BrokenFFN", (DefaultFFN,), own))
            config["model"]["ffn_name"] = "broken"

    def trainer(self, resume: RunFolder | None = None) -> Trainer:
        trainer = Trainer(str(resume.profile) if resume else self.config, resume=resume)
        if self.carrier == "object":
            trainer.register_hook(type("Broken", (), methods(self.hook))())
        return trainer

    def provoked(self, monkeypatch: pytest.MonkeyPatch) -> Trainer:
        """A trainer whose run calls the hook, which is armed from here on."""
        resume = None
        if self.hook == "on_checkpoint_load":
            before = self.trainer()
            before.register_hook(StopAt(1))
            with pytest.raises(Interrupted):
                before.train()
            resume = RunFolder(before.run_dir)
        monkeypatch.setenv(BROKEN, "")
        trainer = self.trainer(resume)
        if self.hook == "on_exception":
            trainer.register_hook(StopAt(2))
        if self.hook == "on_plugin_failed":
            trainer.register_hook(Provoker())
        return trainer


class Provoker:
    """Fails, so that there is a failure to announce."""

    def on_step_end(self, step: int) -> None:
        if step == 1:
            raise LookupError("provoked")


@contextmanager
def heard() -> Iterator[list[str]]:
    """The warnings of this block."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said: list[str] = []
        try:
            yield said
        finally:
            said += [str(warning.message) for warning in caught if issubclass(warning.category, AptWarning)]


def goes_on(case: Case, trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    """Train to the end, and check what is said and recorded of the failure on the way."""
    capsys.readouterr()
    with heard() as warned:
        if case.hook == "on_exception":
            with pytest.raises(Interrupted):
                trainer.train()
        else:
            trainer.train()
    assert trainer.step == (2 if case.hook == "on_exception" else 4)
    failures = [text for text in warned if text.startswith(f"{case.where} {WORDS}")]
    assert not any("\n" in text for text in failures)
    endings = [text.partition(WORDS)[2] for text in failures]
    if case.effect:
        assert endings == ["; training goes on without it"]
    else:
        off = f"; switched off after {MAX_OBSERVER_FAILURES} failures"
        assert endings == ([""] * (MAX_OBSERVER_FAILURES - 1) + [off])[: len(endings)]
        assert endings
    run, dropped = RunFolder(trainer.run_dir), [case.where] if case.effect else []
    assert trainer.hooks.dropped == dropped
    if case.hook not in AFTER_THE_LAST_RECORD:
        last = list(read_metrics(run.metrics))[-1]
        assert last.get("dropped", []) == dropped
        assert CheckpointStore(run.checkpoints).load().dropped == dropped
    assert "Traceback" in run.log.read_text() or case.hook in BUILDING | {"on_config_resolved", "on_checkpoint_load"}
    shown = capsys.readouterr().out
    assert f"Note: {case.where} {WORDS}" in shown, "the summary says it once more"


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("hook", RUN_HOOKS)
def test_under_drop_the_run_goes_on(
    config: Config, hook: str, carrier: str, make_distribution: MakeDistribution, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], undisturbed: dict[str, Tensor],
) -> None:  # fmt: skip
    case = Case(config, hook, carrier, make_distribution)
    trainer = case.provoked(monkeypatch)
    if (hook, carrier) == ("on_config_resolved", "provider"):
        trainer.train()
        assert trainer.hooks.failures == [], "no provider is built yet, so none hears it"
        return
    goes_on(case, trainer, capsys)
    if hook != "on_exception":
        for name, weight in last_weights(RunFolder(trainer.run_dir)).items():
            assert torch.equal(weight, undisturbed[name]), f"{name}: a hook that did nothing changed what was trained"


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("hook", RUN_HOOKS)
def test_under_stop_an_effect_ends_the_run_and_an_observer_does_not(
    config: Config, hook: str, carrier: str, make_distribution: MakeDistribution, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], undisturbed: dict[str, Tensor],
) -> None:  # fmt: skip
    config["on_plugin_error"] = "stop"
    case = Case(config, hook, carrier, make_distribution)
    trainer = case.provoked(monkeypatch)
    if (hook, carrier) == ("on_config_resolved", "provider"):
        trainer.train()
        return
    if not case.effect or hook == "on_exception":  # where the run ends anyway, its own reason is the one that counts
        goes_on(case, trainer, capsys)
        return
    with heard(), pytest.raises(TrainingError) as stopped:
        trainer.train()
    assert stopped.value.message == f"{case.where} {WORDS}"
    assert stopped.value.exit_code == 2
    assert "on_plugin_error: drop" in (stopped.value.hint or "")
    if hook in BUILDING:
        assert not Path(config["output_dir"]).exists(), "nothing is left of a run that never began"
        return
    run = RunFolder(trainer.run_dir)
    assert CheckpointStore(run.checkpoints).load().step == trainer.step
    monkeypatch.delenv(BROKEN)
    with heard():
        assert case.trainer(run).train() == run.path
    weights = last_weights(run)
    assert all(torch.equal(weight, undisturbed[name]) for name, weight in weights.items()), "as if it had not stopped"


# Registration, the command line


@pytest.mark.parametrize("hook", sorted(REGISTRATION))
def test_a_hook_of_registration_that_raises_costs_its_plugin_alone(
    config: Config, hook: str, make_distribution: MakeDistribution, monkeypatch: pytest.MonkeyPatch, run_apt: RunApt,
) -> None:  # fmt: skip
    Case(config, hook, "plugin", make_distribution)
    monkeypatch.setenv(BROKEN, "")
    Path("small.yaml").write_text(json.dumps(config))
    call = ("train", "-p", "small.yaml", "--quiet")
    trained = run_apt(*call)
    assert (trained.code, trained.out) == (0, "")
    if hook == "apt_register_providers":
        with heard():
            found = {plugin.name: plugin for plugin in discover(Selection()).found}
        assert (found["broken"].status, found["broken"].reason) == ("import-error", "ValueError: broken on purpose")
        assert "plugin 'broken' (apt-broken) is not used: import-error: ValueError: broken on purpose" in trained.err
        assert trained.err.count("\n") == 1
        strict = run_apt(*call, "--strict")
        assert strict.code == 2 and "broken on purpose" in strict.err
    elif hook == "apt_register_options":
        left_out = "its options for 'train' are left out: ValueError: broken on purpose"
        assert trained.err == f"warning: plugin 'broken' (apt-broken): {left_out}\n"
    else:
        assert trained.err == "", "training asks for no commands"
        helped = run_apt("--help")
        assert helped.code == 0 and "broken on purpose" in helped.err and helped.err.count("\n") == 1


@pytest.mark.parametrize("carrier", ["object", "provider"])
@pytest.mark.parametrize("hook", sorted(REGISTRATION))
def test_only_plugins_are_asked_to_register(
    config: Config, hook: str, carrier: str, make_distribution: MakeDistribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Case(config, hook, carrier, make_distribution).provoked(monkeypatch)
    trainer.train()
    assert trainer.hooks.failures == []


# Generation


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("hook", sorted(GENERATION))
def test_generation_goes_on_without_a_hook_that_raises_or_stops_as_asked(
    config: Config, hook: str, carrier: str, make_distribution: MakeDistribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    config["training"]["max_steps"] = 1
    case = Case(config, hook, carrier, make_distribution)
    run = RunFolder(case.trainer().train())

    def text(strict: bool = False) -> str:
        generator = Generator.from_run(run, strict=strict)
        if carrier == "object":
            generator.hooks.add(type("Broken", (), methods(hook))())
        return "".join(generator.stream("12 green", max_new_tokens=8, seed=0))

    expected = text()
    monkeypatch.setenv(BROKEN, "")
    with heard() as warned:
        assert text() == expected
    assert warned == [f"{case.where} {WORDS}; generation goes on without it"]
    with pytest.raises(TrainingError) as stopped:
        text(strict=True)
    assert stopped.value.message == f"{case.where} {WORDS}"


def test_every_hook_is_in_the_matrix() -> None:
    assert {*RUN_HOOKS, *REGISTRATION, *GENERATION} == SPEC_NAMES
    assert len(REGISTRATION) == 3 and SPEC_NAMES > GENERATION
