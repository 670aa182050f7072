"""What torch knows of the accelerator of device.cpp: `torch.sim`, as torch.cuda is of NVIDIA's. torch finds it by its
entry point (`torch.backends`), as it does any accelerator that a package brings."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import Any


def register() -> None:
    """The entry point: torch calls it at the end of its own import."""
    import torch
    import torch.distributed as dist
    import torch_sim_native as native

    def index(device: Any = None) -> int:
        own = device if isinstance(device, int) else torch.device(device or "sim").index
        return native.current_device() if own is None else own

    def manual_seed_all(seed: int) -> None:
        for device in range(native.device_count()):
            native.default_generator(device).manual_seed(seed)

    @contextmanager
    def stream(_: object) -> Iterator[None]:
        yield

    def transport(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        return native.staged(dist.ProcessGroupGloo(store, rank, size, timeout))

    torch.utils.rename_privateuse1_backend("sim")
    module = ModuleType("torch.sim")
    vars(module).update(
        is_available=lambda: native.device_count() > 0,
        is_initialized=native.is_used,
        _is_in_bad_fork=lambda: False,
        device_count=native.device_count,
        current_device=native.current_device,
        set_device=lambda device: native.set_device(index(device)),
        get_device_properties=lambda _: SimpleNamespace(name="simulated", total_memory=native.memory()),
        get_rng_state=lambda device=None: native.default_generator(index(device)).get_state(),
        set_rng_state=lambda state, device=None: native.default_generator(index(device)).set_state(state),
        manual_seed_all=manual_seed_all,
        memory_allocated=torch.accelerator.memory_allocated,
        max_memory_allocated=torch.accelerator.max_memory_allocated,
        empty_cache=lambda: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16],
        is_bf16_supported=lambda: True,
        Stream=lambda priority=0: torch.Stream("sim", priority=priority),
        Event=lambda: torch.Event("sim"),
        current_stream=lambda: torch.accelerator.current_stream(),
        stream=stream,
    )
    torch._register_device_module("sim", module)
    sys.modules["torch.sim"] = module
    dist.Backend.register_backend("staged", transport, devices=["sim"])
