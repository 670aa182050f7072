"""Which providers a profile comes to, told without reading its text or giving its model any memory."""

from __future__ import annotations

import warnings

import torch

from apt.core.config import RunConfig
from apt.core.device import pick_device
from apt.core.in_use import ProvidersInUse
from apt.core.registry import Registry
from apt.data.prepare import use_data_providers
from apt.modeling.backbones.backbone import Backbone
from apt.modeling.compose import ModelBuilder


def plan(
    config: RunConfig, registry: Registry, *, strict: bool = False
) -> tuple[ProvidersInUse, Backbone, ModelBuilder]:
    """Fill every slot of a run, as training would; the model that comes of it serves to look at its parameters' shapes.

    Args:
        config: the profile.
        registry: the run's view of the providers.
        strict: raise instead of falling back.

    Raises:
        ConfigError, ProviderError, ConflictError: what training would raise.
    """
    # What cannot be built without memory is built with it.
    for device in ("meta", "cpu"):
        in_use = ProvidersInUse(registry.view(), config.sections, strict=strict and device == "cpu")
        with warnings.catch_warnings(record=True) as told, torch.random.fork_rng(devices=[]):
            warnings.simplefilter("always")
            use_data_providers(config, in_use)
            builder = ModelBuilder(config, in_use, device=pick_device(config.hardware.device), trains=True)
            with torch.device(device):
                model = builder.build_model(vocab_size=config.model.vocab_size or 1)
            use_side_providers(config, in_use, model)
        fallbacks = any(slot.is_fallback for slot in in_use.slots.values())
        if not (fallbacks if strict else in_use.incomplete):
            break
    for warning in told:
        warnings.warn(warning.message, stacklevel=2)
    return in_use, model, builder


def use_side_providers(config: RunConfig, in_use: ProvidersInUse, model: Backbone) -> None:
    """Fill the slots beside data and model: the alignment, the voter, the trackers, and the scheme that the weights are
    trained for, which prepares the model.

    Raises:
        ConflictError: providers in use exclude or lack each other.
    """
    if config.model.align_name:
        in_use.use("align", config.model.align_name, lambda provider: provider, optional=True)
    if config.model.voter_name:
        in_use.use("voter", config.model.voter_name, lambda provider: provider, optional=True)
    if config.model.qat_name:
        in_use.use("quant", config.model.qat_name, lambda scheme: scheme.prepare(model), optional=True)
    for name in config.training.trackers:
        in_use.use("tracker", name, lambda provider: provider, optional=True)
    in_use.check_conflicts()
