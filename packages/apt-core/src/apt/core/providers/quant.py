"""Quant: keeps a model's weights in fewer bits, and may train them to be kept so."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from apt.core.errors import ProviderError
from apt.core.registry import Provider

if TYPE_CHECKING:
    from torch import nn


class QuantProvider(Provider):
    """A scheme of quantisation. `model.quant_name` names the one that a run's weights are kept in: the run is opened by
    building its model, quantising it, and loading the weights then.

    A provider may also train for its scheme (quantisation-aware training), where `model.qat_name` names it: it prepares
    the model, is then in use for the length of the run, and hears its hooks.
    """

    @abstractmethod
    def quantize(self, model: nn.Module) -> nn.Module:
        """The model with its weights quantised, in place where the scheme allows it; what it cannot quantise is left
        as it is.

        The state dict of the result holds plain tensors alone, of which safetensors can hold the dtypes; their names,
        shapes and dtypes follow from the model's structure and the provider's section, whatever the weights are.
        What was left has its name and dtype still.

        Args:
            model: on any device; a backbone, or any other module.

        Raises:
            ConfigError: the section does not fit the model; the message names what does.
        """

    def prepare(self, model: nn.Module) -> None:
        """Make the model one that can be trained for the scheme, in place, before its optimizer is built. Parameters
        and state dict stay what they are: such a run is opened without the scheme.

        Raises:
            ProviderError: it cannot be trained for; what is not overridden says so.
            ConfigError: as `quantize`.
        """
        raise ProviderError(f"quant:{self.get_name()} cannot be trained for", hint="leave model.qat_name out")


__all__ = ["QuantProvider"]
