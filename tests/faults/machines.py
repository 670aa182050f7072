"""Two machines, each a network namespace with an address of its own, joined by a cable: torch's launcher on both, and
what becomes of a run when one of them is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lab import Lab, Row

from apt.checkpoint.store import CheckpointStore
from apt.core.errors import AptWarning
from apt.core.runs import RunFolder
from apt.training.metrics import read_metrics

NAMES = ("apt-fault-1", "apt-fault-2")
ADDRESSES = ("10.97.0.1", "10.97.0.2")
PROCESSES = 2
"""Of each machine."""

STEPS, EVERY = 400, 20
TOLERANCE = 1e-5
"""How far a loss may be from that of one process, relative to it: docs/distributed.md."""

FAULTS = ("a process killed", "a machine gone", "the cable pulled")


def machines(lab: Lab) -> Row:
    """The same profile in one process and in four on two machines; then a fault in mid-run, and one process goes on."""
    row = Row("two machines: ddp, fsdp, " + ", ".join(FAULTS))
    if reason := _cannot():
        row.skipped = reason
        return row
    profile = lab.folder / "profile.yaml"
    config = lab.config()
    config["model"]["dropout"] = 0.0
    config["training"] |= {"max_steps": STEPS, "eval_batches": 1}
    config["checkpoint"] |= {"every": EVERY}
    profile.write_text(yaml.safe_dump(config))
    alone = lab.folder / "alone"
    _apt(lab, "train", "-p", str(profile), "--run-dir", str(alone))
    with _joined():
        for parallel in ("ddp", "fsdp"):
            run = lab.folder / parallel
            ends = [one.wait() for one in _launched(lab, profile, run, "--hardware.parallel", parallel)]
            row.add(parallel, _difference(run, alone) if ends == [0, 0] else f"exit codes {ends}")
        for fault in FAULTS:
            run = lab.folder / fault.replace(" ", "-")
            problem = _fault(lab, profile, run, fault)
            if not problem:
                _apt(lab, "train", "--resume", str(run))
                problem = _difference(run, alone)
            row.add(fault, problem)
    return row


def _fault(lab: Lab, profile: Path, run: Path, fault: str) -> str:
    """What is wrong with how the run ends, "" if nothing: every step that was done is saved."""
    first, second = _launched(lab, profile, run)
    while _last_record(run).get("step", 0) < STEPS // 4:
        time.sleep(0.05)
        if first.poll() is not None:
            second.kill()
            return "the run ended before the fault"
    theirs = [int(process) for process in _ip("netns", "pids", NAMES[1]).split()]
    if fault == "the cable pulled":
        _ip("-n", NAMES[1], "link", "set", "cable2", "down")
    else:
        for process in theirs[-1:] if fault == "a process killed" else theirs:
            os.kill(process, signal.SIGKILL)
    first.wait()
    second.kill()  # a launcher that is cut off may wait for the other one for long
    second.wait()
    _ip("-n", NAMES[1], "link", "set", "cable2", "up")
    said = (lab.folder / f"{run.name}-1.txt").read_text()
    saved = CheckpointStore(RunFolder(run).checkpoints).latest() or 0
    wanted = f"is out of reach, in step {saved}; the run is saved in {run}"
    return "" if wanted in said else f"step {saved} is saved, and said is: {said[-500:]}"


def _last_record(run: Path) -> dict[str, Any]:
    """Of the run's metrics; empty if there is none yet."""
    path = RunFolder(run).metrics
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AptWarning)  # the line that is being written
        return ([{}, *read_metrics(path)] if path.exists() else [{}])[-1]


def _difference(run: Path, alone: Path) -> str:
    """How the last losses of two runs differ, if it is more than they may."""
    ours, theirs = _last_record(run), _last_record(alone)
    near = abs(ours["val_loss"] - theirs["val_loss"]) <= TOLERANCE * theirs["val_loss"]
    return "" if near and ours["step"] == theirs["step"] else f"the end is {ours}, and in one process {theirs}"


def _launched(lab: Lab, profile: Path, run: Path, *options: str) -> list[subprocess.Popen[bytes]]:
    """The launchers of one run on both machines."""
    shutil.rmtree(run, ignore_errors=True)
    started = []
    for number, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True), 1):
        launcher = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(PROCESSES),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29500", "--rdzv-id", run.name,
            "--rdzv-conf", f"is_host={number == 1}", "--local-addr", address,  # as names would tell
            "-m", "apt", "train", "-p", str(profile), "--run-dir", str(run), *options,
        ]  # fmt: skip
        environment = _environment() | {"GLOO_SOCKET_IFNAME": f"cable{number}"}
        with (lab.folder / f"{run.name}-{number}.txt").open("wb") as said:
            started.append(
                subprocess.Popen(["ip", "netns", "exec", name, *launcher], stdout=said, stderr=said, env=environment)
            )
    return started


def _apt(lab: Lab, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "apt", *arguments, "--quiet"], env=_environment(), check=True)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def _cannot() -> str:
    """Why there cannot be two machines here; "" if there can."""
    if not shutil.which("ip"):
        return "there is no command ip"
    try:
        with _joined():
            return ""
    except subprocess.CalledProcessError:
        return "this user may not make network namespaces"


@contextmanager
def _joined() -> Iterator[None]:
    """Inside this block there are the two machines, and the cable."""
    made = []
    try:
        for name in NAMES:
            _ip("netns", "add", name)
            made.append(name)
        _ip("link", "add", "cable1", "netns", NAMES[0], "type", "veth", "peer", "cable2", "netns", NAMES[1])
        for number, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True), 1):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", f"cable{number}")
            for device in (f"cable{number}", "lo"):
                _ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in made:
            _ip("netns", "delete", name)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
