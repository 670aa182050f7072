"""Runs of several processes, for tests: each is forked from one server that has torch imported."""

from __future__ import annotations

import errno
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from small_run import small_config

from apt.core.runs import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from apt.checkpoint.store import CheckpointStore

Config = dict[str, Any]

TOLERANCE = 1e-5
"""How far weights and losses may be from those of one process, relative to their size: what docs/distributed.md says.
The gradients are the same sums in another order, in fp32."""

CONTEXT = multiprocessing.get_context("forkserver")
SECONDS = 60


def _start_server() -> None:
    """Start the server, unless it runs, with this process's path: it looks for what it is to import there."""
    CONTEXT.set_forkserver_preload(
        ["apt.training.trainer", "apt.checkpoint.sharded", "apt.modeling.layers.attention_tva", "torch._dynamo"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()


def run(
    size: int, config: dict[str, Any], results: Path, *hooks: tuple[str, Any], **options: Any
) -> list[dict[str, Any]]:
    """Train in `size` processes.

    Args:
        results: a folder to exchange files in, new or empty.
        hooks: (name, argument) of hooks of this module, made in every process.
        options: of the trainer; `register`, the modules of plugins that need not be installed; and `again`, whether
            another run of the profile goes before this one in the same processes.

    Returns:
        For each process, in order of rank: "error" (its class's name or None), "message", "code" (the exit code), and
        what its hooks have written into the dict `said`.
    """
    from torch.distributed import TCPStore

    _start_server()
    results.mkdir(parents=True, exist_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        CONTEXT.Process(target=_work, args=(rank, size, store.port, config, str(results), hooks, options))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
        if process.is_alive():
            for other in processes:
                other.kill()
            raise AssertionError(f"the processes hang; exit codes so far: {[p.exitcode for p in processes]}")
    files = [results / f"{rank}.json" for rank in range(size)]
    return [
        (json.loads(file.read_text()) if file.exists() else {}) | {"code": process.exitcode}
        for file, process in zip(files, processes, strict=True)
    ]


# What tests ask of a run


def plain_config(folder: Path, **sections: Any) -> Config:
    """3 epochs of 6 steps, the same numbers whatever the number of processes."""
    return small_config(folder, model={"dropout": 0.0}, **sections)


def alone(config: Config | str, *hooks: tuple[str, Any], **options: Any) -> dict[str, Any]:
    """What `run` does, in this process."""
    from apt.training.trainer import Trainer

    said: dict[str, Any] = {}
    trainer = Trainer(config, quiet=True, **options)
    for name, argument in hooks:
        trainer.register_hook(globals()[name](argument, said))
    trainer.train()
    return said | {"run": str(trainer.run_dir)}


def store(run: str) -> CheckpointStore:
    from apt.checkpoint.store import CheckpointStore

    return CheckpointStore(RunFolder(Path(run)).checkpoints)


def weights(run: str) -> dict[str, Tensor]:
    return store(run).load_weights()[1]


def assert_near(a: str, b: str) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        difference = (ours[name] - theirs[name]).abs().max() / theirs[name].abs().max().clamp_min(1e-3)
        assert difference <= TOLERANCE, (name, difference)


def records(run: str, event: str = "train") -> list[dict[str, Any]]:
    from apt.training.metrics import read_metrics

    return [record for record in read_metrics(RunFolder(Path(run)).metrics) if record["event"] == event]


def _work(
    rank: int, size: int, port: int, config: Any, results: str, hooks: Sequence[tuple[str, Any]], options: Any
) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    import torch

    from apt.core.errors import AptError
    from apt.core.registry import registry
    from apt.training.trainer import Trainer

    torch.set_num_threads(1)
    registry.list_providers()
    for module in options.pop("register", ()):
        importlib.import_module(module).apt_register_providers(registry)
    again = options.pop("again", False)
    said: dict[str, Any] = {"error": None, "warnings": []}
    code = 0
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if "resume" in options:
                options["resume"] = RunFolder(Path(options["resume"]))
            trainer = Trainer(config, quiet=True, **options)
            for name, argument in hooks:
                trainer.register_hook(globals()[name](argument, said))
            try:
                if again:
                    left = Trainer(config, quiet=True)
                    left.train()
                trainer.train()
            finally:
                said["warnings"] = [str(warning.message) for warning in caught]
                said["run"] = str(trainer.run.path) if trainer.run else None
    except Exception as error:
        said |= {"error": type(error).__name__, "message": str(error)}
        code = error.exit_code if isinstance(error, AptError) else 1
    (Path(results) / f"{rank}.json").write_text(json.dumps(said))
    os._exit(code)


def _rank() -> int:
    return int(os.environ["RANK"])


class Recorder:
    """Writes down which documents each step reads, the loss it is told, and what the run logs."""

    def __init__(self, argument: Any, said: dict[str, Any]) -> None:
        self.said = said
        said |= {"rows": {}, "losses": [], "events": [], "numbers": []}

    def on_step_start(self, step: int, batch: Any) -> None:
        import torch

        self.said["rows"][str(step)] = [hash(tuple(row)) for row in batch.tokens.tolist()]
        self.said["numbers"].append(torch.rand(()).item())

    def on_step_end(self, loss: Any) -> None:
        self.said["losses"].append(loss.item())

    def on_log(self, record: Any) -> None:
        self.said["events"].append(dict(record))


class Graphs:
    """Counts the graphs that torch has compiled in this process."""

    def __init__(self, argument: Any, said: dict[str, Any]) -> None:
        self.said = said

    def on_training_end(self) -> None:
        from torch._dynamo.utils import counters

        self.said["graphs"] = counters["stats"]["unique_graphs"]


class StopAt:
    """Sends a signal, (step, signal, rank), to one of the processes."""

    def __init__(self, argument: tuple[int, int, int], said: dict[str, Any]) -> None:
        self.step, self.signum, self.rank = argument

    def on_step_end(self, step: int) -> None:
        if step + 1 == self.step and _rank() == self.rank:
            os.kill(os.getpid(), self.signum)


class FailAt:
    """An effect that fails at a step in one of the processes: (step, rank)."""

    def __init__(self, argument: tuple[int, int], said: dict[str, Any]) -> None:
        self.step, self.rank = argument
        self.said = said
        said["calls"] = 0

    def extra_losses(self, trainer: Any, logits: Any) -> dict[str, Any]:
        self.said["calls"] += 1
        if trainer.step >= self.step and _rank() == self.rank:
            raise ValueError("broken effect")
        return {"penalty": 0.01 * logits.square().mean()}


class Poison:
    """A loss that is no number at one step in one of the processes: (step, rank)."""

    def __init__(self, argument: tuple[int, int], said: dict[str, Any]) -> None:
        self.step, self.rank = argument

    def extra_losses(self, trainer: Any, logits: Any) -> dict[str, Any]:
        poisoned = trainer.step == self.step and _rank() == self.rank
        return {"poison": logits.mean() * (float("nan") if poisoned else 0.0)}


class Observer:
    """An observer that fails at every step in one of the processes."""

    def __init__(self, argument: int, said: dict[str, Any]) -> None:
        self.rank, self.said = argument, said
        said["looked"] = 0

    def on_step_end(self) -> None:
        self.said["looked"] += 1
        if _rank() == self.rank:
            raise ValueError("broken observer")


class BrokenLayer:
    """A layer whose forward raises at a step in one of the processes: (step, rank)."""

    def __init__(self, argument: tuple[int, int], said: dict[str, Any]) -> None:
        self.step, self.rank = argument

    def on_model_built(self, model: Any, trainer: Any) -> None:
        def blow(module: Any, inputs: Any) -> None:
            if module.training and trainer.step == self.step and _rank() == self.rank:
                raise RuntimeError("the fuse blew")

        model.blocks[0].register_forward_pre_hook(blow)


class FailInHook:
    """A hook that fails in one of the processes: (its name, at which step or None for any, rank, what it says)."""

    def __init__(self, argument: tuple[str, int | None, int, str], said: dict[str, Any]) -> None:
        name, self.step, self.rank, self.text = argument
        self.hook = name
        setattr(type(self), name, FailInHook._fail)

    def _fail(self, trainer: Any) -> None:
        if self.step in (None, trainer.step) and _rank() == self.rank:
            raise RuntimeError(self.text)


class StuckDevice:
    """Has one of the processes, (rank), believe that its device waits for the others for ever."""

    def __init__(self, argument: int, said: dict[str, Any]) -> None:
        self.rank, self.said = argument, said

    def on_training_start(self, trainer: Any) -> None:
        from apt.training import saving

        if _rank() == self.rank:
            saving.comes_to_an_end = lambda *_: False
            trainer.guard.wrong_in_state = self._wait

    def _wait(self, trainer: Any) -> str:
        if trainer.step % 6:
            raise AssertionError("that would wait for ever")
        return ""


class BrokenDevice:
    """A device that fails in the forward of a step and from there on whatever it is asked."""

    def __init__(self, argument: int, said: dict[str, Any]) -> None:
        self.step = argument

    def on_before_optimizer_step(self, trainer: Any) -> None:
        if trainer.step == self.step:
            trainer.guard.wrong_in_state = self._fail
            self._fail()

    def _fail(self, *_: Any) -> str:
        raise RuntimeError("CUDA error: device-side assert triggered")


class Buffers:
    """Gives the model buffers of kinds that not every transport knows, with other numbers in each process."""

    def __init__(self, argument: Any, said: dict[str, Any]) -> None:
        self.said = said

    def on_model_built(self, model: Any) -> None:
        import torch

        for name in ("int16", "float8_e4m3fn", "bool", "complex64"):
            model.register_buffer(name, torch.full((3,), _rank()).to(getattr(torch, name)))

    def on_training_start(self, trainer: Any) -> None:
        buffers = dict(trainer.model.named_buffers())
        self.said["buffers"] = [
            float(buffers[name].float().abs().sum()) for name in ("int16", "float8_e4m3fn", "bool")
        ] + [float(buffers["complex64"].abs().sum())]


class Slow:
    """Data that one of the processes prepares for so many seconds: (rank, seconds)."""

    def __init__(self, argument: tuple[int, float], said: dict[str, Any]) -> None:
        self.rank, self.seconds = argument

    def on_config_resolved(self) -> None:
        from apt.training import trainer

        prepare = trainer.prepare_data

        def slowly(*arguments: Any, **options: Any) -> Any:
            if _rank() == self.rank:
                time.sleep(self.seconds)
            return prepare(*arguments, **options)

        trainer.prepare_data = slowly


class Impatient:
    """A transport that waits for so many seconds and no longer."""

    def __init__(self, argument: float, said: dict[str, Any]) -> None:
        self.seconds = argument

    def on_config_resolved(self) -> None:
        from datetime import timedelta

        import torch.distributed as dist

        init = dist.init_process_group

        def impatient(*arguments: Any, **options: Any) -> None:
            init(*arguments, timeout=timedelta(seconds=self.seconds), **options)

        dist.init_process_group = impatient


class Head:
    """A module of its own that is trained by a loss of its own, outside of the model's forward."""

    def __init__(self, argument: Any, said: dict[str, Any]) -> None:
        pass

    def on_model_built(self, model: Any) -> None:
        import torch

        model.guess = torch.nn.Linear(model.d_model, 1)

    def extra_losses(self, trainer: Any, model_state: dict[str, Any]) -> dict[str, Any]:
        return {"guess": trainer.model.guess(model_state["hidden"]).square().mean()}


class Weigh:
    """Counts the bytes of weights, gradients and moments that this process holds, before an update."""

    def __init__(self, argument: Any, said: dict[str, Any]) -> None:
        self.said = said

    def on_before_optimizer_step(self, optimizer: Any, trainer: Any) -> None:
        from apt.core.world import own_part

        if trainer.step:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = [value for state in optimizer.state.values() for value in state.values()]
            held = (*parameters, *(parameter.grad for parameter in parameters), *moments)
            self.said["bytes"] = sum(own_part(tensor).nbytes for tensor in held)


class FullDisk:
    """A disk that is full for one of the processes, (rank), from its second save on."""

    def __init__(self, argument: int, said: dict[str, Any]) -> None:
        self.rank = argument

    def on_training_start(self) -> None:
        from apt.checkpoint import sharded

        self.saves, self.write = 0, sharded.write_shards
        if _rank() == self.rank:
            sharded.write_shards = self._write  # type: ignore[assignment]

    def _write(self, *arguments: Any) -> list[str]:
        self.saves += 1
        if self.saves > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.write(*arguments)


class NoMemory:
    """Leaves no memory for a copy in one of the processes, (rank)."""

    def __init__(self, argument: int, said: dict[str, Any]) -> None:
        self.rank = argument

    def on_training_start(self) -> None:
        from apt.checkpoint import background

        if _rank() == self.rank:
            background.free_memory = lambda: 10


class DieInSave:
    """Kills one of the processes while it writes its shards: (rank, which save, from 1)."""

    def __init__(self, argument: tuple[int, int], said: dict[str, Any]) -> None:
        self.rank, self.save = argument

    def on_training_start(self) -> None:
        from apt.checkpoint import sharded

        self.write, self.saves = sharded.write_shards, 0
        if _rank() == self.rank:
            sharded.write_shards = self._write  # type: ignore[assignment]

    def _write(self, *arguments: Any) -> list[str]:
        self.saves += 1
        if self.saves == self.save:
            time.sleep(0.2)  # the others have come to where they wait for it
            os.kill(os.getpid(), signal.SIGKILL)
        return self.write(*arguments)


KILL = int(signal.SIGKILL)


def left_alone(config: dict[str, Any], folder: Path, rank: int) -> dict[str, Any]:
    """What the other of two processes comes to, where process `rank` is killed in step 7; it saves in line."""
    config["checkpoint"] = {"asynchronous": False}
    killed = run(2, config, folder, ("StopAt", (7, KILL, rank)))
    assert killed[rank]["code"] == -KILL
    other = killed[1 - rank]
    assert (other["error"], other["code"]) == ("PeerLostError", 2)
    assert "another process of the run was killed, or is out of reach, in step 7" in other["message"]
    return other
