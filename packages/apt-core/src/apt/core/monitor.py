"""What a process takes of its machine, now and at its highest."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Lock, Thread

from apt.core.device import accelerator_memory


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at the process."""

    seconds: float
    """Since the monitor was made."""
    cores: float
    """Cores at work, on average since the sample before: 1.5 is one and a half."""
    memory: int
    """Resident bytes of this process."""
    gpu_memory: int
    """Bytes that torch has allocated on the GPU; 0 without one."""


class ResourceMonitor:
    """Takes samples when asked, and remembers the newest ones and the peaks.

    Args:
        history: how many samples are kept.
    """

    def __init__(self, history: int = 1000) -> None:
        import psutil

        self._process = psutil.Process()
        self.history: deque[Sample] = deque(maxlen=history)
        self.peak_memory = 0
        self.peak_gpu_memory = 0
        self._started = self._looked = time.monotonic()
        self._worked = time.process_time()
        self._one_at_a_time = Lock()
        self._watch: tuple[Thread, Event] | None = None

    def sample(self) -> Sample:
        """Look now."""
        gpu_memory, peak_gpu_memory = accelerator_memory()
        with self._one_at_a_time:
            now, worked = time.monotonic(), time.process_time()
            sample = Sample(
                seconds=now - self._started,
                cores=(worked - self._worked) / max(now - self._looked, 1e-9),
                memory=self._process.memory_info().rss,
                gpu_memory=gpu_memory,
            )
            self._looked, self._worked = now, worked
            self.history.append(sample)
            self.peak_memory = max(self.peak_memory, sample.memory)
            self.peak_gpu_memory = max(self.peak_gpu_memory, peak_gpu_memory)
        return sample

    @contextmanager
    def watching(self, every: float = 1.0) -> Iterator[ResourceMonitor]:
        """Take a sample every so many seconds inside this block: what rises and falls between two looks is seen too."""
        self.start(every)
        try:
            yield self
        finally:
            self.stop()

    def start(self, every: float = 1.0) -> None:
        """Take a sample every so many seconds, in a thread of its own, until `stop`."""
        self.stop()
        stopped = Event()

        def watch() -> None:
            while not stopped.wait(every):
                self.sample()

        thread = Thread(target=watch, name="apt-resource-monitor", daemon=True)
        self._watch = thread, stopped
        self.sample()
        thread.start()

    def stop(self) -> None:
        """Take a last sample; nothing happens where none are being taken."""
        if self._watch is None:
            return
        thread, stopped = self._watch
        self._watch = None
        stopped.set()
        thread.join()
        self.sample()
