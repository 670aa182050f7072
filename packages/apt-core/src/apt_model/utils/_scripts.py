"""The first lines of a script of 1.x."""

from __future__ import annotations

import random

import numpy as np
import torch

from apt.core.device import pick_device


def get_device(force_cpu: bool = False) -> torch.device:
    """A GPU where there is one and `force_cpu` does not rule it out."""
    return pick_device("cpu" if force_cpu else "auto")


def set_seed(seed: int = 42) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
