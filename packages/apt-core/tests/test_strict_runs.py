"""Under `--strict` what was asked for and is passed over is an error; without it, a warning that the log keeps."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from fixture_types import RunApt
from small_run import StopAt, small_config, train

from apt.core.errors import AptWarning, CheckpointError, ConfigError
from apt.core.profiles import dump_yaml
from apt.core.runs import RunFolder
from apt.evaluation.evaluate import evaluate_run
from apt.inference.loading import load_run
from apt.training.signals import Interrupted
from apt.training.trainer import Trainer

Config = dict[str, Any]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run of 3 epochs of 6 steps."""
    return small_config(tmp_path, plugins=[])


@pytest.mark.parametrize(
    ("key", "value", "max_steps"),
    [
        ("enable_moe_at_epoch", 1, 6),
        ("enable_moe_at_epoch", 3, None),
        ("enable_moe_at_step", 18, None),
        ("enable_moe_at_step", 5, 5),
    ],
)
def test_a_schedule_beyond_the_end_of_the_run_is_told_before_it_begins(
    config: Config, key: str, value: int, max_steps: int | None
) -> None:
    config["training"]["max_steps"] = max_steps
    config["schedules"] = {key: value}
    with pytest.raises(ConfigError, match=f"schedules.{key}: the run ends before it begins"):
        train(config, strict=True)
    assert not Path(config["output_dir"]).exists()
    with pytest.warns(AptWarning, match=f"schedules.{key}: the run ends before it begins"):
        trainer = train(config)
    assert "the run ends before it begins" in RunFolder(trainer.run_dir).log.read_text()
    config["schedules"] = {key: value - 1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(config)
    assert not [w for w in caught if "the run ends" in str(w.message)]


def test_a_schedule_that_nobody_asks_for_is_told_after_one_epoch(config: Config) -> None:
    config["schedules"] = {"nobodys": 0.5}
    with pytest.raises(ConfigError, match="nothing in a whole epoch has asked for nobodys"):
        train(config, strict=True)
    seen: list[int] = []

    class Epochs:
        def on_epoch_start(self, epoch: int) -> None:
            seen.append(sum("asked for nobodys" in str(warning.message) for warning in caught))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(config, Epochs())
    assert seen == [0, 1, 1]

    class Asks:
        def on_step_end(self, trainer: Trainer) -> None:
            assert trainer.schedule.get_param("nobodys", step=trainer.step) == 0.5

    train(config, Asks(), strict=True)


def test_epochs_that_were_asked_for_and_that_the_profile_cuts_short(config: Config) -> None:
    config["training"]["max_steps"] = 8
    with pytest.raises(ConfigError, match=r"max_epochs: 5: the profile's training.max_steps, 8, ends the run before"):
        train(config, overrides={"training.max_epochs": 5}, strict=True)
    train(config, strict=True)
    train(config, overrides={"training.max_epochs": 5, "training.max_steps": 7}, strict=True)
    train(config, overrides={"training.max_epochs": 1}, strict=True)


def test_a_resumed_run_says_where_its_model_is_another_one(config: Config) -> None:
    trainer = Trainer(config, quiet=True)
    trainer.register_hook(StopAt(3))
    with pytest.raises(Interrupted):
        trainer.train()
    run = RunFolder(trainer.run_dir)
    with pytest.raises(CheckpointError, match=r"does not fit this model: size mismatch for .* \(and \d+ more\)"):
        Trainer(run.profile, overrides={"model.d_model": 32}, resume=run, quiet=True).train()
    with pytest.warns(AptWarning, match=r"another model: model.norm rmsnorm \(was layernorm\)$"):
        Trainer(run.profile, overrides={"model.norm": "rmsnorm"}, resume=run, quiet=True).train()


def test_a_profile_that_differs_from_the_runs_is_refused(
    config: Config, run_apt: RunApt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunFolder(train(config | {"training": config["training"] | {"max_epochs": 1}}).run_dir)
    config["model"]["dropout"] = 0.0
    Path("new.yaml").write_text(dump_yaml(config))
    call = ("train", "-p", "new.yaml", "--resume", str(run.path))
    refused = run_apt(*call, "--strict")
    assert refused.code == 2 and "from which new.yaml differs in model.dropout" in refused.err
    told = run_apt(*call)
    assert told.code == 0 and "warning: " in told.err and "differs in model.dropout" in told.err


def test_the_model_that_was_asked_for_is_not_replaced_by_an_older_one(config: Config) -> None:
    config["checkpoint"] = {"every": 6}
    run = RunFolder(train(config).run_dir)
    newest = run.checkpoints / "step-00000018" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    with pytest.warns(AptWarning, match="is damaged"):
        assert load_run(run).step == 12
    with pytest.warns(AptWarning), pytest.raises(CheckpointError, match="of step 18, is damaged") as refused:
        load_run(run, strict=True)
    assert refused.value.hint == "use the one before it: --checkpoint 12"
    assert load_run(run, strict=True, checkpoint=12).step == 12


def test_a_model_is_measured_on_another_text(config: Config, tmp_path: Path) -> None:
    run = RunFolder(train(config).run_dir)
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{n} red lorries on the road\n" for n in range(40)))
    own = evaluate_run(run)["val_loss"]
    elsewhere = evaluate_run(run, overrides={"data.train_path": str(other), "data.dataset": None})["val_loss"]
    assert elsewhere > own + 0.3


def test_an_empty_folder_is_no_name(run_apt: RunApt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused = run_apt("train", "-p", "tiny_debug", "--run-dir", "")
    assert refused.code == 2 and "--run-dir is empty" in refused.err
    assert not list(tmp_path.glob("*"))


def test_a_runs_folder_stands_for_its_lock(config: Config, run_apt: RunApt, tmp_path: Path) -> None:
    run = RunFolder(train(config).run_dir)
    (tmp_path / "p.yaml").write_text(dump_yaml(config))
    call = ("train", "-p", str(tmp_path / "p.yaml"), "--training.max_steps", "1", "--frozen", str(run.path))
    assert run_apt(*call).code == 0
