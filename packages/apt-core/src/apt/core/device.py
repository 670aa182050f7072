"""Hardware: which device a run uses, what it can do, and what it holds. torch is imported on use."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import time
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
    """The device that `hardware.device` names; `auto` takes an accelerator where there is one: a GPU, or whatever else
    torch or a package for it knows to drive (`torch.accelerator`).

    Raises:
        DeviceError: it is not here.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(
            f"hardware.device: {name!r} is no device", hint="use auto, cpu, cuda, cuda:1 or mps"
        ) from error
    if device.type == "cpu":
        return device
    is_there = accelerator is not None and device.type == accelerator.type
    if not is_there or (device.index or 0) >= torch.accelerator.device_count():
        raise DeviceError(f"hardware.device: {name} is not available on this machine", hint="use auto or cpu")
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)  # kernels that look at no tensor run on the current one
    return device


def count_devices(kind: str) -> int:
    """How many devices of a kind, such as "cuda", this machine has."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.accelerator.device_count() if found is not None and found.type == kind else 0


def move(model: nn.Module, device: torch.device) -> None:
    """Put a model on a device, in place: its parameters stay the objects they are, with what modules say of them
    (`no_weight_decay`) and with those that share one."""
    import torch
    from torch import nn

    if device.type != torch._C._get_privateuse1_backend_name():
        model.to(device)
        return
    # From the CPU to a device that a package brings torch would make new parameters, and lose all that.
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device == device:
            continue
        moved = tensor.detach().to(device)
        if isinstance(tensor, nn.Parameter):
            moved = nn.Parameter(moved, tensor.requires_grad)
        moved.__dict__.update({**tensor.__dict__, **moved.__dict__})
        torch.utils.swap_tensors(tensor, moved)


def use_bf16(setting: str | bool, device: torch.device, d_model: int) -> bool:
    """Whether to train under bf16 autocast, given `training.mixed_precision`."""
    import torch

    if setting in (False, "off"):
        return False
    if setting in (True, "bf16"):
        return True
    if device.type == "cpu":
        return cpu_has_bf16() and d_model >= BF16_MIN_WIDTH
    is_supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return is_supported is not None and bool(is_supported())


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
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is not None:
        of_each = [_properties(torch.device(found.type, index)) for index in range(torch.accelerator.device_count())]
        gpus = [(properties.name, properties.total_memory) for properties in of_each if properties is not None]
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

    if device.type in ("cpu", "mps"):
        return min([int(psutil.virtual_memory().total), *_cgroup_limits()])
    properties = _properties(device)
    return int(properties.total_memory) if properties is not None else None


def free_memory() -> int:
    """Bytes of main memory that this process may still take, as far as that can be told."""
    import psutil
    import torch

    limit = memory_of(torch.device("cpu")) or 0
    return min(int(psutil.virtual_memory().available), limit - int(psutil.Process().memory_info().rss))


def release_memory() -> None:
    """Give back what is held for nobody: unreachable objects, and the blocks that torch keeps of the GPU's memory."""
    gc.collect()
    if (accelerator := accelerator_in_use()) is not None:
        accelerator.empty_cache()


def comes_to_an_end(device: torch.device, seconds: float) -> bool:
    """Whether a device does in so many seconds all that it has been given. What waits for another process's part may
    never end, and whoever asks for its result waits with it."""
    import torch

    if device.type == "cpu":
        return True
    done = torch.Event(device)
    done.record()
    expiry = time.monotonic() + seconds
    while not done.query():
        if time.monotonic() > expiry:
            return False
        time.sleep(0.01)
    return True


def accelerator_in_use() -> Any:
    """torch's module for the accelerator that this process uses, such as torch.cuda; None if it uses none. Asking
    neither imports torch nor starts CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_device_module"):  # torch is being imported
        return None
    device = torch.accelerator.current_accelerator()
    if device is None:
        return None
    module = torch.get_device_module(device)
    if hasattr(module, "is_initialized"):
        is_used = module.is_initialized()
    else:  # torch.mps does not tell; who uses it holds some of its memory
        is_used = torch.accelerator.is_available() and module.current_allocated_memory() > 0
    return module if is_used else None


def accelerator_memory() -> tuple[int, int]:
    """Bytes that torch holds of the accelerator's own memory, now and at most so far; 0 where there is none."""
    accelerator = accelerator_in_use()
    if accelerator is None or not hasattr(accelerator, "memory_allocated"):  # on MPS it is the machine's
        return 0, 0
    return accelerator.memory_allocated(), accelerator.max_memory_allocated()


def _properties(device: torch.device) -> Any:
    """The name and `total_memory` of an accelerator; None if torch's module for it does not tell."""
    import torch

    ask = getattr(torch.get_device_module(device), "get_device_properties", None)
    return ask(device) if ask is not None else None


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
