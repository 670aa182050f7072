"""The hardware check of 1.x: its answers, from what the kernel knows."""

from __future__ import annotations

import logging
import platform
import shutil
from typing import Any

import torch

from apt.core.device import Need, describe_hardware, estimate_memory, memory_of, pick_device
from apt.core.errors import ConfigError
from apt.core.logging import get_logger
from apt.modeling.compose import ModelBuilder
from apt_model.config._options import APTConfig

GB = 2**30


def get_hardware_profile() -> dict[str, Any]:
    """What this machine has: {"cpu", "memory", "gpu", "disk", "system"}, sizes in GiB."""
    machine, disk = describe_hardware(), shutil.disk_usage(".")
    gpus = [
        {"index": index, "name": name, "total_memory": memory / GB} for index, (name, memory) in enumerate(machine.gpus)
    ]
    return {
        "cpu": {"name": machine.cpu, "threads": machine.cores, "architecture": platform.machine()},
        "memory": {"total_gb": machine.memory / GB, "available_gb": machine.free / GB},
        "gpu": {
            "available": bool(gpus),
            "count": len(gpus),
            "devices": gpus,
            "total_vram_gb": sum(memory for _, memory in machine.gpus) / GB,
        },
        "disk": {"total_gb": disk.total / GB, "available_gb": disk.free / GB},
        "system": {
            "os": platform.system(),
            "os_version": platform.version(),
            "python_version": platform.python_version(),
            "torch_version": torch.__version__,
            "cuda_version": torch.version.cuda if gpus else None,
        },
    }


def estimate_model_memory_requirements(model_config: Any, batch_size: int = 8) -> dict[str, float]:
    """What training the model of an APTConfig takes, in GiB, without activations: the only part that `batch_size` has a
    say in. In mixed precision it is the same, for the weights stay in float32.

    Raises:
        ConfigError: it is another config.
    """
    need = _need(model_config)
    training = need.memory / GB
    return {
        "total_params": need.parameters,
        "model_size_gb": need.weights / GB,
        "total_memory_gb_fp32": training,
        "total_memory_gb_fp16": training,
        "total_memory_gb_recommended": training,
    }


def check_hardware_compatibility(model_config: Any, logger: logging.Logger | None = None) -> bool:
    """Whether the model of an APTConfig can be trained on the device that a run would take, before any activation.

    Raises:
        ConfigError: it is another config.
    """
    device, need = pick_device(), _need(model_config)
    has = memory_of(device)
    fits = has is None or need.memory <= has
    said = f"training takes {need.memory / GB:.1f} GB before activations"
    there = "" if has is None else f", {device} has {has / GB:.1f} GB"
    (logger or get_logger()).log(logging.INFO if fits else logging.WARNING, "%s%s", said, there)
    return fits


def _need(model_config: Any) -> Need:
    if not isinstance(model_config, APTConfig):
        raise ConfigError(
            f"a {type(model_config).__name__} is no APTConfig",
            hint="give apt.core.device.estimate_memory the model itself",
        )
    with torch.device("meta"):
        return estimate_memory(ModelBuilder(model_config.to_profile()).build_model())
