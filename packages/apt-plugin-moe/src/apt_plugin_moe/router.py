"""The provider `topk_moe`: wraps dense layers, and moves them along the run's schedule.

enable_moe_at_epoch, enable_moe_at_step   when the experts are switched on; without either, at once
moe_capacity                              the capacity, in place of the profile's
route_temp                                the temperature of the router's softmax; 1 without it
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from apt.api import AptWarning
from apt.core.providers.router import RouterProvider
from apt_plugin_moe.config import MoEConfig
from apt_plugin_moe.layer import MoEFFN
from apt_plugin_moe.load import add_up
from apt_plugin_moe.upcycling import draw_experts, upcycle


class MoERouter(RouterProvider):
    """Mixture of experts: each token visits its top-k of E copies of the FFN."""

    Config = MoEConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(_without_switch(config or {}))
        self.experts: int = self.config.experts
        self.top_k: int = self.config.top_k
        self.capacity: float | None = self.config.capacity
        self.balance_loss_weight: float = self.config.balance_loss
        self._layers: list[MoEFFN] = []

    def get_name(self) -> str:
        return "topk_moe"

    def get_version(self) -> str:
        return "1.0.0"

    def wrap_ffn(self, base_ffn: nn.Module, config: Mapping[str, Any] | None = None) -> MoEFFN:
        """A mixture of copies of `base_ffn`, active at once.

        Args:
            base_ffn: any module with a `d_model`, [B, T, D] to [B, T, D].
            config: options of `MoEConfig` over the provider's own.

        Raises:
            pydantic.ValidationError: an option does not fit.
        """
        own = self.config.model_dump()
        return MoEFFN(base_ffn, MoEConfig.model_validate({**own, **_without_switch(config or {})}))

    # The run

    def on_model_built(self, model: nn.Module, trainer: Any) -> None:
        """Find the layers, and gate them if the schedule says so."""
        self._layers = [module for module in model.modules() if isinstance(module, MoEFFN)]
        if trainer is None:
            return  # the run's checkpoint says whether they are on
        active = self._is_on(trainer, 0, 0)
        for layer in self._layers:
            if active:
                draw_experts(layer)
            if trainer.config.training.compile:
                layer.stay_uncompiled()
            layer.set_schedule(active=active, temperature=1.0, capacity=layer.config.capacity)

    def on_epoch_start(self, epoch: int, trainer: Any) -> None:
        """Move along the schedule, switch on if it is time, and say how things stand."""
        self._follow(epoch, trainer.step, trainer)
        if self._layers and self._layers[0].active:
            layer = self._layers[0]
            capacity = "none" if layer.capacity is None else f"{layer.capacity:.2f}"
            trainer.note(f"MoE capacity {capacity}, route temperature {layer.temperature:.2f} (epoch={epoch})")

    def on_step_start(self, step: int, trainer: Any) -> None:
        """Move along what goes by step."""
        self._follow(trainer.epoch, step, trainer)

    def on_step_end(self, step: int, trainer: Any) -> None:
        """Balance, and hand the load to the metrics as often as they are recorded."""
        if not self._layers or not self._layers[0].active:
            return
        world = trainer.world
        if self.config.bias_rate:
            add_up([layer.step_load for layer in self._layers], world.sum, world.size)
        for layer in self._layers:
            layer.balance()
        done = step + 1
        last = done % trainer.steps_per_epoch == 0 or done == trainer.total_steps
        if last or done % trainer.config.training.log_every == 0:
            add_up([layer.load for layer in self._layers], world.sum, world.size)
            trainer.extra_metrics |= self._metrics()

    def _follow(self, epoch: int, step: int, trainer: Any) -> None:
        schedule = trainer.schedule
        active = self._is_on(trainer, epoch, step)
        temperature = schedule.get_param("route_temp", epoch=epoch, step=step)
        capacity = self._capacity(schedule.get_param("moe_capacity", epoch=epoch, step=step))
        switched = False
        for layer in self._layers:
            if active and not layer.active:
                upcycle(layer, trainer.optimizer)
                switched = True
            layer.set_schedule(
                active=active or layer.active,
                temperature=1.0 if temperature is None else temperature,
                capacity=layer.config.capacity if capacity is None else capacity,
            )
        if switched:
            trainer.note(
                f"MoE is on (epoch={epoch}, step={step}): {self.experts} experts a layer, copies of the trained FFN, "
                f"top {self.top_k}"
            )

    def _capacity(self, scheduled: float | None) -> float | None:
        if scheduled is None or scheduled >= 1 or self.config.overflow == "drop":
            return scheduled
        warnings.warn(
            f"schedules.moe_capacity: {scheduled:g} leaves some tokens no expert, and is taken as 1; "
            "use 1 or more, or model.moe.overflow: drop",
            AptWarning,
            stacklevel=3,
        )
        return 1.0

    def _metrics(self) -> dict[str, float | Tensor]:
        """The load of each layer's busiest and idlest expert, as a multiple of the even share; what overflowed."""
        metrics: dict[str, float | Tensor] = {"moe_temperature": self._layers[0].temperature}
        if self._layers[0].capacity is not None:
            metrics["moe_capacity"] = self._layers[0].capacity
        for index, layer in enumerate(self._layers):
            load = layer.load
            if load:
                share_E = load.demand_E * (layer.config.experts / load.choices)
                metrics[f"moe.{index}.load_max"] = share_E.max()
                metrics[f"moe.{index}.load_min"] = share_E.min()
                metrics[f"moe.{index}.overflow"] = load.overflow
                metrics[f"moe.{index}.dropped"] = load.dropped
            load.clear()
        return metrics

    @staticmethod
    def _is_on(trainer: Any, epoch: int, step: int) -> bool:
        return bool(trainer.schedule.should_enable_plugin("moe", epoch, step))


def _without_switch(config: Any) -> Any:
    """The section without `enabled`, which is the model builder's to read."""
    return {k: v for k, v in config.items() if k != "enabled"} if isinstance(config, Mapping) else config
