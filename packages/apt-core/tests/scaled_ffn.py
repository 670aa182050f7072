"""A feed-forward layer with a weight that is in no linear map: experts of it cannot be stacked, each is a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from apt.core.providers.ffn import FFNProvider


class ScaledFFN(nn.Module):
    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.w_in, self.w_out = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.scale = nn.Parameter(torch.ones(d_ff))

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.w_out(self.scale * self.w_in(x_BTD).relu())
        return out


class ScaledProvider(FFNProvider):
    def get_name(self) -> str:
        return "scaled"

    def get_version(self) -> str:
        return "1.0.0"

    def create_layer(self, d_model: int, d_ff: int, **config: Any) -> ScaledFFN:
        return ScaledFFN(d_model, d_ff)


def apt_register_providers(registry: Any) -> None:
    registry.register("ffn", "scaled", "scaled_ffn:ScaledProvider", version="1.0.0")
