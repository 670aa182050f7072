"""The states of the random number generators that a run draws from."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from apt.core.device import accelerator_in_use
from apt.core.errors import AptWarning


def rng_state() -> dict[str, Any]:
    """The states of torch's generators, of `random`, and of NumPy's legacy global generator, as a state that the codec
    can keep."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        **torch_rng_state(),
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),  # type: ignore[union-attr]
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every generator back to where `rng_state` found it.

    Warns (AptWarning) if the state is also that of an accelerator of another kind than this process uses: what was
    drawn there cannot be repeated.
    """
    set_torch_rng_state(state)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def torch_rng_state() -> dict[str, Any]:
    """The states of torch's generators alone: the CPU's, and that of the accelerator this process computes on."""
    accelerator, own = accelerator_in_use(), None
    if accelerator is not None:
        own = {"device": _kind(), "state": accelerator.get_rng_state()}
    return {"torch": torch.get_rng_state(), "accelerator": own}


def set_torch_rng_state(state: dict[str, Any]) -> None:
    """Put torch's generators back to where `torch_rng_state` found them; warns as `set_rng_state` does."""
    torch.set_rng_state(state["torch"])
    own = state["accelerator"] if "accelerator" in state else _of_cuda(state["cuda"])
    if own is None:
        return
    accelerator = accelerator_in_use()
    if accelerator is None or _kind() != own["device"]:
        warnings.warn(
            f"the checkpoint holds the random state of a device of kind {own['device']}, and this run uses none: what "
            "was drawn there cannot be repeated, and the run will not go on bit for bit",
            AptWarning,
            stacklevel=2,
        )
        return
    accelerator.set_rng_state(own["state"])


@contextmanager
def torch_rng_kept() -> Iterator[None]:
    """What is drawn from torch's generators inside this block is as if it had never been."""
    state = torch_rng_state()
    try:
        yield
    finally:
        set_torch_rng_state(state)


def _kind() -> str:
    device = torch.accelerator.current_accelerator()
    return device.type if device is not None else "cpu"


def _of_cuda(states: list[torch.Tensor]) -> dict[str, Any] | None:
    """What checkpoints before 2.0.0a7 kept: the state of every CUDA device of the machine."""
    own = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    return {"device": "cuda", "state": states[own]} if own < len(states) else None
