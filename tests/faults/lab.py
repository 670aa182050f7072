"""Small runs in processes of their own, forked from one that has imported everything, so that each takes a fraction of
a second; what their ends are compared by; and a row of the table."""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import shutil
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from faulty_files import FaultyFiles
from safetensors.torch import load_file

from apt.checkpoint.store import CheckpointStore
from apt.core.errors import AptError, AptWarning, CheckpointError
from apt.core.runs import RunFolder
from apt.training.trainer import Trainer

KILLED = -signal.SIGKILL


@dataclass
class Row:
    """One line of the table."""

    name: str
    tried: int = 0
    survived: int = 0
    worst: int = 0
    """Steps lost at most, since the fault."""
    wrong: list[str] = field(default_factory=list)
    skipped: str = ""
    """Why it cannot be tried here."""

    def add(self, point: str, problem: str, lost: int = 0) -> None:
        self.tried += 1
        self.survived += not problem
        self.worst = max(self.worst, lost)
        if problem:
            self.wrong.append(f"{self.name}, {point}: {problem}")


@dataclass
class Lab:
    """
    Args:
        folder: where everything is made.
        every: steps between checkpoints.
        steps: of a whole run; an epoch has 6.
        asynchronous: how checkpoints are written.
        keep_last: how many of the newest are kept.
        workers: threads that make batches.
        accumulation: micro-batches of a step, which has the same rows for any number.
        pause: seconds that each step takes beside its own work.
        on_not_finite: what the profile says of numbers that are none.
        processes: how many train together; several hold the model in shards.
    """

    folder: Path
    every: int = 2
    steps: int = 12
    asynchronous: bool = True
    keep_last: int = 2
    workers: int = 0
    accumulation: int = 1
    pause: float = 0.0
    on_not_finite: str = "stop"
    processes: int = 1

    @property
    def way(self) -> str:
        """How checkpoints are written, in words."""
        way = f"saving {'in the background' if self.asynchronous else 'in line'}"
        return way + (", in shards" if self.processes > 1 else "")

    def config(self) -> dict[str, Any]:
        text = self.folder / "text.txt"
        if not text.exists():
            text.write_text("".join(f"{n} green bottles hanging on the wall\n" for n in range(24)))
        return {
            "name": "fault",
            "plugins": [],
            "model": {"d_model": 8, "num_heads": 1, "num_layers": 1, "max_seq_len": 16, "dropout": 0.1},
            "data": {"train_path": str(text), "cache_dir": str(self.folder / "cache"), "workers": self.workers},
            "training": {
                "max_epochs": 999, "max_steps": self.steps, "log_every": 2,
                "batch_size": 8 // self.accumulation, "gradient_accumulation": self.accumulation,
                "on_not_finite": self.on_not_finite,
            },
            "checkpoint": {"every": self.every, "keep_last": self.keep_last, "asynchronous": self.asynchronous},
            "hardware": {"device": "cpu", "parallel": "fsdp" if self.processes > 1 else "ddp"},
        }  # fmt: skip

    def train(
        self, run: Path, until: int | None = None, faults: FaultyFiles | None = None, *hooks: object
    ) -> tuple[int, str]:
        """Begin or go on with a run, up to its end or to a step; returns the exit code (minus the signal that killed
        it) and what was said in the end: of several processes, by the one that is to fail, or by one that ended
        otherwise than it should."""
        ends = [end(*process) for process in self.begin(run, until, faults, *hooks)]
        victim = faults.rank if faults is not None and faults.nth else None
        wrong = [one for rank, one in enumerate(ends) if rank != victim and one[0] not in (0, 2, KILLED)]
        return wrong[0] if wrong else ends[victim] if victim is not None else max(ends, key=lambda one: abs(one[0]))

    def begin(
        self, run: Path, until: int | None = None, faults: FaultyFiles | None = None, *hooks: object, said: str = "said"
    ) -> list[tuple[int, Path]]:
        """What `train` does, without waiting for the end: for each process what `end` takes.

        Args:
            said: what the files that their messages go through are called.
        """
        folder = RunFolder(run)
        resume = folder if folder.holds_a_run() else None
        port = free_port()

        def work(rank: int) -> None:
            if self.processes > 1:
                os.environ |= {
                    "RANK": str(rank), "WORLD_SIZE": str(self.processes), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
                }  # fmt: skip
            trainer = Trainer(self.config(), quiet=True, run_dir=None if resume else run, resume=resume)
            for hook in (Progress(self.progress(run), until, self.pause), *hooks):
                trainer.register_hook(hook)
            here = of_process(faults, rank)
            if here is not None:
                here.install()
            trainer.train()
            if here is not None and here.tally is not None:
                here.tally.write_text(str(here.count))

        processes: list[tuple[int, Path]] = []
        for rank in range(self.processes):
            file = self.folder / f"{said}-{rank}.txt"
            processes.append((start(functools.partial(work, rank), file), file))
            if self.processes > 1:
                os.setpgid(processes[rank][0], processes[0][0])
        return processes

    def progress(self, run: Path) -> Path:
        """The file, outside the run's folder, that tells how many steps were done."""
        return run.with_name(run.name + ".step")

    def steps_done(self, run: Path) -> int:
        path = self.progress(run)
        return int(path.read_text() or 0) if path.exists() else 0

    def copy(self, base: Path, name: str) -> Path:
        """A run to do harm to, as `base` is."""
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(base, target)
        self.progress(target).write_text(str(self.steps_done(base)))
        return target

    def finish(self, run: Path, whole: str) -> str:
        """Go on with a run to its end, which is to be `whole`; says what was wrong with that, "" if nothing."""
        code, said = self.train(run)
        if code != 0:
            return f"the resumed run ends with {code}: {said}"
        if end_of(run) != whole:
            return "the end is another one"
        strays = [path.name for path in RunFolder(run).checkpoints.iterdir() if not path.name[5:].isdigit()]
        return f"{strays} is left" if strays else ""

    def remove(self, run: Path) -> None:
        shutil.rmtree(run)
        self.progress(run).unlink(missing_ok=True)


class Progress:
    """Notes the steps that are done, and stops the run after a given one, as SIGTERM does."""

    def __init__(self, path: Path, until: int | None, pause: float) -> None:
        self.path, self.until, self.pause = path, until, pause
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT)

    def on_step_end(self, step: int) -> None:
        time.sleep(self.pause)
        os.pwrite(self.file, f"{step + 1:<9}".encode(), 0)
        if step + 1 == self.until:
            signal.raise_signal(signal.SIGTERM)


def of_process(faults: FaultyFiles | None, rank: int) -> FaultyFiles | None:
    """What is to happen to one of the processes of a run."""
    if faults is None or rank == faults.rank:
        return faults
    if faults.ledger is None:
        return None
    return replace(faults, nth=0, ledger=Path(f"{faults.ledger}.{rank}"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def in_a_child(work: Callable[[], int | None], said: Path, shown: Path | str = os.devnull) -> tuple[int, str]:
    """Run `work` in a forked process: the exit code that it returns or the command line would give it, and the message
    of its end.

    Args:
        said: a file to pass the message through.
        shown: where goes what the process prints.
    """
    return end(start(work, said, shown), said)


def start(work: Callable[[], int | None], said: Path, shown: Path | str = os.devnull) -> int:
    """Begin what `in_a_child` does; returns the process's number."""
    said.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # What the child prints is in nobody's way; the message is.
            output = os.open(shown, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            warnings.simplefilter("ignore", AptWarning)
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # they may be ignored where the suite itself was started
                signal.signal(getattr(signal, name), signal.SIG_DFL)
            try:
                code = work() or 0
            except AptError as error:
                said.write_text(str(error))
                code = error.exit_code
            except BaseException:
                said.write_text(traceback.format_exc())
        finally:
            os._exit(code)
    return child


def end(child: int, said: Path) -> tuple[int, str]:
    """Wait for the end of what `start` has begun."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text() if said.exists() else ""


def end_of(run: Path) -> str:
    """A hash of the weights and of every other tensor that the last checkpoint holds."""
    store = CheckpointStore(RunFolder(run).checkpoints)
    latest = store.latest()
    assert latest is not None
    store.load(latest)
    digest = hashlib.sha256()
    for file in sorted((store.folder / f"step-{latest:08d}").glob("*.safetensors")):
        # Not the bytes of the file: safetensors writes what is said of it in any order.
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{file.name} {name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{latest}-{digest.hexdigest()}"


def last_good(run: Path) -> int | None:
    """The step that a resume would go on from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AptWarning)
        try:
            return CheckpointStore(RunFolder(run).checkpoints).load().step
        except CheckpointError:
            return None


def prepare_process() -> None:
    """Import now what every run would import, and take one thread, as forking and bit-for-bit comparisons need it."""
    importlib.import_module("torch._dynamo")  # two seconds, which the first optimizer would take
    torch.set_num_threads(1)
