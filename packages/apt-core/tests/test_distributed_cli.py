"""`apt train --nproc`: what it starts, what it says, how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixture_types import MakeDistribution, RunApt

from apt.core.config import TrainingConfig
from apt.core.errors import ConfigError, DeviceError, PeerLostError, TrainingError
from apt.core.world import World
from apt.training import distributed
from apt.training.launch import launch
from apt.training.metrics import read_metrics

SECONDS = 120


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """A run that takes long enough to be stopped."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} green bottles hanging on the wall\n" for n in range(24)))
    path = tmp_path / "small.yaml"
    path.write_text(
        f"""
name: small
output_dir: {tmp_path}/runs
model: {{d_model: 16, num_heads: 2, num_layers: 1, max_seq_len: 16}}
data: {{train_path: {text}, cache_dir: {tmp_path}/cache}}
training: {{max_epochs: 100000, batch_size: 8, log_every: 2}}
hardware: {{device: cpu}}
plugins: []
"""
    )
    return path


def start(*arguments: str, **more: str) -> subprocess.Popen[str]:
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    variables |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"} | more
    command = [sys.executable, "-m", "apt", "train", *arguments]
    return subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


FAREWELL = """
import atexit, os, threading, time
from concurrent.futures import ThreadPoolExecutor
import torch
from apt.hookspecs import hookimpl

API_VERSION = (1, 0)
pool = ThreadPoolExecutor()

def compute():
    a = torch.randn(100)
    while True:
        a + a

def note(what):
    open(os.environ["NOTES"] + what + os.environ["RANK"], "w").close()

def finish():
    time.sleep(0.5)
    note("thread")

@hookimpl
def on_training_end(trainer):
    atexit.register(note, "atexit")
    threading.Thread(target=compute, daemon=True).start()
    threading.Thread(target=finish).start()
    pool.submit(note, "pool")  # a pool is closed by what Python calls before it waits for threads
"""


def test_no_thread_of_torchs_can_spoil_the_end(
    profile: Path, tmp_path: Path, make_distribution: MakeDistribution
) -> None:
    """One that computes while the interpreter is taken down aborts the process (pytorch/pytorch#38228)."""
    make_distribution("apt-farewell", plugins={"farewell": "farewell"}, modules={"farewell": FAREWELL})
    notes = tmp_path / "notes"
    notes.mkdir()
    short = ("--training.max_steps", "2", "--plugins", "farewell")
    running = start("-p", str(profile), "--nproc", "2", *short, NOTES=f"{notes}/")
    out, err = running.communicate(timeout=SECONDS)
    assert (running.returncode, err) == (0, ""), out
    assert sorted(note.name for note in notes.iterdir()) == [
        f"{what}{process}" for what in ("atexit", "pool", "thread") for process in (0, 1)
    ]


def test_a_run_of_two_processes_speaks_once_and_a_signal_to_the_launcher_ends_it_saved(
    profile: Path, tmp_path: Path
) -> None:
    running = start("-p", str(profile), "--nproc", "2")
    metrics = tmp_path / "runs" / "small-1" / "metrics.jsonl"
    expiry = time.monotonic() + SECONDS
    while not (metrics.exists() and len(list(read_metrics(metrics))) > 2):
        assert time.monotonic() < expiry and running.poll() is None, running.communicate()
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=SECONDS)
    assert running.returncode == 143, err
    assert out.count(" parameters, on cpu") == out.count("Epoch 1/") == 1, out
    said, how_to_go_on = err.splitlines()
    assert said.startswith("stopped by SIGTERM after step ") and said.endswith("; saved")
    assert how_to_go_on == f"go on with: apt train --resume {tmp_path}/runs/small-1"
    steps = int(said.split()[5])
    assert (metrics.parent / "checkpoints" / f"step-{steps:08d}").is_dir()


def test_what_is_wrong_with_the_profile_is_said_before_any_process_is_started(
    run_apt: RunApt, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apt.training.launch.launch", lambda *_: pytest.fail("it was started"))
    result = run_apt("train", "-p", str(profile), "--nproc=2", "--training.batch_size", "0")
    assert result.code == 2 and "training.batch_size" in result.err
    assert run_apt("train", "-p", str(profile), "--nproc", "0").code == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run_apt("train", "-p", str(profile), "--nproc", "2")
    assert result.code == 2 and "--nproc within a launcher" in result.err


@pytest.mark.parametrize("given", [("--nproc", "3"), ("--nproc=3",)])
def test_the_processes_get_the_command_without_nproc(
    run_apt: RunApt, profile: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...]
) -> None:
    started = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("apt.training.launch.launch", lambda *call: started.append(call) or 7)
    assert run_apt("train", *given, "-p", str(profile), "--epochs", "2").code == 7
    assert started == [(3, ["train", "-p", str(profile), "--epochs", "2"])]


def test_the_launcher_says_what_no_process_can_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.launcher import api

    monkeypatch.setattr("logging.disable", lambda level: None)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")

    def ended(error: Exception | None) -> tuple[int, str]:
        def run(*arguments: str) -> None:
            if error is not None:
                raise error

        monkeypatch.setattr(api, "elastic_launch", lambda config, program: run)
        return launch(2, ["train"]), capsys.readouterr().err

    def failed(**codes: int) -> ChildFailedError:
        return ChildFailedError("apt", {int(r[1:]): ProcessFailure(0, 1, code, "") for r, code in codes.items()})

    assert ended(None) == (0, "")
    assert ended(failed(r0=2)) == (2, ""), "it has spoken for itself"
    assert ended(failed(r1=143, r0=143)) == (143, "")
    assert ended(failed(r1=-9)) == (137, "process 1 of 2 was killed by SIGKILL\n")
    code, said = ended(failed(r0=-11))
    assert (code, said.splitlines()[0]) == (139, "error: process 0 of 2 was killed by SIGSEGV")
    assert ended(SignalException("", signal.SIGINT)) == (130, "")


# The world


def test_without_a_launcher_there_is_one_process() -> None:
    import torch

    for world in (World.of_environment({}), World.of_environment({"WORLD_SIZE": "1", "RANK": "0"})):
        assert (world.rank, world.size, world.is_first) == (0, 1, True)
        x = torch.ones(3)
        assert world.sum(x) is x and world.mean(x) is x
        assert world.maximum([3, 1]) == [3, 1] and world.gather({"a": 1}) == [{"a": 1}]
        world.wait_for_all()
        with world.joined(torch.device("cpu")), world.one_first("data"), pytest.raises(RuntimeError), world.watching():
            raise RuntimeError("Connection closed by peer")
        assert world.first_failure(ValueError()) is None
        world.end_together()


def test_half_a_world_is_refused() -> None:
    whole = {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
        "LOCAL_RANK": "1",
        "GROUP_RANK": "2",
    }
    world = World.of_environment(whole)
    assert (world.rank, world.size, world.local_rank, world.local_size, world.machine) == (1, 4, 1, 4, 2)
    for name in ("RANK", "MASTER_ADDR"):
        with pytest.raises(ConfigError, match=f"lacks {name}"):
            World.of_environment({key: value for key, value in whole.items() if key != name})
    for name, value in (("RANK", "one"), ("MASTER_PORT", "abc"), ("WORLD_SIZE", "two")):
        with pytest.raises(ConfigError, match="are not all numbers"):
            World.of_environment(whole | {name: value})
    for name, value in (("RANK", "4"), ("RANK", "-1"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "-1")):
        with pytest.raises(ConfigError, match="counts from 0"):
            World.of_environment(whole | {name: value})


def test_only_the_loss_of_a_process_is_taken_for_one() -> None:
    world = World(0, 2)
    with pytest.raises(PeerLostError, match="closed by peer"), world.watching():
        raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1")
    for others in ("the shape does not fit", "tracker at http://mlflow:5000: Connection refused"):
        with pytest.raises(RuntimeError, match=others), world.watching():
            raise RuntimeError(others)
    assert issubclass(PeerLostError, TrainingError)


@pytest.mark.parametrize(
    ("batch", "accumulation", "size", "micro_batches"),
    [(8, 1, 2, 1), (2, 4, 2, 2), (2, 4, 4, 1), (4, 2, 8, 1), (1, 6, 4, None), (12, 1, 8, None), (2, 6, 4, 3)],
)
def test_micro_batches_are_dealt_out_whole_as_far_as_they_go(
    batch: int, accumulation: int, size: int, micro_batches: int | None
) -> None:
    training = TrainingConfig(batch_size=batch, gradient_accumulation=accumulation)
    if micro_batches is None:
        with pytest.raises(ConfigError, match=f"evenly to {size} processes"):
            distributed.own_micro_batches(training, World(0, size))
    else:
        assert distributed.own_micro_batches(training, World(0, size)) == micro_batches
        assert batch * accumulation // size // micro_batches <= batch, "none is larger than the profile says"


def test_each_process_has_a_gpu_of_its_own_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    own = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", own.append)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    world = World(3, 4, local_rank=1, local_size=2, machine=1)
    assert distributed.own_device("auto", world) == distributed.own_device("cuda", world) == torch.device("cuda", 1)
    assert own == [1, 1]
    assert distributed.own_device("auto", World(0, 3, local_size=3)).type == "cpu"
    assert distributed.own_device("cpu", world).type == "cpu"
    with pytest.raises(DeviceError, match="3 processes on this machine need a GPU each, and it has 2"):
        distributed.own_device("cuda", World(0, 3, local_size=3))
    with pytest.raises(DeviceError, match="cuda:1 is one device"):
        distributed.own_device("cuda:1", world)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    assert distributed.own_device("auto", World(0, 2, local_size=2)).type == "cpu"
    with pytest.raises(DeviceError, match="mps is one device"):
        distributed.own_device("mps", World(0, 2, local_size=2))


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    distributed.share_cores(World(0, 2, local_size=2))
    monkeypatch.delenv("OMP_NUM_THREADS")
    distributed.share_cores(World(0, 1))
    assert given == []
    for size in (2, 3, 16):
        distributed.share_cores(World(0, size, local_size=size))
    assert given == [4, 2, 1]
