"""FFN: what each position computes on its own."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from apt.core.registry import Provider

if TYPE_CHECKING:
    from torch import nn


class FFNProvider(Provider):
    """Builds feed-forward layers.

    A layer is a module whose `forward(x [B, T, D])` returns `[B, T, D]`, or `(output [B, T, D], aux_loss)` where
    `aux_loss` is a 0-d tensor that joins the loss, its weight already applied. It has the attribute `d_model`, and may
    have `flops_per_token(length) -> int` (forward), which else is estimated from its parameters.
    """

    @abstractmethod
    def create_layer(self, d_model: int, d_ff: int, *, dropout: float = 0.0, **config: Any) -> nn.Module:
        """Build one layer.

        Args:
            d_model: width D of the model.
            d_ff: width of the hidden layer.
            dropout: probability of dropping an output in training.
            **config: what the model around it knows: `num_layers` (for the scale of the initial weights).
        """


__all__ = ["FFNProvider"]
