"""`training.compile`: the numbers of the model as it is, one compilation for all blocks, and nothing left on the
model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_workers as workers
import pytest
import torch
from distributed_workers import TOLERANCE, alone, assert_near, plain_config

from apt.core.profiles import dump_yaml
from apt.modeling.compose import ModelBuilder
from apt.training.compiling import CompiledBlocks

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def from_the_start() -> None:
    """Nothing that another test had compiled counts."""
    torch.compiler.reset()


def model() -> Any:
    torch.manual_seed(0)
    shape = {"d_model": 16, "num_heads": 2, "num_layers": 3, "max_seq_len": 8}
    return ModelBuilder({"model": shape}).build_model(vocab_size=30)


TOKENS = torch.arange(16).view(2, 8)


def forwards_of(model: Any) -> list[str]:
    """The blocks that have a forward of their own, other than their class's."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_numbers_and_gradients_are_those_of_the_model_with_one_compilation_for_all_blocks() -> None:
    plain, own = model(), model()
    compiled = CompiledBlocks(own)
    with_graphs = torch._dynamo.utils.counters
    with_graphs.clear()
    for each in (plain, compiled):
        each(TOKENS).logits.pow(2).mean().backward()
    assert with_graphs["stats"]["unique_graphs"] == 1 and not with_graphs["graph_break"]
    torch.testing.assert_close(compiled(TOKENS).logits, plain(TOKENS).logits, rtol=0, atol=1e-6)
    for (name, wanted), got in zip(plain.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_the_model_stays_as_it_is_also_after_an_error() -> None:
    own = model()
    names, compiled = list(own.state_dict()), CompiledBlocks(own)
    seen: list[list[str]] = []
    own.norm.register_forward_pre_hook(lambda *_: seen.append(forwards_of(own)))
    compiled(TOKENS)
    assert len(seen[0]) == 3 and not forwards_of(own) and list(own.state_dict()) == names
    with pytest.raises(IndexError):
        compiled(TOKENS + 100)
    assert not forwards_of(own)


def test_a_machine_that_cannot_compile_is_told_so_in_a_line(tmp_path: Path) -> None:
    """In a process of its own: torch remembers that there is no compiler."""
    config = plain_config(tmp_path)
    config["training"]["compile"] = True
    (tmp_path / "p.yaml").write_text(dump_yaml(config))
    (tmp_path / "empty").mkdir()
    variables = {
        "PATH": str(tmp_path / "empty"), "HOME": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "apt", "train", "--no-plugins", "-p", "p.yaml"]
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    error, fix = done.stderr.splitlines()
    assert error.startswith("error: training.compile: torch cannot compile the model: ") and "C++ compiler" in error
    assert fix.startswith("  fix: leave training.compile out")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_come_to_what_one_comes_to_that_does_not_compile(
    tmp_path: Path, parallel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SECONDS", 240)
    config = plain_config(tmp_path)
    config["training"] |= {"batch_size": 4, "gradient_accumulation": 2, "max_epochs": 1}
    one = alone(config, ("Recorder", None))
    config["training"]["compile"] = True
    config["hardware"]["parallel"] = parallel
    several = workers.run(2, config, tmp_path / "results", ("Recorder", None), ("Graphs", None))
    assert [process["error"] for process in several] == [None, None], several
    assert [process["graphs"] for process in several] == [1, 1], "it is compiled, and all blocks at once"
    assert several[1]["losses"] == pytest.approx(one["losses"], rel=TOLERANCE)
    assert_near(several[0]["run"], one["run"])
