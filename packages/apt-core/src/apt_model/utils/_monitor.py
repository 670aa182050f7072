"""The monitor of 1.x: its calls and its percentages, on the kernel's samples."""

from __future__ import annotations

import logging
import time
from typing import Any

from apt.core import monitor
from apt.core.device import describe_hardware
from apt.core.monitor import Sample


class ResourceMonitor(monitor.ResourceMonitor):
    """Looks at this process: percentages are shares of the cores and the memory that it may use.

    Args:
        logger: is told of a look, at most every `log_interval` seconds, and of the whole at the end.
        log_interval: seconds; while it runs it also looks by itself so often.
    """

    def __init__(self, logger: logging.Logger | None = None, log_interval: float = 10) -> None:
        super().__init__()
        self.logger, self.log_interval = logger, log_interval
        self.running = False
        self._machine = describe_hardware()
        self._logged = time.monotonic()

    def start(self, every: float | None = None) -> None:
        """Begin to look, `every` so many seconds; `log_interval` if left out."""
        super().start(self.log_interval if every is None else every)
        self.running, self._logged = True, time.monotonic()

    def stop(self) -> None:
        """Look for the last time, and say what it came to."""
        if not self.running:
            return super().stop()  # `start` begins with it
        self.running = False
        super().stop()
        lines = ["Resource usage:"]
        for name, shares in self.get_utilization_history().items():
            if shares:
                lines.append(f"- {name}: {sum(shares) / len(shares):.1f}% on average, {max(shares):.1f}% at most")
        text = "\n".join(lines)
        if self.logger is None:
            print(text)
        else:
            self.logger.info("%s", text)

    def check_resources(self, force_log: bool = False) -> dict[str, Any] | None:
        """Look now: {"cpu": percent, "memory": {"used_gb", "total_gb", "percent"}}, and with a GPU "gpu", a list with
        one such dict. None while it is not running."""
        if not self.running:
            return None
        sample = self.sample()
        stats: dict[str, Any] = {"cpu": self._cpu(sample), "memory": _used(sample.memory, self._machine.memory)}
        if self._machine.gpus:
            stats["gpu"] = [{"id": 0, **_used(sample.gpu_memory, self._machine.gpus[0][1])}]
        now = time.monotonic()
        if self.logger is not None and (force_log or now - self._logged >= self.log_interval):
            self._logged = now
            memory = stats["memory"]
            self.logger.info("CPU %.1f%%, memory %.2f of %.2f GB", stats["cpu"], memory["used_gb"], memory["total_gb"])
        return stats

    def get_peak_memory_usage(self) -> dict[str, float]:
        """{"cpu_memory_percent": ...}, with a GPU "gpu0_memory_percent"."""
        peaks = {"cpu_memory_percent": 100 * self.peak_memory / self._machine.memory}
        if self._machine.gpus:
            peaks["gpu0_memory_percent"] = 100 * self.peak_gpu_memory / self._machine.gpus[0][1]
        return peaks

    def get_utilization_history(self) -> dict[str, list[float]]:
        """{"cpu": percentages, "memory": percentages, "gpu": percentages} of the newest samples."""
        samples = list(self.history)
        gpu = self._machine.gpus[0][1] if self._machine.gpus else None
        return {
            "cpu": [self._cpu(sample) for sample in samples],
            "memory": [100 * sample.memory / self._machine.memory for sample in samples],
            "gpu": [100 * sample.gpu_memory / gpu for sample in samples] if gpu else [],
        }

    def _cpu(self, sample: Sample) -> float:
        return 100 * sample.cores / self._machine.cores


def create_resource_monitor(logger: logging.Logger | None = None, log_interval: float = 10) -> ResourceMonitor:
    """A monitor that has been started."""
    made = ResourceMonitor(logger, log_interval)
    made.start()
    return made


def _used(used: int, total: int) -> dict[str, float]:
    return {"used_gb": used / 2**30, "total_gb": total / 2**30, "percent": 100 * used / total}
