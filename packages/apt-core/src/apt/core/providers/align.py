"""Align: a second loss that compares two states of one model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from apt.core.registry import Provider

if TYPE_CHECKING:
    from torch import Tensor


class AlignProvider(Provider):
    """Computes an alignment loss."""

    @abstractmethod
    def compute_align_loss(self, logits: Tensor, targets: Tensor, model_state: Mapping[str, Any]) -> Tensor:
        """The loss to add to the cross-entropy.

        Args:
            logits: [B, T, V], the model's predictions, with their graph.
            targets: int64 [B, T]; -100 where there is no target.
            model_state: what the step knows (the table in `apt.hookspecs`); the two states under "stable" and "align".

        Returns:
            A 0-d tensor, weights applied; zero where a state is missing.
        """

    def extra_losses(
        self, trainer: Any, batch: Any, logits: Tensor, targets: Tensor, model_state: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Joins the loss before `backward`: an alignment in use needs no hook of its own for that."""
        return {self.get_name(): self.compute_align_loss(logits, targets, model_state)}


__all__ = ["AlignProvider"]
