"""Going on where a run stopped: wherever that was in an epoch, with any number of workers and of processes, whatever
the clock says; and what checkpoints hold."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lab import KILLED, Lab, Row, end, end_of, in_a_child, last_good
from made_distribution import make_distribution

from apt.checkpoint.store import Checkpoint, CheckpointStore
from apt.core.runs import RunFolder
from apt.training.run_lock import LOCK

DAY = 86_400.0
TOLERANCE = 1e-5
"""How far weights may be from those of one process, relative to their size: what docs/distributed.md says."""


class DuringMicroBatch:
    """Sends a signal while a micro-batch of a step is in work."""

    def __init__(self, signum: int, step: int, micro_batch: int) -> None:
        self.signum, self.step, self.micro_batch, self.count = signum, step, micro_batch, 0

    def on_step_start(self) -> None:
        self.count = 0

    def extra_losses(self, trainer: Any) -> None:
        self.count += 1
        if (trainer.step, self.count) == (self.step, self.micro_batch):
            os.kill(os.getpid(), self.signum)


class AtEpochsEnd:
    """Kills the run when the last step of an epoch is done and nothing of it is saved."""

    def on_epoch_end(self, epoch: int) -> None:
        if epoch == 0:
            os.kill(os.getpid(), signal.SIGKILL)


PLACES: dict[str, tuple[int | None, Callable[[], object] | None, int]] = {
    "at an epoch's edge": (6, None, 143),
    "after an epoch's first step": (7, None, 143),
    "in mid-epoch": (9, None, 143),
    "by SIGTERM in mid-accumulation": (None, lambda: DuringMicroBatch(signal.SIGTERM, 7, 2), 143),
    "by SIGKILL in mid-accumulation": (None, lambda: DuringMicroBatch(signal.SIGKILL, 7, 2), KILLED),
    "by SIGKILL at an epoch's end": (None, AtEpochsEnd, KILLED),
}
"""Where a run stops: after which step or by which hook, and with which exit code."""


def position(lab: Lab, place: str, smoke: bool) -> Row:
    """A run stops at a place of an epoch, and goes on; each with 0, 2 and 3 workers, before and after."""
    row = Row(f"stopped {place}; 0, 2, 3 workers before and after")
    until, hook, expected = PLACES[place]
    whole, run = lab.folder / "whole", lab.folder / "victim"
    assert lab.train(whole)[0] == 0
    for before, after in [(0, 2), (3, 0)] if smoke else itertools.product((0, 2, 3), repeat=2):
        code, said = replace(lab, workers=before).train(run, until, None, *([hook()] if hook else []))
        problem = "" if code == expected else f"exit {code} and not {expected}: {said}"
        lost = lab.steps_done(run) - (last_good(run) or 0)
        row.add(f"{before}, then {after}", problem or replace(lab, workers=after).finish(run, end_of(whole)), lost)
        lab.remove(run)
    return row


# The clock


def clock(lab: Lab) -> Row:
    """Checkpoints dated tomorrow and yesterday, on a machine whose clock is a day off: the order is that of the
    steps."""
    row = Row("checkpoints dated tomorrow and yesterday, a clock a day off")
    whole, base = lab.folder / "whole", lab.folder / "base"
    assert lab.train(whole)[0] == 0
    assert lab.train(base, until=lab.steps // 2)[0] == 143
    older, newer = CheckpointStore(RunFolder(base).checkpoints).steps()[-2:]
    kept = CheckpointStore(RunFolder(whole).checkpoints).steps()
    dates = {"all tomorrow": (DAY, DAY), "all yesterday": (-DAY, -DAY), "the older one tomorrow": (DAY, -DAY)}
    for (dated, ages), shift in itertools.product(dates.items(), (-DAY, 0.0, DAY)):
        run = lab.copy(base, "victim")
        for step, age in zip((older, newer), ages, strict=True):
            folder = RunFolder(run).checkpoints / f"step-{step:08d}"
            for path in (*folder.iterdir(), folder):
                os.utime(path, (time.time() + age,) * 2)
        problem = "" if last_good(run) == newer else f"step {last_good(run)} is taken for the newest"
        with shifted_clock(shift):
            problem = problem or lab.finish(run, end_of(whole))
        left = CheckpointStore(RunFolder(run).checkpoints).steps()
        row.add(f"{dated}, the clock {shift:+.0f} s", problem or ("" if left == kept else f"kept are {left}"))
        lab.remove(run)
    return row


@contextmanager
def shifted_clock(seconds: float) -> Iterator[None]:
    """Inside this block Python's clock, that of children that are forked included, is off."""
    clock, clock_ns = time.time, time.time_ns
    time.time = lambda: clock() + seconds
    time.time_ns = lambda: clock_ns() + int(seconds * 1e9)
    try:
        yield
    finally:
        time.time, time.time_ns = clock, clock_ns


# Several trainers


def trainers(lab: Lab, smoke: bool) -> Row:
    """Of those who would go on with a run at once, one does, and the others are refused in one line; the folder of one
    that died is taken over, whatever its lock says. Each comes to the end of a run that was alone."""
    row = Row("several trainers in one folder, a dead one's lock")
    whole, base = lab.folder / "whole", lab.folder / "base"
    assert lab.train(whole)[0] == 0
    assert lab.train(base, until=lab.steps // 2)[0] == 143
    slow = replace(lab, pause=0.5)  # the others come while it is at work

    run = lab.copy(base, "second")
    (first,) = slow.begin(run)
    wait_until(lambda: (run / LOCK).exists())
    code, said = lab.train(run)
    told = said.startswith(f"another trainer (process {first[0]}) is at work in {run}") and "\n" not in said
    problem = "" if code == 2 and told else f"exit {code}: {said}"
    code, said = end(*first)
    problem = problem or (f"the first one ends with {code}: {said}" if code else "")
    row.add("a second one", problem or lab.finish(run, end_of(whole)))

    run = lab.copy(base, "crowd")
    crowd = [slow.begin(run, said=f"said-{number}")[0] for number in range(4)]
    codes = sorted(end(*one)[0] for one in crowd)
    row.add("four at once", (f"exits {codes}" if codes != [0, 2, 2, 2] else "") or lab.finish(run, end_of(whole)))

    for what, content in list(LEFT_LOCKS.items())[: 2 if smoke else None]:
        run = lab.copy(base, "dead")
        code, said = lab.train(run, None, None, DuringMicroBatch(signal.SIGKILL, lab.steps - 2, 1))
        problem = "" if code == KILLED and (run / LOCK).exists() else f"exit {code}, or no lock is left: {said}"
        if content is not None:
            (run / LOCK).write_bytes(content)
        row.add(what, problem or lab.finish(run, end_of(whole)), lab.steps_done(run) - (last_good(run) or 0))
    return row


LEFT_LOCKS: dict[str, bytes | None] = {
    "one that was killed": None,
    "its lock names a process that lives": f"{os.getpid()} {socket.gethostname()}\n".encode(),
    "its lock names another machine": b"7 elsewhere\n",
    "its lock is empty": b"",
    "its lock is no text": b"\xff\x00" * 64,
}
"""What is in the lock that a trainer has left; None: what it wrote."""


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something that is to happen."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)


# What is kept


def consecutive(lab: Lab) -> Row:
    """A checkpoint after every step: each is another one, and holds what the run held when it was taken."""
    row = Row(f"consecutive checkpoints, saved {'in the background' if lab.asynchronous else 'in line'}")
    run, notes = lab.folder / "run", lab.folder / "taken.json"

    def work() -> None:
        from apt.training import saving
        from apt.training.trainer import Trainer

        real, taken = saving.capture, {}

        def capture(trainer: Any) -> Checkpoint:
            checkpoint = real(trainer)
            taken[checkpoint.step] = fingerprint(checkpoint)
            return checkpoint

        saving.capture = capture
        Trainer(lab.config(), quiet=True, run_dir=run).train()
        notes.write_text(json.dumps(taken))

    code, said = in_a_child(work, lab.folder / "said.txt")
    assert code == 0, said
    taken = json.loads(notes.read_text())
    store = CheckpointStore(RunFolder(run).checkpoints)
    seen: set[str] = set()
    for step in range(1, lab.steps + 1):
        checkpoint = store.load(step)
        weights = fingerprint(checkpoint.model)
        problem = "" if fingerprint(checkpoint) == taken[str(step)] else "it does not hold what the run held"
        row.add(f"step {step}", problem or ("its weights are those of another one" if weights in seen else ""))
        seen.add(weights)
    return row


def fingerprint(value: Any) -> str:
    """A hash of a state, to the last bit of its tensors."""
    digest = hashlib.sha256()

    def take(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype} {list(part.shape)}".encode())
            digest.update(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for key in sorted(part, key=repr):
                digest.update(repr(key).encode())
                take(part[key])
        elif isinstance(part, list | tuple):
            digest.update(f"{len(part)} items".encode())
            for item in part:
                take(item)
        else:
            digest.update(repr(part).encode())

    slots = (getattr(value, name) for name in Checkpoint.__slots__) if isinstance(value, Checkpoint) else (value,)
    for slot in slots:
        take(slot)
    return digest.hexdigest()


# Numbers that are none


class Poison:
    """Puts a value somewhere, in one step."""

    def __init__(self, where: str, value: float, step: int) -> None:
        self.where, self.value, self.step = where, value, step

    def extra_losses(self, trainer: Any, logits: torch.Tensor) -> dict[str, torch.Tensor] | None:
        due = self.where == "loss" and trainer.step == self.step
        return {"poison": logits.new_tensor(self.value)} if due else None

    def on_before_optimizer_step(self, trainer: Any) -> None:
        if self.where == "gradient" and trainer.step == self.step:
            next(iter(trainer.model.parameters())).grad.view(-1)[0] = self.value

    def on_step_end(self, step: int, trainer: Any) -> None:
        weight = next(iter(trainer.model.parameters())).detach()
        if self.where == "weight" and step == self.step:
            weight.view(-1)[0] = self.value


def not_finite(lab: Lab) -> Row:
    """NaN, inf and -inf: the run ends, or goes on as its profile says, and none gets into a checkpoint."""
    row = Row(f"NaN, inf, -inf in loss, gradient, weight; `on_not_finite: {lab.on_not_finite}`")
    for where, value in itertools.product(("loss", "gradient", "weight"), (math.nan, math.inf, -math.inf)):
        run = lab.folder / "victim"
        code, said = lab.train(run, None, None, Poison(where, value, 8))
        ends = lab.on_not_finite == "stop" or (lab.on_not_finite, where) == ("skip", "weight")
        problem = "" if code == (2 if ends else 0) else f"exit {code}: {said}"
        store = CheckpointStore(RunFolder(run).checkpoints)
        for step in store.steps():
            checkpoint = store.load(step)
            moments = [value for state in checkpoint.optimizer["state"].values() for value in state.values()]
            if not all(bool(tensor.isfinite().all()) for tensor in (*checkpoint.model.values(), *moments)):
                problem = problem or f"the checkpoint of step {step} holds it"
        latest = store.latest()
        if latest != (8 if ends else lab.steps):
            problem = problem or f"the last checkpoint is of step {latest}"
        row.add(f"{value} in the {where}", problem, lab.steps_done(run) - (latest or 0))
        lab.remove(run)
    return row


# Several processes

FUSE = """
import os, signal
from pathlib import Path
from apt.hookspecs import hookimpl

API_VERSION = (1, 0)

@hookimpl
def on_step_end(step):
    rank, at, fuse = os.environ["FUSE"].split(" ", 2)
    if os.environ.get("RANK", "0") == rank and step + 1 == int(at) and Path(fuse).exists():
        Path(fuse).unlink()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def apt_train(lab: Lab, nproc: int, name: str, steps: int, fuse: str = "") -> tuple[int, str]:
    """Begin or go on with the run of this name, up to a step, in several processes; the exit code, and what was said on
    standard error.

    Args:
        fuse: "RANK STEP": that process dies after that step.
    """
    profile, site, file = lab.folder / "small.yaml", lab.folder / "site", lab.folder / "fuse"
    if not profile.exists():
        config = lab.config() | {"output_dir": str(lab.folder / "runs"), "plugins": ["fuse"]}
        config["model"]["dropout"] = 0.0  # each process draws numbers of its own
        config["training"]["lr_schedule"] = "constant"  # the length of the run is given in parts
        profile.write_text(yaml.safe_dump(config))
        site.mkdir()
        make_distribution(site, "apt-fuse", plugins={"fuse": "fuse_plugin"}, modules={"fuse_plugin": FUSE})
    run = run_of(lab, name)
    source = ["--resume", str(run)] if run.exists() else ["-p", str(profile), "--name", name]
    if fuse:
        file.touch()
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path]), "OMP_NUM_THREADS": "1",
        "APT_CACHE_DIR": str(lab.folder / "found"), "APT_IMPORT_SECONDS": "120",
        "FUSE": f"{fuse or 'none 0'} {file}", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    command = [sys.executable, "-m", "apt", "train", *source, "--quiet", "--nproc", str(nproc)]
    done = subprocess.run(
        [*command, "--training.max_steps", str(steps)], env=environment, capture_output=True, text=True, timeout=600
    )
    return done.returncode, done.stderr


def run_of(lab: Lab, name: str) -> Path:
    return lab.folder / "runs" / f"{name}-1"


def fewer(lab: Lab, smoke: bool) -> Row:
    """Fewer processes at each resume: the weights of a run in one process."""
    parts = [(2, 6), (1, 12)] if smoke else [(4, 4), (2, 8), (1, 12)]
    row = Row(f"`apt train --nproc`: {' -> '.join(str(size) for size, _ in parts)} processes")
    code, said = apt_train(lab, 1, "alone", lab.steps)
    assert code == 0, said
    for size, until in parts:
        code, said = apt_train(lab, size, "fewer", until)
        row.add(f"{size} processes", "" if code == 0 else f"exit {code}: {said}")
    row.add("the end", far_apart(run_of(lab, "fewer"), run_of(lab, "alone")))
    return row


def killed(lab: Lab, smoke: bool) -> Row:
    """One of two processes dies, the one that writes or the other: a clear end, and a checkpoint that resumes."""
    row = Row("`apt train --nproc 2`: SIGKILL of one process")
    run, whole = run_of(lab, "killed"), run_of(lab, "whole")
    code, said = apt_train(lab, 2, "whole", lab.steps)
    assert code == 0, said
    for rank, step in [(1, 7)] if smoke else itertools.product((0, 1), (5, 7, 8)):
        shutil.rmtree(run, ignore_errors=True)
        code, said = apt_train(lab, 2, "killed", lab.steps, f"{rank} {step}")
        good = last_good(run)
        told = re.search(rf"process {rank} of 2 was killed by SIGKILL|another process of the run was killed", said)
        problem = f"it is not said: {said}" if not told else "" if code else "exit 0"
        if not problem:
            code, said = apt_train(lab, 2, "killed", lab.steps)
            problem = f"the resumed run ends with {code}: {said}" if code else ""
        if not problem and end_of(run) != end_of(whole):
            problem = "the end is another one"
        row.add(f"process {rank} after step {step}", problem, step - (good or 0))
    return row


def far_apart(run: Path, other: Path) -> str:
    """Whether the weights of two runs differ by more than the order of sums explains, in words; "" if not."""
    ours, theirs = (CheckpointStore(RunFolder(path).checkpoints).load_weights()[1] for path in (run, other))
    for name, weight in theirs.items():
        difference = float((ours[name] - weight).abs().max() / weight.abs().max().clamp_min(1e-3))
        if not difference <= TOLERANCE:
            return f"{name} is off by {difference:.1e}"
    return ""
