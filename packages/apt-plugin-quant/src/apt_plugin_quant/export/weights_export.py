"""The format `safetensors`: the weights alone, under the names of the model's state dict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from apt.api import LoadedRun

FILE = "model.safetensors"


def write(loaded: LoadedRun, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Write `model.safetensors`."""
    save_weights(loaded.model.state_dict(), folder / FILE, dtype)
    return {}


def save_weights(weights: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    """Write tensors, those of floating point in `dtype`, each in memory of its own."""
    plain = {
        name: tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
        for name, tensor in weights.items()
    }
    save_file(plain, path, metadata={"format": "pt"})
