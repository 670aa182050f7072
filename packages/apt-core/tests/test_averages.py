"""An average of the weights that a plugin keeps in the optimizer's state: saved, resumed, and used by `--state`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_types import MakeDistribution, RunApt
from torch import Tensor

from apt.checkpoint.averages import averages
from apt.checkpoint.store import CheckpointStore
from apt.core.errors import AptWarning
from apt.core.profiles import resolve
from apt.core.runs import RunFolder
from apt.data.prepare import prepare_data
from apt.evaluation.evaluate import evaluate
from apt.inference.loading import load_run
from apt.modeling.backbones.gpt import GPT
from apt.modeling.compose import ModelBuilder

KEEPER = """
from apt.hookspecs import hookimpl
API_VERSION = (1, 0)

@hookimpl
def on_step_end(trainer):
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    for parameter, state in trainer.optimizer.state.items():
        if state and not names[parameter].startswith("norm."):
            state["stable"] = state.get("stable", parameter.detach().clone()).lerp(parameter.detach(), 0.05)
            state["noise"] = 1.0
"""

RUN = "runs/small-1"


@pytest.fixture
def run(run_apt: RunApt, make_distribution: MakeDistribution, tmp_path: Path) -> RunFolder:
    """A run with two checkpoints that keeps "stable" of every parameter but those of the last norm."""
    make_distribution("apt-keeper", plugins={"keeper": "keeper_plugin"}, modules={"keeper_plugin": KEEPER})
    (tmp_path / "text.txt").write_text("".join(f"{n} green bottles hanging on the wall\n" for n in range(24)))
    (tmp_path / "small.yaml").write_text(
        "name: small\n"
        "model: {d_model: 16, num_heads: 2, num_layers: 1, max_seq_len: 16}\n"
        "data: {train_path: text.txt, cache_dir: cache}\n"
        "training: {max_epochs: 2, batch_size: 4, learning_rate: 0.05}\n"
        "hardware: {device: cpu}\n"
    )
    assert run_apt("train", "-p", "small.yaml", "--quiet").code == 0
    return RunFolder(tmp_path / RUN)


def by_hand(run: RunFolder, step: int | None = None) -> tuple[GPT, dict[str, Tensor]]:
    """The model with "stable" for weights, put together without what is tested; and the average."""
    checkpoint = CheckpointStore(run.checkpoints).load(step)
    names = [name for group in checkpoint.optimizer["param_groups"] for name in group["param_names"]]
    stable = {names[i]: state["stable"] for i, state in checkpoint.optimizer["state"].items() if "stable" in state}
    model = ModelBuilder(str(run.profile)).build_model(vocab_size=256)
    model.load_state_dict(checkpoint.model | stable)
    return model, stable


def val_loss(run: RunFolder, model: GPT) -> float:
    config = resolve(run.profile).config
    data = prepare_data(config, ModelBuilder(config).in_use, tokenizer_path=run.tokenizer)
    return evaluate(model, data.val, config.training.batch_size, torch.device("cpu"))["val_loss"]


def measured(run_apt: RunApt, *arguments: str) -> dict[str, Any]:
    result = run_apt("eval", RUN, "--json", *arguments)
    assert result.code == 0, result.err
    answer: dict[str, Any] = json.loads(result.out)
    return answer


def test_eval_measures_the_average_in_place_of_the_weights(run: RunFolder, run_apt: RunApt) -> None:
    model, stable = by_hand(run)
    assert stable
    assert not any(name.startswith("norm.") for name in stable)
    weights, average = measured(run_apt), measured(run_apt, "--state", "stable")
    assert average["val_loss"] == pytest.approx(val_loss(run, model), rel=1e-6)
    assert average["val_loss"] != weights["val_loss"]
    assert (average["state"], "state" in weights) == ("stable", False)
    assert "state       stable" in run_apt("eval", RUN, "--state", "stable").out
    earlier = CheckpointStore(run.checkpoints).steps()[0]
    before = measured(run_apt, "--state", "stable", "--checkpoint", str(earlier))
    assert before["val_loss"] == pytest.approx(val_loss(run, by_hand(run, earlier)[0]), rel=1e-6)


def test_a_resumed_run_goes_on_with_its_average(run: RunFolder, run_apt: RunApt, tmp_path: Path) -> None:
    whole = by_hand(run)[1]
    earlier, last = CheckpointStore(run.checkpoints).steps()
    for path in (run.checkpoints / f"step-{last:08d}").iterdir():
        path.unlink()
    (run.checkpoints / f"step-{last:08d}").rmdir()
    assert run_apt("train", "--resume", RUN, "--quiet").code == 0
    assert CheckpointStore(run.checkpoints).steps() == [earlier, last]
    assert all(torch.equal(tensor, whole[name]) for name, tensor in by_hand(run)[1].items())


def test_generate_writes_what_the_average_says(run: RunFolder, run_apt: RunApt) -> None:
    call = ("--prompt", "12 green", "--max-tokens", "40", "--seed", "1")
    average, weights = run_apt("generate", RUN, *call, "--state", "stable"), run_apt("generate", RUN, *call)
    assert (average.code, weights.code) == (0, 0)
    assert average.out != weights.out
    loaded = load_run(run, state="stable")
    model = by_hand(run)[0]
    assert all(torch.equal(ours, model.state_dict()[name]) for name, ours in loaded.model.state_dict().items())


def test_a_state_that_is_not_there_is_refused_with_those_that_are(run: RunFolder, run_apt: RunApt) -> None:
    for command in ("eval", "generate"):
        result = run_apt(command, RUN, "--state", "stabel", "--prompt=x" if command == "generate" else "--json")
        assert (result.code, result.out) == (2, "")
        assert "holds no state 'stabel': it holds stable\n" in result.err
        assert "leave --state out" in result.err
    assert run_apt("eval", RUN, "--state", "exp_avg").code == 2, "the optimizer's own is no average"
    assert run_apt("eval", RUN, "--state", "noise").code == 2


def test_a_run_that_keeps_none_says_so(run: RunFolder, run_apt: RunApt) -> None:
    assert run_apt("train", "-p", "small.yaml", "--no-plugins", "--training.max_steps", "1", "--quiet").code == 0
    result = run_apt("eval", "small-2", "--state", "stable")
    assert result.code == 2
    assert "holds no state 'stable': this run keeps no averages of its weights\n  fix: leave --state out" in result.err


def test_a_damaged_checkpoint_gives_way_for_an_average_too(run: RunFolder, run_apt: RunApt) -> None:
    earlier, last = CheckpointStore(run.checkpoints).steps()
    tensors = run.checkpoints / f"step-{last:08d}" / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-3])
    expected = val_loss(run, by_hand(run, earlier)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", AptWarning)
        assert measured(run_apt)["step"] == last, "the weights themselves are whole, and nothing else is read"
    result = run_apt("eval", RUN, "--json", "--state", "stable")
    assert json.loads(result.out)["val_loss"] == pytest.approx(expected, rel=1e-6)
    assert f"step-{earlier:08d} instead" in result.err
    assert run_apt("eval", RUN, "--state", "stable", "--checkpoint", "last").code == 0
    assert "is damaged" in run_apt("eval", RUN, "--state", "stable", "--checkpoint", str(last)).err


def test_an_average_is_a_floating_point_tensor_shaped_like_its_parameter() -> None:
    weights = {"a": torch.zeros(2, 3), "b": torch.zeros(()), "c": torch.zeros(4)}
    state = {
        0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2, 3), "ema": torch.ones(2, 3), "rows": torch.ones(2)},
        1: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(()), "ema": torch.tensor(5.0), "count": torch.tensor(3)},
        3: {"ema": torch.ones(7)},
    }
    groups = [{"params": [0, 2], "param_names": ["a", "c"]}, {"params": [1, 3], "param_names": ["b", "gone"]}]
    found = averages({"state": state, "param_groups": groups}, weights)
    assert {name: sorted(kept) for name, kept in found.items()} == {"ema": ["a", "b"]}
    assert found["ema"]["b"] == 5.0
