"""Runs of several processes, for tests: each is forked from one server that has torch imported."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from apt.core.runs import RunFolder

CONTEXT = multiprocessing.get_context("forkserver")
SECONDS = 60


def _start_server() -> None:
    """Start the server, unless it runs, with this process's path: it looks for what it is to import there."""
    CONTEXT.set_forkserver_preload(["apt.training.trainer", "apt.modeling.layers.attention_tva", "torch._dynamo"])
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
        options: of the trainer; and `register`, the modules of plugins that need not be installed.

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


class Head:
    """A module of its own that is trained by a loss of its own, outside of the model's forward."""

    def __init__(self, argument: Any, said: dict[str, Any]) -> None:
        pass

    def on_model_built(self, model: Any) -> None:
        import torch

        model.guess = torch.nn.Linear(model.d_model, 1)

    def extra_losses(self, trainer: Any, model_state: dict[str, Any]) -> dict[str, Any]:
        return {"guess": trainer.model.guess(model_state["hidden"]).square().mean()}


KILL = int(signal.SIGKILL)
