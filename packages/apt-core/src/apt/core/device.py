"""Hardware: which device a run uses, what it can do, and what it holds. torch is imported on use."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt.core.errors import DeviceError

if TYPE_CHECKING:
    import torch
    from torch import nn

BF16_MIN_WIDTH = 256
"""On CPUs bf16 autocast pays from this d_model on: below it the casts eat up what the products save
(benchmarks/bf16.py)."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What this machine has."""

    cpu: str
    cores: int
    """Cores that this process may use."""
    memory: int
    """Bytes of main memory that this process may use, at most."""
    free: int
    """Those that it may still take."""
    cpu_bf16: bool
    """Whether the CPU multiplies bf16 matrices in hardware."""
    gpus: tuple[tuple[str, int], ...]
    """(name, bytes of memory) of each."""


TENSORS_PER_WEIGHT = 4
"""A weight in training has a gradient and AdamW's two moments, each of its own size."""


@dataclass(frozen=True, slots=True)
class Need:
    """The memory that a model takes. Activations come on top."""

    parameters: int
    weights: int
    """Bytes of its weights and buffers."""
    memory: int
    """Bytes that training it takes: gradients and moments as well."""


def pick_device(name: str = "auto") -> torch.device:
    """The device that `hardware.device` names; `auto` takes a GPU where there is one.

    Raises:
        DeviceError: it is not here.
    """
    import torch

    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(
            f"hardware.device: {name!r} is no device", hint="use auto, cpu, cuda, cuda:1 or mps"
        ) from error
    here = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not here.get(device.type, False):
        raise DeviceError(f"hardware.device: {name} is not available on this machine", hint="use auto or cpu")
    return device


def use_bf16(setting: str | bool, device: torch.device, d_model: int) -> bool:
    """Whether to train under bf16 autocast, given `training.mixed_precision`."""
    import torch

    if setting in (False, "off"):
        return False
    if setting in (True, "bf16"):
        return True
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return device.type == "cpu" and cpu_has_bf16() and d_model >= BF16_MIN_WIDTH


def cpu_has_bf16() -> bool:
    """Whether the CPU has bf16 matrix instructions (AVX512-BF16 or AMX on x86)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = file.read().split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def describe_hardware() -> Hardware:
    """What this machine has, as far as this process may use it."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append((properties.name, properties.total_memory))
    memory = memory_of(torch.device("cpu")) or 0
    return Hardware(_cpu_name(), cores, memory, free_memory(), cpu_has_bf16(), tuple(gpus))


def estimate_memory(model: nn.Module) -> Need:
    """What a model needs, told from its shapes alone: one on the meta device, which takes no memory, will do."""
    weights = list(model.parameters())
    trained = sum(weight.nbytes for weight in weights if weight.requires_grad)
    held = sum(tensor.nbytes for tensor in (*weights, *model.buffers()))
    return Need(sum(weight.numel() for weight in weights), held, held + (TENSORS_PER_WEIGHT - 1) * trained)


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that a process may use on `device`, at most; None if that is not known.

    On the CPU the machine's, or the limit of the process's control group (a container's) where that is lower.
    """
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type in ("cpu", "mps"):
        return min([int(psutil.virtual_memory().total), *_cgroup_limits()])
    return None


def free_memory() -> int:
    """Bytes of main memory that this process may still take, as far as that can be told."""
    import psutil
    import torch

    limit = memory_of(torch.device("cpu")) or 0
    return min(int(psutil.virtual_memory().available), limit - int(psutil.Process().memory_info().rss))


def release_memory() -> None:
    """Give back what is held for nobody: unreachable objects, and the blocks that torch keeps of the GPU's memory."""
    gc.collect()
    if (cuda := cuda_in_use()) is not None:
        cuda.empty_cache()


def cuda_in_use() -> Any:
    """torch.cuda, if this process has used it, else None: asking neither imports torch nor starts CUDA."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)  # not there while torch is being imported
    return cuda if cuda is not None and cuda.is_initialized() else None


def _cgroup_limits(proc: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """The memory limits of the control groups that this process is in, the groups around them included."""
    try:
        lines = proc.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = mounted, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = mounted / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        # In a container the path may be the host's, of which only the group around it all is to be seen.
        for folder in (group, *group.parents[: len(group.parents) - len(root.parents)]):
            with suppress(OSError, ValueError):  # not there, or "max"
                limits.append(int((folder / name).read_text()))
    return limits


def tune_cpu_memory() -> None:
    """Have torch's large CPU tensors lie in huge pages, and glibc keep the pages that are freed.

    Training frees and takes the same large blocks over and over; faulting their pages in anew costs 5 to 10% of a step
    on CPUs, and pages of 2 MB instead of 4 KB bring another 2 to 3% where weights are large (benchmarks/moe.py). To be
    called before the first tensor is made: torch looks at its setting once. Does nothing but on Linux with glibc.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's own name for it
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
