"""The states of the random number generators that a run draws from."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import torch

from apt.core.errors import AptWarning


def rng_state() -> dict[str, Any]:
    """The states of torch's generators (CPU, and every CUDA device if CUDA is in use), of `random`, and of NumPy's
    legacy global generator, as a state that the codec can keep."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        # Asking for the devices' states would otherwise start CUDA in a run that does not use it.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),  # type: ignore[union-attr]
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every generator back to where `rng_state` found it.

    Warns (AptWarning) if the state knows CUDA devices that this machine has not: their draws cannot be repeated.
    """
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    devices = torch.cuda.device_count()
    if len(state["cuda"]) > devices:
        warnings.warn(
            f"the checkpoint holds the random states of {len(state['cuda'])} CUDA devices and this machine has "
            f"{devices}: what was drawn on the others cannot be repeated, and the run will not go on bit for bit",
            AptWarning,
            stacklevel=2,
        )
    for device, device_state in enumerate(state["cuda"][:devices]):
        torch.cuda.set_rng_state(device_state, device)
