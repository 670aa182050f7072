"""How much memory a run takes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at the process."""

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

    def sample(self) -> Sample:
        """Look now."""
        import torch

        on_gpu = torch.cuda.is_available()
        sample = Sample(self._process.memory_info().rss, torch.cuda.memory_allocated() if on_gpu else 0)
        self.history.append(sample)
        self.peak_memory = max(self.peak_memory, sample.memory)
        self.peak_gpu_memory = max(self.peak_gpu_memory, torch.cuda.max_memory_allocated() if on_gpu else 0)
        return sample
