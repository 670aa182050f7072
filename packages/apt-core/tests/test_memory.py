"""What a model needs is told before it is built, from its shapes alone, and compared with what there is."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from apt.core import device as device_module
from apt.core.config import HardwareConfig, RunConfig, TrainingConfig
from apt.core.device import Need, _cgroup_limits, memory_of
from apt.core.errors import DeviceError
from apt.core.providers.ffn import FFNProvider
from apt.core.registry import Registry
from apt.core.registry import registry as installed
from apt.core.world import World
from apt.modeling.compose import ModelBuilder
from apt.training import memory as memory_module
from apt.training.distributed import own_micro_batches
from apt.training.memory import check_memory, in_less_memory, need_of
from apt.training.optim import build_optimizer
from apt.training.trainer import Trainer

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"d_model": 32, "num_heads": 2, "num_layers": 2, "max_seq_len": 16}


def config(**model: Any) -> RunConfig:
    return RunConfig.model_validate({"model": SMALL | model})


@pytest.fixture
def registry() -> Registry:
    return installed.view()


@pytest.mark.parametrize(
    "model", [{}, {"attention_name": "mha"}, {"ffn_name": "swiglu"}, {"positions": "learned", "tie_embeddings": False}]
)
def test_the_estimate_is_what_a_model_its_gradients_and_its_moments_hold(model: Any, registry: Registry) -> None:
    built = ModelBuilder(config(**model)).build_model(vocab_size=50)
    built(torch.zeros(1, 4, dtype=torch.int64)).logits.sum().backward()
    optimizer = build_optimizer(built, config().training)
    optimizer.step()
    held = [*built.parameters(), *(p.grad for p in built.parameters()), *built.buffers()]
    for state in optimizer.state.values():
        held += [state["exp_avg"], state["exp_avg_sq"]]
    weights = sum(tensor.nbytes for tensor in (*built.parameters(), *built.buffers()))
    expected = Need(built.num_params(), weights, sum(tensor.nbytes for tensor in held if tensor is not None))
    assert need_of(config(**model), registry, 50) == expected


class Frozen(FFNProvider):
    """A layer with weights that are not trained, and a buffer."""

    def get_name(self) -> str:
        return "frozen"

    def get_version(self) -> str:
        return "1"

    def create_layer(self, d_model: int, d_ff: int, **config: Any) -> nn.Module:
        layer = nn.Linear(d_model, d_model, bias=False).requires_grad_(False)
        layer.register_buffer("extra", torch.zeros(10, dtype=torch.float64))
        layer.d_model = d_model  # type: ignore[assignment]
        return layer


def test_what_is_not_trained_has_no_gradient_and_no_moments(registry: Registry) -> None:
    registry.register("ffn", "frozen", Frozen)
    plain, frozen = (need_of(config(ffn_name=name), registry, 50) for name in ("default", "frozen"))
    assert plain is not None and frozen is not None
    trained_ffn = 2 * (2 * 32 * 128 * 4)
    per_layer = 32 * 32 * 4 + 10 * 8
    assert frozen.memory == plain.memory - 4 * trained_ffn + 2 * per_layer


def test_looking_changes_nothing_and_says_nothing(registry: Registry) -> None:
    class Draws(Frozen):
        def create_layer(self, d_model: int, d_ff: int, **config: Any) -> nn.Module:
            torch.randn(3, device="cpu")
            built.append(self)
            return super().create_layer(d_model, d_ff, **config)

    built: list[object] = []
    registry.register("ffn", "draws", Draws)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert need_of(config(ffn_name="draws", attention_name="not_here"), registry, 50) is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert built and built[0] is not registry.get("ffn", "draws", {}), "an instance of its own"


class NoMeta(Frozen):
    """Looks at values while it builds."""

    def create_layer(self, d_model: int, d_ff: int, **config: Any) -> nn.Module:
        layer = super().create_layer(d_model, d_ff, **config)
        assert bool(torch.ones(1).item())
        return layer


@pytest.mark.parametrize("model", [{"ffn_name": "no_meta"}, {"tva": {"r": 3}}, {"ffn_name": "defualt"}])
def test_what_cannot_be_built_without_memory_is_not_estimated(
    model: Any, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register("ffn", "no_meta", NoMeta)
    assert need_of(config(**model), registry, 50) is None, "nor is what would stand in for it"
    monkeypatch.setattr(memory_module, "memory_of", lambda _: 0)
    check_memory(config(**model), registry, CPU, 50)


def test_what_does_not_fit_is_refused_with_figures_and_a_fix(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = need_of(config(), registry, 50)
    assert need is not None
    monkeypatch.setattr(memory_module, "memory_of", lambda _: need.memory)
    check_memory(config(), registry, CPU, 50)
    monkeypatch.setattr(memory_module, "memory_of", lambda _: need.memory - 1)
    check_memory(config(), registry, CPU, None)
    with pytest.raises(DeviceError, match=r"needs at least 0\.0 GB.*before any activation, and there are .* here") as e:
        check_memory(config(), registry, CPU, 50)
    assert e.value.hint == "lower model.num_layers or model.d_model, or take a larger machine"
    with pytest.raises(DeviceError, match=r"and cuda:1 has 0\.0 GB; train tiny instead: apt train -p tiny$"):
        check_memory(config().model_copy(update={"smaller_profile": "tiny"}), registry, torch.device("cuda:1"), 50)
    monkeypatch.setattr(memory_module, "memory_of", lambda _: None)
    check_memory(config(), registry, CPU, 50)


@pytest.mark.parametrize(("parallel", "share"), [("ddp", 1), ("fsdp", 4)])
def test_the_processes_of_a_machine_share_its_memory(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, parallel: str, share: int
) -> None:
    """Two of four processes are here; on a GPU of their own it is each one's that counts."""
    need = need_of(config(), registry, 50)
    assert need is not None
    several = config().model_copy(update={"hardware": HardwareConfig.model_validate({"parallel": parallel})})
    world = World(0, 4, local_size=2)
    for device, here in ((CPU, 2), (torch.device("cuda:1"), 1)):
        monkeypatch.setattr(memory_module, "memory_of", lambda _, here=here: here * need.memory / share)
        check_memory(several, registry, device, 50, world)
        monkeypatch.setattr(memory_module, "memory_of", lambda _, here=here: here * need.memory / share - 1)
        with pytest.raises(DeviceError, match="in each of 2 processes"):
            check_memory(several, registry, device, 50, world)


# How much there is


def test_a_control_group_limits_what_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc, mounted = tmp_path / "cgroup", tmp_path / "mounted"

    def limits(lines: str, files: dict[str, str] | None = None) -> list[int]:
        proc.write_text(lines)
        for path, content in (files or {}).items():
            (mounted / path).parent.mkdir(parents=True, exist_ok=True)
            (mounted / path).write_text(content)
        return sorted(_cgroup_limits(proc, mounted))

    assert limits("0::/\n", {"memory.max": "max\n"}) == []
    assert limits("0::/a/b\n", {"a/memory.max": "5000\n", "a/b/memory.max": "7000\n"}) == [5000, 7000]
    v1 = {"memory/memory.limit_in_bytes": "9000\n", "memory/box/memory.limit_in_bytes": "4000\n"}
    assert limits("4:cpu,memory:/box\n3:cpuset:/\n", v1) == [4000, 9000]
    assert limits("4:memory:/of/the/host\n") == [9000], "a container sees the group around it alone"
    assert _cgroup_limits(tmp_path / "none", mounted) == []
    total = psutil.virtual_memory().total
    monkeypatch.setattr(device_module, "_cgroup_limits", lambda: [5000, 2**63 - 4096])
    assert memory_of(CPU) == 5000
    monkeypatch.setattr(device_module, "_cgroup_limits", lambda: [2**63 - 4096])
    assert memory_of(CPU) == total


def test_a_gpu_has_its_own_and_of_other_devices_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 123

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert memory_of(torch.device("cuda:0")) == 123
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace())
    assert memory_of(torch.device("cuda:0")) is None, "its module does not tell"
    assert memory_of(torch.device("mps")) == memory_of(CPU)


# Where it has run out


@pytest.mark.parametrize(
    ("size", "batch_size", "accumulation"), [(1, 8, 1), (2, 8, 1), (4, 8, 2), (2, 4, 6), (3, 8, 3)]
)
def test_the_same_rows_in_half_the_memory(size: int, batch_size: int, accumulation: int) -> None:
    def at_once(training: TrainingConfig) -> float:
        rows = training.batch_size * training.gradient_accumulation
        return rows / (size * own_micro_batches(training, world))

    world = World(0, size, local_size=size)
    training = TrainingConfig(batch_size=batch_size, gradient_accumulation=accumulation)
    *_, batch, _, steps = in_less_memory(training, world).split()
    less = TrainingConfig(batch_size=int(batch), gradient_accumulation=int(steps))
    assert less.batch_size * less.gradient_accumulation == batch_size * accumulation
    assert at_once(less) == at_once(training) / 2


def test_a_single_row_is_not_halved() -> None:
    training = TrainingConfig(batch_size=2, gradient_accumulation=1)
    assert in_less_memory(training, World(0, 2, local_size=2)).startswith("lower training.batch_size")


# Runs


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} green bottles hanging on the wall\n" for n in range(24)))
    return {
        "output_dir": str(tmp_path / "runs"),
        "model": SMALL | {"dropout": 0.1},
        "data": {"train_path": str(text), "cache_dir": str(tmp_path / "cache")},
        "training": {"batch_size": 8, "max_steps": 3},
        "hardware": {"device": "cpu"},
    }


@pytest.mark.parametrize("vocab_size", [None, 300])
def test_the_weights_are_those_of_a_run_that_does_not_look(
    run: dict[str, Any], vocab_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run["model"]["vocab_size"] = vocab_size
    looking, blind = Trainer(run, quiet=True), Trainer(run, quiet=True)
    looking.train()
    monkeypatch.setattr("apt.training.trainer.check_memory", lambda *_: None)
    blind.train()
    for name, weight in blind.model.state_dict().items():
        assert torch.equal(weight, looking.model.state_dict()[name]), name


def test_a_known_vocabulary_is_checked_before_the_data_is_prepared(
    run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "memory_of", lambda _: 1000)
    with pytest.raises(DeviceError):
        Trainer(run, quiet=True).train()
    assert (tmp_path / "cache").exists(), "how large the vocabulary is, only the data tells"
    run["model"]["vocab_size"], run["data"]["train_path"] = 256, str(tmp_path / "nowhere.txt")
    with pytest.raises(DeviceError):
        Trainer(run, quiet=True).train()
    assert not (tmp_path / "runs").exists()


def test_a_huge_profile_is_refused_in_one_line_and_little_memory(tmp_path: Path) -> None:
    (tmp_path / "huge.yaml").write_text(
        "extends: moe_reasoning_small\nname: huge\nsmaller_profile: moe_reasoning_small\n"
        "plugins: []\nmodel: {d_model: 65536, num_heads: 512, d_ff: null, num_layers: 8, moe: {enabled: false}}\n"
    )
    script = (
        "import resource, sys; from apt.cli.main import main; code = main(['train', '-p', 'huge.yaml']); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    source = Path(memory_module.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2, done.stderr
    error = done.stderr[done.stderr.index("error: ") :].splitlines()
    assert "B parameters needs at least" in error[0]
    assert error[1:] == ["  fix: train moe_reasoning_small instead: apt train -p moe_reasoning_small"]
    assert int(done.stdout.split()[-1]) < 1_500_000, "kilobytes: what torch itself takes"
    assert not (tmp_path / "runs").exists()
