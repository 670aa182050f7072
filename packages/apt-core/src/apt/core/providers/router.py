"""Router: turns a dense FFN into a mixture of experts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from apt.core.registry import Provider

if TYPE_CHECKING:
    from torch import nn


class RouterProvider(Provider):
    """Wraps FFN layers."""

    @abstractmethod
    def wrap_ffn(self, base_ffn: nn.Module, config: Mapping[str, Any]) -> nn.Module:
        """Build a mixture of experts from a dense layer.

        Args:
            base_ffn: any module with a `d_model`, mapping [B, T, D] to [B, T, D].
            config: the router's section of the profile.

        Returns:
            A module whose forward returns `(output [B, T, D], aux_loss)`, aux_loss 0-d, its weight applied.
        """


__all__ = ["RouterProvider"]
