"""What a process takes: sampled when asked or in a thread, remembered, and given back; what torch's GPU adds to it."""

from __future__ import annotations

import gc
import mmap
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from apt.core.device import (
    Need,
    accelerator_in_use,
    accelerator_memory,
    describe_hardware,
    estimate_memory,
    memory_of,
    release_memory,
)
from apt.core.monitor import ResourceMonitor

MB = 1 << 20


def test_samples_follow_what_the_process_holds() -> None:
    monitor = ResourceMonitor(history=2)
    before = monitor.sample()
    held = bytearray(b"x" * (64 * MB))
    grown = monitor.sample()
    assert grown.memory - before.memory > 32 * MB
    assert list(monitor.history) == [before, grown] and before.seconds < grown.seconds
    del held
    last = monitor.sample()
    assert list(monitor.history) == [grown, last], "the newest two are kept"
    assert monitor.peak_memory == max(sample.memory for sample in (before, grown, last))
    assert last.gpu_memory == monitor.peak_gpu_memory == 0


def test_cores_are_the_time_at_work_in_the_time_that_passed() -> None:
    monitor = ResourceMonitor()
    started = time.process_time()
    while time.process_time() - started < 0.1:
        pass
    worked = monitor.sample()
    time.sleep(0.3)
    idle = monitor.sample()
    spent = worked.cores * worked.seconds
    assert spent >= 0.1
    assert idle.cores < 0.5, "asleep"
    assert idle.cores * (idle.seconds - worked.seconds) + spent == pytest.approx(time.process_time() - started, abs=0.1)


def test_what_rises_and_falls_between_two_looks_is_seen_while_it_watches() -> None:
    monitor = ResourceMonitor()
    with monitor.watching(every=0.01):
        low = monitor.history[0].memory
        held = mmap.mmap(-1, 64 * MB)  # its own pages: what Python or torch allocates may be there already
        held.write(bytes(64 * MB))
        seen = len(monitor.history)
        deadline = time.monotonic() + 20
        while len(monitor.history) < seen + 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        held.close()
    assert monitor.peak_memory - low > 32 * MB
    count = len(monitor.history)
    time.sleep(0.05)
    assert len(monitor.history) == count, "it has stopped"
    monitor.stop()
    assert len(monitor.history) == count


def test_it_is_watched_by_one_thread_however_often_it_is_started() -> None:
    monitor = ResourceMonitor()
    monitor.start(60)
    first = monitor._watch
    monitor.start(60)
    assert first is not None and monitor._watch is not None
    assert not first[0].is_alive() and monitor._watch[0].is_alive()
    monitor.stop()


def test_the_gpu_counts_once_torch_has_used_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[int] = []

    def found(module: object, device: str | None = "cuda") -> SimpleNamespace:
        accelerator = SimpleNamespace(current_accelerator=lambda: device, is_available=lambda: True)
        return SimpleNamespace(accelerator=accelerator, get_device_module=lambda _: module)

    gpu = SimpleNamespace(
        is_initialized=lambda: True,
        memory_allocated=lambda: 5,
        max_memory_allocated=lambda: 7,
        empty_cache=lambda: cleared.append(1),
    )
    monkeypatch.setitem(sys.modules, "torch", found(gpu))
    monitor = ResourceMonitor()
    assert monitor.sample().gpu_memory == 5 and monitor.peak_gpu_memory == 7
    release_memory()
    assert cleared == [1]
    being_imported = SimpleNamespace()
    for unused in (being_imported, found(SimpleNamespace(is_initialized=lambda: False)), found(gpu, device=None)):
        monkeypatch.setitem(sys.modules, "torch", unused)
        assert accelerator_in_use() is None and accelerator_memory() == (0, 0)
    release_memory()
    assert cleared == [1]
    held = [0]
    mps = SimpleNamespace(current_allocated_memory=lambda: held[0])
    monkeypatch.setitem(sys.modules, "torch", found(mps, "mps"))
    assert accelerator_in_use() is None, "it does not say whether it is used, and nobody holds its memory"
    held[0] = 1
    assert accelerator_in_use() is mps and accelerator_memory() == (0, 0), "its memory is the machine's"


def test_it_does_not_import_torch() -> None:
    code = (
        "import sys; from apt.core.monitor import ResourceMonitor; from apt.core.device import release_memory\n"
        "ResourceMonitor().sample(); release_memory(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_release_memory_takes_what_nobody_can_reach() -> None:
    class Cell:
        def __init__(self) -> None:
            self.itself = self

    gc.disable()
    try:
        lost = weakref.ref(Cell())
        assert lost() is not None
        release_memory()
        assert lost() is None
    finally:
        gc.enable()


def test_the_estimate_of_a_model_needs_its_shapes_alone() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(10, 10), nn.BatchNorm1d(3, affine=False))
    model[1].requires_grad_(False)
    buffers = 3 * 4 * 2 + 8
    weights = 4 * (1_000_000 + 110) + buffers
    assert estimate_memory(model) == Need(1_000_110, weights, weights + 3 * 4 * 1_000_000)


def test_the_hardware_is_what_this_process_may_use() -> None:
    machine = describe_hardware()
    assert machine.memory == memory_of(torch.device("cpu"))
    assert 0 < machine.free < machine.memory
