"""The providers of kind `quant`: which maps of a model a scheme takes, and when training begins to prepare for it.

enable_qat_at_epoch, enable_qat_at_step   when the maps begin to compute as if quantised; without either, at once
"""

from __future__ import annotations

import fnmatch
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from apt.api import AptWarning, ConfigError
from apt.core.providers.quant import QuantProvider
from apt_plugin_quant.config import GroupSettings, Settings
from apt_plugin_quant.linear import FakeQuantizedLinear, QuantizedLinear
from apt_plugin_quant.schemes import Int4, Int8, Scheme

GROUP = 32
"""Weights that share a scale where the profile does not say."""
SMALLEST_GROUP = 8
"""A row without a divisor from this up to `GROUP` is one group: a scale for fewer weights costs more than it gains."""


class LinearScheme(QuantProvider):
    """Quantises the linear maps of a model, and may train them for it.

    The embedding, the projection to the vocabulary, whether tied to it or not, and a router's choice of experts are
    left as they are, and so is what is no linear map: norms, gains, the stacked weights of experts.
    """

    Config = Settings

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._layers: list[FakeQuantizedLinear] = []

    def get_version(self) -> str:
        return "1.0.0"

    @abstractmethod
    def schemes(self, linears: dict[str, nn.Linear]) -> dict[str, Scheme]:
        """How each of these maps is quantised, by name. Raises ConfigError if the section does not fit one."""

    def quantize(self, model: nn.Module) -> nn.Module:
        """See `QuantProvider`. In place; every map becomes a `QuantizedLinear`."""
        self._replace(model, QuantizedLinear)
        return model

    def prepare(self, model: nn.Module) -> None:
        """See `QuantProvider`. Every map becomes a `FakeQuantizedLinear`, not yet active."""
        self._layers = self._replace(model, FakeQuantizedLinear)

    # The run

    def on_epoch_start(self, epoch: int, trainer: Any) -> None:
        """Begin where the schedule says so; on entering an epoch again after a resume, stand as the last step did."""
        self._follow(epoch, max(trainer.step - 1, 0), trainer)

    def on_step_start(self, step: int, trainer: Any) -> None:
        """Begin where the schedule says so."""
        self._follow(trainer.epoch, step, trainer)

    def _follow(self, epoch: int, step: int, trainer: Any) -> None:
        active = trainer.schedule.should_enable_plugin("qat", epoch, step)
        if active == self._layers[0].active:
            return
        for layer in self._layers:
            layer.active = active
        if active:
            trainer.note(
                f"QAT is on (epoch={epoch}, step={trainer.step}): {len(self._layers)} linear maps compute as if "
                f"they were {self.get_name()}"
            )

    def _replace(self, model: nn.Module, make: Callable[[nn.Linear, Scheme], Any]) -> list[Any]:
        """Put `make(map, scheme)` in the place of each map; returns what was made."""
        linears = self._linears(model)
        if not linears:
            raise ConfigError(f"quant:{self.get_name()}: the model has no linear map to quantise")
        made = []
        for name, scheme in self.schemes(linears).items():
            parent, _, attribute = name.rpartition(".")
            made.append(make(linears[name], scheme).train(linears[name].training))
            setattr(model.get_submodule(parent), attribute, made[-1])
        return made

    def _linears(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The maps to quantise, by name."""
        found = {name: module for name, module in model.named_modules() if name and type(module) is nn.Linear}
        for pattern in self.config.keep:
            if not fnmatch.filter(found, pattern):
                warnings.warn(
                    f"model.{self.get_name()}.keep: {pattern!r} is the name of no linear map", AptWarning, stacklevel=2
                )
        kept = ("head", "router", "*.router", *self.config.keep)
        return {name: linear for name, linear in found.items() if not any(fnmatch.fnmatch(name, k) for k in kept)}


class Int8Weights(LinearScheme):
    """Weights in eight bits, a scale for each row; products in the inputs' own precision."""

    def get_name(self) -> str:
        return "int8"

    def schemes(self, linears: dict[str, nn.Linear]) -> dict[str, Scheme]:
        """One for all: a row of any length has its scale."""
        return {name: Int8() for name in linears}


class Int8Dynamic(LinearScheme):
    """Weights in eight bits, a scale for each row, and inputs too, a scale for each token; products of integers."""

    def get_name(self) -> str:
        return "int8_dynamic"

    def schemes(self, linears: dict[str, nn.Linear]) -> dict[str, Scheme]:
        """One for all."""
        return {name: Int8(dynamic=True) for name in linears}


class Int4Weights(LinearScheme):
    """Weights in four bits, a scale for each group of a row; products in the inputs' own precision."""

    Config = GroupSettings

    def get_name(self) -> str:
        return "int4"

    def schemes(self, linears: dict[str, nn.Linear]) -> dict[str, Scheme]:
        """One for each length of a row. Raises ConfigError if the profile's group size does not divide one."""
        wanted: int | None = self.config.group_size
        if wanted is None:
            return {name: Int4(group_within(linear.in_features)) for name, linear in linears.items()}
        misfits = [f"{name} ({linear.in_features})" for name, linear in linears.items() if linear.in_features % wanted]
        if misfits:
            more = f" and {len(misfits) - 1} more" if len(misfits) > 1 else ""
            fits = ", ".join(map(str, divisors(math.gcd(*(linear.in_features for linear in linears.values())))[1:]))
            raise ConfigError(
                f"model.int4.group_size: {wanted} does not divide the inputs of {misfits[0]}{more}",
                hint=f"group sizes that fit every layer: {fits}" if fits else "leave it out",
            )
        return {name: Int4(wanted) for name in linears}


def divisors(number: int) -> list[int]:
    """In ascending order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def group_within(inputs: int) -> int:
    """The group size of rows of `inputs` weights where the profile does not say; see `GroupSettings`."""
    fits: Iterable[int] = (d for d in divisors(inputs) if SMALLEST_GROUP <= d <= GROUP)
    return max(fits, default=inputs)


__all__ = ["Int4Weights", "Int8Dynamic", "Int8Weights", "LinearScheme"]
