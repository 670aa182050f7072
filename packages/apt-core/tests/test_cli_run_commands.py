"""`apt train` and `apt eval`: what they make of their arguments. The work itself is stood in for."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from fixture_types import RunApt

from apt.checkpoint.lock import FORMAT
from apt.core.profiles import dump_yaml, resolve
from apt.core.runs import RunFolder


class Calls(dict[str, Any]):
    """What the stand-ins were called with."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    seen = Calls()

    class Trainer:
        def __init__(self, source: Any, **options: Any) -> None:
            seen.update(options, source=source)

        def train(self) -> Path:
            seen["trained"] = True
            return Path("runs/x-1")

    def evaluate_run(run: RunFolder, **options: Any) -> dict[str, float]:
        seen.update(options, run=run)
        return {"step": 1200.0, "val_loss": 1.52345, "perplexity": 4.588}

    for name, contents in {
        "apt.training.trainer": {"Trainer": Trainer},
        "apt.evaluation.evaluate": {"evaluate_run": evaluate_run},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def make_run(folder: str, profile: str = "tiny_debug", **overrides: Any) -> RunFolder:
    """A run's folder below the current one, with its resolved profile and a lock that holds nothing."""
    run = RunFolder(Path(folder))
    run.path.mkdir(parents=True)
    config = resolve(profile, {key.replace("__", "."): value for key, value in overrides.items()}).config
    run.profile.write_text(dump_yaml(config.model_dump(mode="json")))
    run.lock.write_text(json.dumps({"format": FORMAT, "slots": [], "plugins": []}))
    return run


# train


def test_train_hands_everything_on(run_apt: RunApt, calls: Calls) -> None:
    call = (
        "train -p tiny_debug --epochs 5 --batch-size 3 --model.attention_name mha --training.learning_rate=3e-4 "
        "--plugins builtin --no-plugin moe --strict --quiet --run-dir here"
    )
    result = run_apt(*call.split())
    assert result == (0, "", "")
    config = calls["source"].config
    assert (config.name, config.model.attention_name, config.training.learning_rate) == ("tiny_debug", "mha", 3e-4)
    assert (config.training.max_epochs, config.training.batch_size) == (5, 3)
    assert [plugin.name for plugin in calls["plugins"].found if plugin.loaded] == ["builtin"]
    assert calls["plugins"].registry.find("attention", "mha")
    assert (calls["strict"], calls["quiet"], calls["run_dir"], calls["resume"]) == (True, True, Path("here"), None)
    assert calls["options"].profile == "tiny_debug"
    assert calls["trained"]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("", "apt train: which profile?"),
        (
            "-p tiny_debug --epochs 2 --training.max_epochs 3",
            "apt train: --epochs and --training.max_epochs are the same key",
        ),
        ("--resume --run-dir x", "apt train: --resume goes on in the run's own folder"),
        ("--resume nope", "nope is not the folder of a run (it has no profile.yaml)"),
        ("--resume -p shakespeare_char", "there is no run of profile 'shakespeare_char' in runs"),
        ("--resume -p nope", "there is no profile 'nope'"),
        ("-p tiny_debug --model.d_model [8", "command line: --model.d_model"),
        ("-p tiny_debug --plugins quux", "--plugins: there is no plugin 'quux'"),
        ("-p tiny_debug --model.tva.tau x", "command line: --model.tva.tau: expected a number greater than 0"),
        ("-p tiny_debug --nproc 2 --model.tva.tau x", "command line: --model.tva.tau: expected a number greater than"),
    ],
)
def test_train_refuses(run_apt: RunApt, calls: Calls, tmp_path: Path, call: str, error: str) -> None:
    (tmp_path / "runs" / "tiny_debug-1").mkdir(parents=True)
    (tmp_path / "runs" / "tiny_debug-1" / "profile.yaml").write_text("name: tiny_debug\n")
    result = run_apt("train", *call.split())
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {error}")
    assert not calls


def test_resume_without_a_run_takes_the_newest(run_apt: RunApt, calls: Calls) -> None:
    import os

    older, newer, other = (make_run(f"runs/{name}") for name in ("tiny_debug-9", "tiny_debug-10", "other-1"))
    for age, run in enumerate((other, newer, older)):
        os.utime(run.profile, (1e9 - age, 1e9 - age))
    assert run_apt("train", "--resume", "--epochs", "4") == (0, "", "")
    assert (calls["resume"].path, calls["source"].source) == (other.path, str(other.profile))
    assert calls["source"].config.training.max_epochs == 4
    assert run_apt("train", "--resume", "-p", "tiny_debug") == (0, "", "")
    assert calls["resume"].path == newer.path
    assert run_apt("train", "--resume", "tiny_debug-9") == (0, "", "")
    assert calls["resume"].path == older.path


def test_resume_looks_where_the_runs_are(run_apt: RunApt, calls: Calls) -> None:
    run = make_run("elsewhere/tiny_debug-1")
    assert run_apt("train", "--resume", "--output_dir", "elsewhere").code == 0
    assert calls["resume"].path == run.path
    assert run_apt("train", "-p", "tiny_debug", "--resume", "--output_dir", "elsewhere").code == 0
    assert calls["resume"].path == run.path
    assert run_apt("train", "--resume", str(run.path)).code == 0
    assert calls["resume"].path == run.path


def test_resume_says_where_a_given_profile_differs(run_apt: RunApt, calls: Calls) -> None:
    run = make_run("runs/tiny_debug-1", training__max_epochs=9, model__tva={"r": 2})
    result = run_apt("train", "-p", "tiny_debug", "--resume")
    assert result.code == 0
    assert calls["source"].source == str(run.profile)
    assert result.err.startswith(
        "warning: runs/tiny_debug-1 goes on with its own profile, from which tiny_debug differs in "
    )
    assert result.err.count("\n") == 1
    assert "model.tva.r (4, the run has 2)" in result.err
    assert "training.max_epochs (3, the run has 9)" in result.err
    result = run_apt("train", "-p", "tiny_debug", "--resume", "--epochs", "12", "--model.tva.r", "4")
    assert "max_epochs" not in result.err


def test_resume_does_not_list_all_there_is(run_apt: RunApt, calls: Calls) -> None:
    make_run("runs/tiny_debug-1", "shakespeare_char", name="tiny_debug")
    assert " more; to change the run, " in run_apt("train", "-p", "tiny_debug", "--resume").err


# eval


@pytest.mark.parametrize("command", ["generate", "chat", "eval"])
def test_without_a_run_there_is_nothing_to_do(run_apt: RunApt, calls: Calls, command: str) -> None:
    result = run_apt(command)
    assert result.code == 2
    assert result.err == "error: there is no run in runs\n  fix: start one with: apt train --profile tiny_debug\n"


def test_eval_prints_what_it_measured(run_apt: RunApt, calls: Calls) -> None:
    run = make_run("runs/tiny_debug-1")
    result = run_apt("eval", "tiny_debug-1", "--checkpoint", "300", "--batches", "4", "--strict")
    assert result.code == 0
    assert [line.split() for line in result.out.splitlines()] == [
        ["run", "runs/tiny_debug-1"], ["step", "1,200"], ["val_loss", "1.5234"], ["perplexity", "4.5880"],
    ]  # fmt: skip
    assert (calls["run"], calls["checkpoint"], calls["batches"], calls["strict"]) == (run, 300, 4, True)
    assert calls["voter"] is None and "overrides" not in calls
    assert run_apt("eval", "--voter", "entropy", "--data.answers_path", "q.jsonl", "--model.voting.k=5").code == 0
    assert (calls["voter"], calls["overrides"]) == ("entropy", {"data.answers_path": "q.jsonl", "model.voting.k": 5})
    result = run_apt("eval", "--chat.user", "x")
    assert "error: apt eval: --chat.user is no key of the model or data.answers_* or data.train_path" in result.err
    assert run_apt("eval", "--data.train_path", "other.txt").code == 0
    assert calls["overrides"] == {"data.train_path": "other.txt", "data.dataset": None}
    assert json.loads(run_apt("eval", "--json").out) == {
        "run": "runs/tiny_debug-1", "step": 1200.0, "val_loss": 1.52345, "perplexity": 4.588,
    }  # fmt: skip
