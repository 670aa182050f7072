"""Quant: stores or computes a model's weights in fewer bits."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from apt.core.registry import Provider

if TYPE_CHECKING:
    from torch import nn


class QuantProvider(Provider):
    """Quantises models."""

    @abstractmethod
    def quantize(self, model: nn.Module) -> nn.Module:
        """The model with its weights quantised, in place where the scheme allows it."""


__all__ = ["QuantProvider"]
