"""The parts of training that need no run: learning rate, optimizer groups, the step's maths, metrics, signals."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from apt.core.config import TrainingConfig
from apt.core.errors import AptWarning
from apt.data.loader import Batch
from apt.training.metrics import MetricsFile, read_metrics
from apt.training.optim import build_optimizer, learning_rate
from apt.training.signals import Interrupted, catch_signals
from apt.training.step import BatchLoss, accumulate_gradients, clip_gradients, cross_entropy, update
from apt.training.window import plain_numbers


def test_the_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    config = TrainingConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10)
    rates = [learning_rate(step, 110, config) for step in range(110)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    # halfway through the cosine the rate is halfway between peak and floor
    assert learning_rate(10 + 99 // 2, 110, config) == pytest.approx(0.55, abs=0.01)


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.55), ("constant", 1.0)])
def test_other_learning_rate_schedules(schedule: str, middle: float) -> None:
    config = TrainingConfig(learning_rate=1.0, lr_schedule=schedule)
    assert learning_rate(50, 101, config) == pytest.approx(middle)


def test_the_floor_is_a_tenth_of_the_peak_unless_given_and_a_run_of_one_step_has_a_rate() -> None:
    config = TrainingConfig(learning_rate=1.0)
    assert learning_rate(999, 1000, config) == pytest.approx(0.1)
    assert math.isfinite(learning_rate(0, 1, config))
    assert learning_rate(5000, 1000, config) == pytest.approx(0.1), "a run that is extended does not rise again"


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    taps = nn.Parameter(torch.zeros(2, 4))
    taps.no_weight_decay = True  # type: ignore[attr-defined]
    model.register_parameter("taps", taps)
    optimizer = build_optimizer(model, TrainingConfig(weight_decay=0.3))
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert decayed["param_names"] == ["0.weight"]
    assert set(spared["param_names"]) == {"taps", "0.bias", "1.weight", "1.bias"}


class Tiny(nn.Module):
    def __init__(self, aux: bool = False) -> None:
        super().__init__()
        self.embedding, self.out, self.aux = nn.Embedding(11, 8), nn.Linear(8, 11), aux

    def forward(self, tokens: torch.Tensor, positions: None = None, document_ids: None = None) -> SimpleNamespace:
        hidden = self.embedding(tokens)
        aux_loss = 0.5 * hidden.square().mean() if self.aux else None
        return SimpleNamespace(logits=self.out(hidden), hidden=hidden, aux_loss=aux_loss)


def tiny_batch(rows: int = 6) -> Batch:
    tokens = torch.randint(0, 11, (rows, 5), generator=torch.Generator().manual_seed(0))
    return Batch(tokens, tokens.roll(-1, dims=1))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts: int) -> None:
    torch.manual_seed(0)
    model, batch = Tiny(), tiny_batch()
    whole = F.cross_entropy(model(batch.tokens).logits.flatten(0, 1), batch.targets.flatten())
    expected = torch.autograd.grad(whole, list(model.parameters()))
    loss = accumulate_gradients(BatchLoss(model, nullcontext()), batch.split(parts))
    assert loss.total.item() == pytest.approx(whole.item(), rel=1e-6)
    assert not loss.total.requires_grad
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("parts", [1, 2])
def test_extra_losses_and_aux_losses_join_before_backward(parts: int) -> None:
    torch.manual_seed(0)
    model, batch = Tiny(aux=True), tiny_batch()
    seen: list[dict[str, object]] = []

    def extra(
        batch: Batch, logits: torch.Tensor, targets: torch.Tensor, state: dict[str, object]
    ) -> dict[str, torch.Tensor]:
        seen.append(state)
        return {"penalty": logits.square().mean()}

    output = model(batch.tokens)
    base = F.cross_entropy(output.logits.flatten(0, 1), batch.targets.flatten())
    whole = base + output.aux_loss + output.logits.square().mean()
    expected = torch.autograd.grad(whole, list(model.parameters()))
    loss = accumulate_gradients(BatchLoss(model, nullcontext(), extra), batch.split(parts))
    assert set(loss.parts) == {"aux_loss", "penalty"}
    assert loss.total.item() == pytest.approx(whole.item(), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert len(seen) == parts
    assert set(seen[0]) == {"tokens", "hidden", "aux_loss", "document_ids"}


def test_positions_without_a_target_do_not_count() -> None:
    logits = torch.randn(1, 4, 7)
    targets = torch.tensor([[1, -100, 2, -100]])
    expected = F.cross_entropy(logits[0, [0, 2]], torch.tensor([1, 2]))
    assert cross_entropy(logits, targets) == pytest.approx(expected.item())


def test_update_clips_steps_and_clears() -> None:
    parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr_scale": 0.5}], lr=123.0)
    parameter.grad = torch.tensor([30.0, 40.0])
    norm = clip_gradients([parameter], 1.0)
    update(optimizer, learning_rate=0.2)
    assert norm is not None
    assert norm.item() == pytest.approx(50.0)
    torch.testing.assert_close(parameter.detach(), torch.tensor([3.0 - 0.1 * 0.6, 4.0 - 0.1 * 0.8]))
    assert parameter.grad is None
    parameter.grad = torch.tensor([1.0, 0.0])
    assert clip_gradients([parameter], 0.0) is None
    update(optimizer, learning_rate=1.0)


def test_metrics_are_cut_where_a_resumed_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    for step in range(5):
        metrics.on_log({"event": "train", "step": step, "epoch": 0, "loss": math.nan if step == 1 else 0.5})
    with path.open("a") as file:
        file.write('{"event": "train", "st')  # a crash in mid-line
    MetricsFile(path, resume_step=3).on_log({"event": "train", "step": 3, "epoch": 0})
    records = list(read_metrics(path))
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert records[1]["loss"] is None, "JSON has no NaN"


def test_a_damaged_line_of_the_metrics_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"event": "train", "step": step}).encode() for step in range(4)]
    lines[1:1] = [b"\xff", b"[1]", b'{"step": "x"}', b"[" * 10_000]
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.warns(AptWarning, match=r"metrics\.jsonl:[2345] is no record of metrics") as told:
        MetricsFile(path, resume_step=3).on_training_end(None)
    assert len(told) == 4
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2]


@pytest.mark.parametrize("where", ["apt.checkpoint.durable.sync", "os.replace"])
def test_metrics_that_cannot_be_cut_stay_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"event": "train", "step": step}) + "\n" for step in range(5)))
    before = path.read_bytes()

    def full(*paths: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, full)
    with pytest.raises(OSError, match="No space left"):
        MetricsFile(path, resume_step=3)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pipes of this kind")
def test_metrics_in_a_pipe_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    os.mkfifo(path)
    with pytest.raises(OSError, match="it is a pipe or a device"):
        MetricsFile(path, resume_step=3)
    with pytest.raises(OSError, match="it is a pipe or a device"):
        next(read_metrics(path))
    assert os.listdir(tmp_path) == [path.name]


def test_metrics_are_plain_numbers_whatever_they_were() -> None:
    given = {
        "whole": 3, "narrow": np.float32(0.5), "count": np.int64(7), "quarter": Fraction(1, 4), "yes": True,
        "scalar": torch.tensor(0.25), "tally": torch.tensor([2]),
    }  # fmt: skip
    numbers = plain_numbers(given)
    assert numbers == {"whole": 3, "narrow": 0.5, "count": 7, "quarter": 0.25, "yes": 1, "scalar": 0.25, "tally": 2}
    assert {name for name, number in numbers.items() if type(number) is int} == {"whole", "count", "yes", "tally"}
    assert {name for name, number in numbers.items() if type(number) is float} == {"narrow", "quarter", "scalar"}
    with pytest.warns(AptWarning, match="the metric 'phase' is passed over: it is no number but Tensor"):
        assert plain_numbers({"phase": torch.tensor(1j), "fine": 1.5}) == {"fine": 1.5}


def test_the_first_signal_asks_and_the_second_acts(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("apt.training.signals.BOUNCE_SECONDS", 0.0)
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("acted"))
    try:
        with catch_signals() as request:
            assert not request
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.signum == signal.SIGTERM
            assert not seen
            assert "stopping after this step" in capfd.readouterr().err
            monkeypatch.setattr("apt.training.signals.BOUNCE_SECONDS", 60.0)
            os.kill(os.getpid(), signal.SIGTERM)
            assert not seen, "so soon, it is the same press of the key"
            monkeypatch.setattr("apt.training.signals.BOUNCE_SECONDS", 0.0)
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == ["acted"]
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == ["acted", "acted"]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert Interrupted(signal.SIGTERM, "stopped").exit_code == 143
    assert Interrupted(signal.SIGINT, "stopped").exit_code == 130


@pytest.mark.parametrize("how", ["broken", "closed"])
def test_a_signal_asks_also_where_nobody_is_left_to_be_told(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    kept = os.dup(2)
    end, pipe = os.pipe()
    os.close(end)
    stderr = open(pipe, "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", stderr)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("once only asks"))
    try:
        with catch_signals() as request:
            if how == "broken":
                os.dup2(pipe, 2)
            else:
                os.close(2)
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.signum == signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
        os.dup2(kept, 2)
        os.close(kept)
        stderr.close()


STUCK = """
import ctypes, os, signal, sys, threading, time
from apt.training import signals

def twice():
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.5 * signals.BOUNCE_SECONDS)

signals.STUCK_SECONDS = 0.5
with signals.catch_signals() as request:
    threading.Thread(target=twice, daemon=True).start()
    if sys.argv[1] == "stuck":
        lock = ctypes.create_string_buffer(64)  # a mutex, unlocked
        while True:
            ctypes.CDLL(None).pthread_mutex_lock(lock)  # the second time it never comes back
    while True:
        time.sleep(0.01)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a mutex of pthreads that is all zeros is unlocked")
@pytest.mark.parametrize(("how", "code"), [("stuck", 143), ("alive", -signal.SIGTERM)])
def test_a_second_signal_ends_the_process_also_where_no_python_runs(how: str, code: int) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", STUCK, how], env=environment, capture_output=True, timeout=60)
    assert done.returncode == code, done.stderr


def test_a_signal_twice_that_is_heard_ends_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt.training.signals.BOUNCE_SECONDS", 0.02)
    monkeypatch.setattr("apt.training.signals.STUCK_SECONDS", 0.02)
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("acted"))
    try:
        with catch_signals():
            for _ in range(5):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(seen) == 4
    assert signal.set_wakeup_fd(-1) == -1, "it is as it was"
    assert not any(thread.name == "apt-signals" for thread in threading.enumerate())


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request
    finally:
        signal.signal(signal.SIGHUP, before)
