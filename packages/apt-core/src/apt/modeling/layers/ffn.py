"""Feed-forward layers: two matrices around a GELU, or three with a gated SiLU."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from apt.core.providers.ffn import FFNProvider
from apt.modeling.layers.config import FFNConfig
from apt.modeling.layers.counting import Part


class FeedForward(Part):
    """W_out GELU(W_in x), from [B, T, D] to [B, T, D] (Hendrycks and Gimpel, 2016, for the exact GELU)."""

    def __init__(
        self, d_model: int, d_ff: int, config: FFNConfig, *, dropout: float = 0.0, num_layers: int = 1
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.d_ff = d_ff
        self.num_layers = num_layers
        self.w_in = nn.Linear(d_model, d_ff, bias=config.bias)
        self.w_out = nn.Linear(d_ff, d_model, bias=config.bias)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights: std 0.02, the last matrix's less by sqrt(2 * num_layers), as in GPT-2."""
        _draw(self.w_out, self.num_layers, self.w_in)

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs per token; the same at every context of `length` tokens."""
        return 2 * (self.w_in.weight.numel() + self.w_out.weight.numel())

    def forward(self, x_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.dropout(self.w_out(F.gelu(self.w_in(x_BTD))))
        return out_BTD


class GatedFeedForward(Part):
    """W_down (SiLU(W_gate x) (.) W_up x), from [B, T, D] to [B, T, D] (Shazeer, "GLU Variants", 2020, equation 6).

    At the same `d_ff` it has half as many weights again as `FeedForward`.
    """

    def __init__(
        self, d_model: int, d_ff: int, config: FFNConfig, *, dropout: float = 0.0, num_layers: int = 1
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.d_ff = d_ff
        self.num_layers = num_layers
        self.w_gate = nn.Linear(d_model, d_ff, bias=config.bias)
        self.w_up = nn.Linear(d_model, d_ff, bias=config.bias)
        self.w_down = nn.Linear(d_ff, d_model, bias=config.bias)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights: std 0.02, the last matrix's less by sqrt(2 * num_layers), as in GPT-2."""
        _draw(self.w_down, self.num_layers, self.w_gate, self.w_up)

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs per token; the same at every context of `length` tokens."""
        return 2 * sum(w.weight.numel() for w in (self.w_gate, self.w_up, self.w_down))

    def forward(self, x_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.dropout(self.w_down(F.silu(self.w_gate(x_BTD)) * self.w_up(x_BTD)))
        return out_BTD


def _draw(last: nn.Linear, num_layers: int, *others: nn.Linear) -> None:
    for linear in (*others, last):
        nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * num_layers) if linear is last else 0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


class DefaultFFN(FFNProvider):
    """Two matrices around a GELU."""

    Config = FFNConfig

    def get_name(self) -> str:
        return "default"

    def get_version(self) -> str:
        return "1.0.0"

    def create_layer(
        self, d_model: int, d_ff: int, *, dropout: float = 0.0, num_layers: int = 1, **config: Any
    ) -> FeedForward:
        return FeedForward(d_model, d_ff, self.config, dropout=dropout, num_layers=num_layers)


class SwiGLU(FFNProvider):
    """Three matrices, one of them a gate through a SiLU."""

    Config = FFNConfig

    def get_name(self) -> str:
        return "swiglu"

    def get_version(self) -> str:
        return "1.0.0"

    def create_layer(
        self, d_model: int, d_ff: int, *, dropout: float = 0.0, num_layers: int = 1, **config: Any
    ) -> GatedFeedForward:
        return GatedFeedForward(d_model, d_ff, self.config, dropout=dropout, num_layers=num_layers)


__all__ = ["DefaultFFN", "FFNConfig", "FeedForward", "GatedFeedForward", "SwiGLU"]
