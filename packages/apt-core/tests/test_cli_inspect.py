"""`apt inspect`: a run is opened whatever of its plugins is here, and whatever of it is damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fixture_types import RunApt
from safetensors import safe_open

import apt
from apt.core.runs import RunFolder
from apt.training.trainer import Trainer

SOURCE = str(Path(apt.__file__).parents[1])


class Ema:
    """A listener with state, which no package brings."""

    def on_checkpoint_save(self) -> dict[str, int]:
        return {"n": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "text.txt").write_text("".join(f"{n} green bottles\n" for n in range(80)))
    config = {
        "name": "small",
        "description": "a small one",
        "output_dir": str(folder / "runs"),
        "model": {"d_model": 16, "num_heads": 2, "num_layers": 11, "max_seq_len": 16, "attention_name": "not_here"},
        "data": {"train_path": str(folder / "text.txt"), "cache_dir": str(folder / "cache")},
        "training": {"max_epochs": 2, "max_steps": 4, "batch_size": 16, "eval_batches": 1},
        "checkpoint": {"every": 2},
        "hardware": {"device": "cpu"},
    }
    with pytest.warns(match="not_here is not installed"):
        trainer = Trainer(config, quiet=True, no_plugins=True)
        trainer.register_hook(Ema())
        return trainer.train()


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunFolder:
    """A run of its own, in runs/small-1, whose FFN came from a package that is not here."""
    copy = RunFolder(tmp_path / "runs/small-1")
    shutil.copytree(trained, copy.path)
    lock = json.loads(copy.lock.read_text())
    for slot in lock["slots"]:
        if slot["kind"] == "ffn":
            slot |= {"distribution": "apt-plugin-gone", "distribution_version": "1.2"}
    lock["plugins"].append({"name": "gone", "distribution": "apt-plugin-gone", "version": "1.2", "sha256": "ab" * 32})
    copy.lock.write_text(json.dumps(lock))
    return copy


def inspect(run_apt: RunApt, *arguments: str) -> dict[str, Any]:
    result = run_apt("inspect", *arguments, "--json")
    assert (result.code, result.err) == (0, "")
    return dict(json.loads(result.out))


def test_all_of_it_as_json(run_apt: RunApt, run: RunFolder) -> None:
    facts = inspect(run_apt, "small-1")
    assert (facts["run"], facts["problems"]) == ("runs/small-1", [])
    assert facts["step"] == 4 and facts["profile"]["model"]["d_model"] == 16
    slots = {slot["kind"]: slot for slot in facts["providers"]}
    assert (slots["attention"]["requested"], slots["attention"]["name"]) == ("not_here", "tva_default")
    assert slots["attention"]["fallback"] and slots["attention"]["install"] is None
    assert (slots["ffn"]["installed"], slots["ffn"]["install"]) == (None, 'pip install "apt-plugin-gone==1.2"')
    assert [plugin["name"] for plugin in facts["plugins"]] == ["builtin", "gone"]
    assert facts["plugins"][1]["install"] == 'pip install "apt-plugin-gone==1.2"'
    first, last = facts["checkpoints"]
    assert (first["step"], last["step"]) == (2, 4)
    for checkpoint in (first, last):
        assert checkpoint["whole"] and checkpoint["problem"] is None and checkpoint["states"] == ["Ema"]
        assert checkpoint["bytes"] == sum(path.stat().st_size for path in Path(checkpoint["folder"]).iterdir())
    assert last["best"] and 0 < last["metrics"]["val_loss"] < 10


def test_the_tensors_are_those_of_the_file_in_the_order_of_the_blocks(run_apt: RunApt, run: RunFolder) -> None:
    for chosen, step in ((None, 4), ("2", 2), ("step-00000002", 2), ("last", 4), ("best", 4)):
        facts = inspect(run_apt, "small-1", *([] if chosen is None else ["--checkpoint", chosen]))
        assert facts["tensors_of_step"] == step
    with safe_open(run.checkpoints / "step-00000004/model.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {t["name"]: t["shape"] for t in facts["tensors"]} == {n: list(w.shape) for n, w in weights.items()}
    assert facts["numbers"] == sum(weight.numel() for weight in weights.values())
    assert {tensor["dtype"] for tensor in facts["tensors"]} == {"F32"}
    blocks = [int(t["name"].split(".")[1]) for t in facts["tensors"] if t["name"].startswith("blocks.")]
    assert blocks == sorted(blocks) and max(blocks) == 10


def test_the_screen(run_apt: RunApt, run: RunFolder) -> None:
    result = run_apt("inspect")
    assert (result.code, result.err) == (0, "")
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    for line in (
        "profile small: a small one",
        "done 4 steps, epoch=",
        "model.d_model 16",
        "builtin",
        'not installed: pip install "apt-plugin-gone==1.2"',
        "instead of not_here: attention:not_here is not installed",
        "with state of Ema",
        "Tensors of the model at step 4",
        "token_embedding.weight 256 x 16 F32 4,096",
    ):
        assert any(line in shown for shown in lines), line
    assert not any("model.num_heads_" in line or "training.seed" in line for line in lines), "defaults are left out"


def test_what_is_damaged_is_said_and_the_rest_is_shown(run_apt: RunApt, run: RunFolder) -> None:
    weights = run.checkpoints / "step-00000004/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    facts = inspect(run_apt)
    assert "model.safetensors is damaged" in facts["checkpoints"][1]["problem"]
    assert not facts["checkpoints"][1]["whole"] and not facts["checkpoints"][1]["best"]
    assert facts["step"] == facts["tensors_of_step"] == 2, "the last one that is whole"
    assert "not whole: " in run_apt("inspect").out
    assert inspect(run_apt, "--checkpoint", "4")["numbers"] == facts["numbers"], "its header can be read"

    weights.write_bytes(b"x")
    assert run_apt("inspect", "--checkpoint", "4").err.startswith(f"error: {weights.relative_to(Path.cwd())} cannot be")
    run.lock.write_text("{")
    run.profile.write_text("name: [")
    facts = inspect(run_apt)
    assert len(facts["problems"]) == 2 and facts["providers"] == [] and len(facts["checkpoints"]) == 2
    shutil.rmtree(run.checkpoints)
    facts = inspect(run_apt)
    assert (facts["step"], facts["checkpoints"], facts["tensors"]) == (None, [], [])
    shown = run_apt("inspect")
    assert shown.code == 0 and shown.out.count("problem") == 2


def test_wrong_input(run_apt: RunApt, run: RunFolder) -> None:
    assert run_apt("inspect", "nope").err.startswith("error: nope is not the folder of a run")
    said = run_apt("inspect", "--checkpoint", "3")
    assert said == (2, "", "error: runs/small-1 has no checkpoint of step 3\n  fix: there are: 2, 4\n")
    assert run_apt("inspect", "--checkpoint", "x").code == 2
    for folder in run.checkpoints.iterdir():
        shutil.rmtree(folder)
    said = run_apt("inspect", "--checkpoint", "best").err
    assert said.startswith("error: no checkpoint of this run has a validation loss")


def test_it_needs_no_torch(run: RunFolder) -> None:
    program = (
        "import sys; from apt.cli.main import main; code = main(['inspect', sys.argv[1]])\n"
        "sys.exit(code or (3 if 'torch' in sys.modules else 0))"
    )
    env = {**os.environ, "PYTHONPATH": SOURCE}
    call = [sys.executable, "-c", program, str(run.path)]
    result = subprocess.run(call, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
