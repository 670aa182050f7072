"""Whole runs on accelerators: on one that is none (device.cpp), and on this machine's own, if it has one.

torch treats the one that is none as it does a GPU: it shows what a run does with devices, memory, generators and
collectives where there is no GPU. What a GPU computes it does not show.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT, Apt
from made_distribution import make_distribution
from safetensors.torch import load_file
from torch import Tensor
from torch.utils import cpp_extension

from apt.training.metrics import read_metrics

HERE = Path(__file__).parent
PLUGINS = ("align", "flash", "moe", "quant")
ROUNDED = 0.05
"""How far losses may be from those on the CPU where weights are trained for few bits: after the first step one between
two levels is rounded to either by the last bit of a sum."""
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

Python = Callable[..., str]

pytestmark = pytest.mark.timeout(600)  # the first of them waits for the compiler


@dataclass(frozen=True, slots=True)
class Accelerator:
    kind: str
    path: list[Path]
    """Folders for the path of Python: torch finds the accelerator there, and APT its plugins."""
    count: int
    tolerance: float
    """How far numbers may be from those of the CPU, relative to their size."""

    @property
    def last(self) -> str:
        return f"{self.kind}:{self.count - 1}"


@pytest.fixture(scope="session")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugins")
    for name in PLUGINS:
        make_distribution(folder, f"apt-plugin-{name}", plugins={name: f"apt_plugin_{name}.plugin"})
    return folder


@pytest.fixture(scope="session")
def sim(tmp_path_factory: pytest.TempPathFactory, plugins: Path) -> Accelerator:
    """The one that is none, built once for all workers of a test run. It computes what the CPU does."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    if not torch.__version__.startswith("2.13."):
        pytest.skip("the accelerator that is none is written for torch 2.13")
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "accelerator"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "torch_sim_native.so").exists():
            _build(folder)
    return Accelerator("sim", [folder, plugins], 2, 1e-5)


@pytest.fixture(params=["sim", "own"])
def accelerator(request: pytest.FixtureRequest, plugins: Path) -> Accelerator:
    if request.param == "sim":
        simulated: Accelerator = request.getfixturevalue("sim")
        return simulated
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        pytest.skip("this machine has no accelerator of its own")
    return Accelerator(found.type, [plugins], torch.accelerator.device_count(), 1e-3)


def _build(folder: Path) -> None:
    make_distribution(folder, "torch-sim", modules={"torch_sim": (HERE / "torch_sim.py").read_text()})
    (folder / "torch_sim-1.0.dist-info/entry_points.txt").write_text("[torch.backends]\nsim = torch_sim:register\n")
    unfinished = folder / "unfinished.so"
    headers = [f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"]
    build = ["-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-DTORCH_EXTENSION_NAME=torch_sim_native", *headers]
    assert COMPILER is not None
    done = subprocess.run(
        [COMPILER, *build, str(HERE / "device.cpp"), "-o", str(unfinished), *libraries], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    unfinished.rename(folder / "torch_sim_native.so")


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """One whose run takes a second, without dropout: each device draws numbers of its own."""
    (tmp_path / "text.txt").write_text("".join(f"{n} green bottles hanging on the wall\n" for n in range(40)))
    path = tmp_path / "small.yaml"
    path.write_text(
        """\
name: small
model: {d_model: 32, num_heads: 4, num_layers: 2, max_seq_len: 32}
data: {train_path: text.txt}
training:
  {max_epochs: 2, batch_size: 4, learning_rate: 0.01, lr_schedule: constant, log_every: 1, mixed_precision: false}
"""
    )
    return path


@pytest.fixture
def python(accelerator: Accelerator, profile: Path, home: Path) -> Python:
    """Runs code in a Python that has the accelerator, in the profile's folder; returns what it prints."""
    source = [str(folder) for folder in (ROOT / "packages").glob("*/src")]
    path = os.pathsep.join([*map(str, accelerator.path), *source])
    env = {**os.environ, "PYTHONPATH": path, "HOME": str(home), "OMP_NUM_THREADS": "1"}

    def run(code: str, *arguments: str) -> str:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env=env, cwd=profile.parent, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def losses(run: Path) -> list[float]:
    found = [r.get("loss", r.get("val_loss")) for r in read_metrics(run / "metrics.jsonl")]
    return [loss for loss in found if loss is not None]


def newest(run: Path) -> dict[str, Tensor]:
    folder = max((run / "checkpoints").iterdir())
    return {f"{file.name} {name}": x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def on(device: str) -> list[str]:
    return ["--hardware.device", device, "--run-dir", f"runs/{device}"]


STRICT = """
import torch
from apt.core.device import comes_to_an_end

x = torch.ones(3, device="sim")
y = torch.empty(3, device="sim:1")
assert x.device == torch.device("sim:0") and y.isnan().all(), "what was never written is NaN"
assert torch.accelerator.current_accelerator() == torch.device("sim")


def refused(call):
    try:
        call()
    except (RuntimeError, TypeError):
        return
    raise AssertionError("that went through")


refused(lambda: x + torch.ones(3))
refused(lambda: x + y)
refused(lambda: torch.where(torch.ones(3).bool(), x, x))
refused(lambda: x.numpy())
refused(lambda: torch.rand(3, device="sim", generator=torch.Generator()))
refused(lambda: torch.ones(1 << 34, device="sim"))
late = torch.full((3,), 7.0)
late.copy_(x, non_blocking=True)
assert late.tolist() == [7, 7, 7], "nobody has waited for it"
torch.accelerator.synchronize()
assert late.tolist() == [1, 1, 1]
assert comes_to_an_end(torch.device("sim:1"), 1.0)
torch.manual_seed(0)
here, cpu = torch.rand(2, 3, device="sim").tolist(), torch.rand(3).tolist()
torch.manual_seed(0)
assert torch.rand(3).tolist() == cpu and torch.rand(2, 3, device="sim").tolist() == here, "two generators"
"""


def test_the_one_that_is_none_is_as_strict_as_a_gpu(sim: Accelerator) -> None:
    env = {**os.environ, "PYTHONPATH": str(sim.path[0])}
    done = subprocess.run([sys.executable, "-c", STRICT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SAME = """
import json
import sys
import warnings
from apt.inference.generator import Generator
from apt.training.trainer import Trainer
from apt.core.runs import RunFolder
from pathlib import Path

warnings.simplefilter("error")
parts, last, sampling = map(json.loads, sys.argv[1:])
devices = []
for device in ("auto", "cpu"):
    overrides = {**parts, "hardware.device": device}
    trainer = Trainer("small.yaml", overrides=overrides, run_dir=f"runs/{device}", quiet=True)
    trainer.train()
    devices.append(str(trainer.device))
texts = []
for device in ("auto", last, "cpu"):
    generator = Generator.from_run(RunFolder(Path("runs/auto")), device=device)
    texts.append("".join(generator.stream("12 green", max_new_tokens=12, **sampling)))
print(json.dumps([devices, texts]))
"""


@pytest.mark.parametrize(
    "parts",
    [
        {"model.attention_name": "tva_default"},
        {"model.attention_name": "flash_sdpa", "model.ffn_name": "swiglu", "training.gradient_accumulation": 2},
        {"model.moe.enabled": True, "model.align_name": "bistate_default", "schedules.enable_moe_at_epoch": 1},
        {"model.qat_name": "int4", "data.workers": 2},
    ],
    ids=["default", "swiglu", "experts", "int4"],
)
def test_a_run_is_that_of_the_cpu(
    python: Python, accelerator: Accelerator, profile: Path, parts: dict[str, Any]
) -> None:
    sampling = {"seed": 1} if accelerator.kind == "sim" else {"temperature": 0.0}  # others draw other numbers
    said = python(SAME, json.dumps(parts), json.dumps(accelerator.last), json.dumps(sampling))
    (used, cpu), texts = json.loads(said)
    assert used.startswith(accelerator.kind) and cpu == "cpu"
    assert texts[0] == texts[1] == texts[2] != ""
    runs = profile.parent / "runs"
    found, wanted = losses(runs / "auto"), losses(runs / "cpu")
    assert found[0] == pytest.approx(wanted[0], rel=accelerator.tolerance)
    assert found == pytest.approx(wanted, rel=ROUNDED if "model.qat_name" in parts else accelerator.tolerance)


RESUME = """
import sys
import warnings
from pathlib import Path
from apt.core.errors import TrainingError
from apt.core.profiles import resolve
from apt.core.runs import RunFolder
from apt.training.trainer import Trainer

warnings.simplefilter("error")
device = sys.argv[1]
overrides = {"model.dropout": 0.1, "hardware.device": device, "model.moe.enabled": True, "model.moe.jitter": 0.1}


class Fails:
    def on_before_optimizer_step(self, trainer):
        if trainer.step == 11:
            raise ValueError("once")


Trainer("small.yaml", overrides=overrides, run_dir="whole", quiet=True).train()
trainer = Trainer("small.yaml", overrides=overrides, run_dir="halves", quiet=True, strict=True)
trainer.register_hook(Fails())
try:
    trainer.train()
except TrainingError as error:
    assert "once" in str(error), error
saved = max(Path("halves/checkpoints").iterdir()).name
assert saved == "step-00000011", saved
again = Trainer("halves/profile.yaml", resume=RunFolder(Path("halves")), quiet=True)
again.train()
assert str(again.device) == device
"""


def test_a_run_that_fails_in_mid_step_goes_on_as_if_it_had_not(
    apt: Apt, python: Python, accelerator: Accelerator, profile: Path
) -> None:
    """With what the device had drawn in that step drawn once more: dropout and jitter are the device's."""
    python(RESUME, accelerator.last)
    whole, halves = newest(profile.parent / "whole"), newest(profile.parent / "halves")
    assert whole.keys() == halves.keys()
    exact = accelerator.kind == "sim"  # GPUs add up in any order
    for name, x in whole.items():
        tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(halves[name], x, **tolerance, msg=name)
    # On the CPU it cannot be so, and that is said.
    words = ["train", "--resume", "halves", "--hardware.device", "cpu", "--epochs", "3"]
    resumed = apt(*words, path=accelerator.path)
    assert f"holds the random state of a device of kind {accelerator.kind}" in resumed.stderr


@pytest.mark.parametrize(
    ("parallel", "devices", "then"), [("ddp", 2, "auto"), ("fsdp", 8, "cpu")], ids=["ddp on 2", "fsdp on 8"]
)
def test_each_process_has_a_device_and_one_goes_on(
    apt: Apt, accelerator: Accelerator, profile: Path, parallel: str, devices: int, then: str
) -> None:
    if accelerator.kind != "sim" and accelerator.count < devices:
        pytest.skip(f"this machine has {accelerator.count} accelerators of its own, and it takes {devices}")
    words = ["-p", str(profile), "--no-plugins", "--training.batch_size", "8"]
    several = ["--nproc", str(devices), "--hardware.parallel", parallel, "--epochs", "1"]
    with_devices: dict[str, Any] = {"path": accelerator.path, "env": {"SIM_DEVICES": str(devices)}}
    apt("train", *words, *on("cpu"), **with_devices)
    apt("train", *words, *on(accelerator.kind), *several, **with_devices)
    run = f"runs/{accelerator.kind}"
    alone = ["--epochs", "2", "--hardware.parallel", "ddp", "--hardware.device", then]
    apt("train", "--resume", run, *alone, **with_devices)
    wanted = losses(profile.parent / "runs/cpu")
    assert losses(profile.parent / run) == pytest.approx(wanted, rel=accelerator.tolerance)


def test_processes_that_have_no_device_each_are_refused(apt: Apt, sim: Accelerator, profile: Path) -> None:
    more = apt("train", "-p", str(profile), "--nproc", "3", *on("sim"), path=sim.path, expect=2)
    assert "3 processes on this machine need a GPU each, and it has 2" in more.stderr
    assert not (profile.parent / "runs").exists()


def test_a_device_that_is_not_there_and_one_that_is_full(apt: Apt, sim: Accelerator, profile: Path) -> None:
    train, path = ["train", "-p", str(profile)], sim.path
    absent = apt(*train, "--hardware.device", "sim:2", path=path, expect=2).stderr
    assert absent.startswith("error: hardware.device: sim:2 is not available on this machine\n  fix: ")
    assert "cuda is not available" in apt(*train, "--hardware.device", "cuda", path=path, expect=2).stderr
    full = apt(*train, path=path, expect=2, env={"SIM_MEMORY": "600000"}).stderr.splitlines()
    assert len(full) == 2 and full[0].startswith("error: out of memory: there are no ") and "on sim" in full[0]
    assert full[1].endswith("take less with --training.batch_size 2 --training.gradient_accumulation 2")
    small = apt(*train, path=path, expect=2, env={"SIM_MEMORY": "100000"}).stderr
    assert "needs at least 0.0 GB for weights, gradients and AdamW's moments" in small and "sim has 0.0 GB" in small
    apt(*train, "--run-dir", "runs/a", path=path)
    generated = apt("generate", "runs/a", "--prompt", "1", path=path, expect=2, env={"SIM_MEMORY": "60000"}).stderr
    assert generated.startswith("error: out of memory") and "  fix: ask for less at once" in generated


@pytest.mark.parametrize("provider", ["attention:tva_default", "router:topk_moe", "quant:int8"])
def test_the_kit_builds_layers_there(apt: Apt, accelerator: Accelerator, provider: str) -> None:
    said = apt("plugin-check", provider, "--device", accelerator.last, path=accelerator.path)
    assert "failed" not in said.stdout and "warning" not in said.stderr.lower()


def test_the_doctor_shows_it(apt: Apt, sim: Accelerator) -> None:
    shown = apt("doctor", path=sim.path, expect=None).stdout
    assert shown.count("simulated, 16.0 GiB") == 2


def test_what_was_trained_there_is_the_same_elsewhere(apt: Apt, accelerator: Accelerator, profile: Path) -> None:
    path, run = accelerator.path, f"runs/{accelerator.kind}"
    apt("train", "-p", str(profile), *on(accelerator.kind), path=path)
    apt("quantize", run, "--scheme", "int8", "--out", "runs/few", path=path)
    measured = [
        json.loads(apt("eval", used, "--json", "--device", device, path=path).stdout)["val_loss"]
        for used in (run, "runs/few")
        for device in (accelerator.kind, "cpu")
    ]
    assert measured[0] == pytest.approx(measured[1], rel=accelerator.tolerance)
    assert measured[2] == pytest.approx(measured[3], rel=accelerator.tolerance)
