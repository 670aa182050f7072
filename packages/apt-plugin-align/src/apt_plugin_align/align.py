"""Bistate alignment: the model in training is held to what it has been on average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from apt.core.providers.align import AlignProvider
from apt_plugin_align.config import BistateConfig
from apt_plugin_align.losses import contrast, kl_divergence
from apt_plugin_align.stable import stable_output, update


class BistateAlign(AlignProvider):
    """Two states of one model: *stable*, an exponential moving average of its weights, and *aligned*, the weights in
    training. Adds alpha * KL(stable || aligned) over the predictions and beta * InfoNCE over the hidden states.

    The average runs from the first step on. The losses are on from the epoch or step that `enable_align_at_epoch` or
    `enable_align_at_step` names, else from the start; `align_weight`, if it is scheduled, multiplies them.
    """

    Config = BistateConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.alpha: float = self.config.alpha
        self.beta: float = self.config.beta
        self.tau_align: float = self.config.tau_align
        self.enabled = False
        """Whether the losses are on."""

    def get_name(self) -> str:
        return "bistate_default"

    def get_version(self) -> str:
        return "1.0.0"

    def on_step_start(self, step: int, trainer: Any) -> None:
        """Switches the losses on when the schedule says so."""
        was_enabled, self.enabled = self.enabled, trainer.schedule.should_enable_plugin("align", trainer.epoch, step)
        if self.enabled and not was_enabled:
            trainer.note(
                f"Alignment is on (epoch={trainer.epoch}, step={step}): "
                f"alpha {self.alpha:g}, beta {self.beta:g}, tau {self.tau_align:g}"
            )

    def on_step_end(self, step: int, trainer: Any) -> None:
        """Moves the stable state."""
        update(trainer.optimizer, step + 1, self.config.stable_lag)

    def extra_losses(
        self, trainer: Any, batch: Any, logits: Tensor, targets: Tensor, model_state: dict[str, Any]
    ) -> dict[str, Tensor]:
        """The terms of the loss, weights applied: "align_kl" and "align_infonce"; none while disabled.

        Adds the states to `model_state`: "stable" holds {"logits": [B, T, V], "hidden": [B, T, D]}, without a graph,
        and "align" {"hidden": [B, T, D]}.
        """
        if not self.enabled:
            return {}
        weight = trainer.schedule.get_param("align_weight", trainer.epoch, trainer.step)
        if weight == 0:
            return {}
        output = stable_output(trainer.model, trainer.optimizer, batch)
        model_state["stable"] = {"logits": output.logits, "hidden": output.hidden}
        model_state["align"] = {"hidden": model_state["hidden"]}
        terms = self._terms(logits, targets, model_state)
        return terms if weight is None else {name: weight * term for name, term in terms.items()}

    def compute_align_loss(self, logits: Tensor, targets: Tensor, model_state: Mapping[str, Any]) -> Tensor:
        """alpha * KL + beta * InfoNCE, 0-d; zero while disabled, and where "stable" or "align" is missing.

        Args:
            logits: [B, T, V], the model's, with their graph.
            targets: int64 [B, T]; positions of -100 take no part.
            model_state: the states as `extra_losses` adds them.
        """
        zero = logits.new_zeros(())
        if not self.enabled or model_state.get("stable") is None or model_state.get("align") is None:
            return zero
        return sum(self._terms(logits, targets, model_state).values(), zero)

    def _terms(self, logits: Tensor, targets: Tensor, model_state: Mapping[str, Any]) -> dict[str, Tensor]:
        stable, aligned = model_state["stable"], model_state["align"]
        terms: dict[str, Tensor] = {}
        if self.alpha:
            terms["align_kl"] = self.alpha * kl_divergence(logits, stable["logits"], targets)
        if self.beta:
            infonce = contrast(
                aligned["hidden"], stable["hidden"], targets, self.tau_align, self.config.contrast_tokens
            )
            terms["align_infonce"] = self.beta * infonce
        return terms
