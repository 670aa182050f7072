"""Opens a run for use: its model with trained weights, its tokenizer, its plugins."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apt.checkpoint.lock import (
    MODEL_KINDS,
    check_lock,
    read_lock,
    recorded_layouts,
    recorded_plugins,
    requirements_of,
)
from apt.checkpoint.store import CheckpointStore
from apt.core.config import RunConfig
from apt.core.device import move, pick_device
from apt.core.discovery import choose, discover
from apt.core.errors import AptWarning, CheckpointError, ProviderError, misfit
from apt.core.hooks import USE, Hooks
from apt.core.in_use import ProvidersInUse
from apt.core.profiles import check_sections, resolve
from apt.core.providers.tokenizer import Tokenizer
from apt.core.runs import RunFolder
from apt.data.prepare import load_saved_tokenizer
from apt.modeling.backbones.backbone import Backbone
from apt.modeling.compose import ModelBuilder


@dataclass(slots=True)
class LoadedRun:
    """A run that is ready for use; the model is in evaluation mode."""

    config: RunConfig
    model: Backbone
    tokenizer: Tokenizer
    device: torch.device
    hooks: Hooks
    in_use: ProvidersInUse
    step: int
    """The optimizer steps that the checkpoint's weights have behind them."""


def load_run(
    run: RunFolder,
    *,
    device: str = "auto",
    checkpoint: str | int | None = None,
    state: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    plugins: Iterable[str] | None = None,
    no_plugin: Iterable[str] = (),
    no_plugins: bool = False,
    strict: bool = False,
) -> LoadedRun:
    """Build a run's model and load its weights.

    Args:
        run: the run's folder.
        device: as `hardware.device`.
        checkpoint: "last", "best" or a step; None for the last one.
        state: an average of the weights to use in their place, such as "stable"; what has none keeps its weight.
        overrides: {dotted key: value} over the run's own profile, such as {"model.attention_name": "mha"}.
        plugins, no_plugin, no_plugins, strict: as the command line's options of those names.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged or holds no such state, or a provider that made it
            is not here.
        ConfigError: `overrides` do not fit.
        ProviderNotFoundError: the scheme that its weights are kept in is not installed.
    """
    profile = resolve(run.profile, overrides)
    config = profile.config
    lock, target = read_lock(run.lock), pick_device(device)
    selection = choose(
        plugins=plugins,
        no_plugin=no_plugin,
        no_plugins=no_plugins,
        profile=config.plugins,
        recorded=recorded_plugins(lock),
    )
    found = discover(selection, strict=strict)
    registry = found.registry_of_a_run()
    registry.recorded = requirements_of(lock)
    if overrides:  # what the run was made with was checked then
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AptWarning)  # it may hold sections that only training reads
            check_sections(config, registry, profile.origins, found.absent)
    in_use = ProvidersInUse(registry, config.sections, strict=strict, layouts=recorded_layouts(lock))
    tokenizer = load_saved_tokenizer(config, in_use, run.tokenizer)
    # The weights drawn here are overwritten; whoever else draws from the global generator shall not notice.
    with torch.random.fork_rng(devices=[]):
        builder = ModelBuilder(config, in_use, device=target)
        model = builder.build_model(vocab_size=config.model.vocab_size or tokenizer.vocab_size)
    hooks = Hooks("stop" if strict else config.on_plugin_error)
    for plugin in found.listeners(USE):
        hooks.add(plugin.module, plugin.name)
    hooks.add_providers(in_use.providers)
    hooks.call("on_model_built", model=model, trainer=None)
    kinds = MODEL_KINDS
    if config.model.quant_name:
        model, kinds = _quantised(model, config.model.quant_name, in_use), kinds | {"quant"}
    check_lock(lock, in_use.slots.values(), kinds)
    store = CheckpointStore(run.checkpoints)
    chosen = _step(store, checkpoint)
    average: dict[str, Tensor] = {}
    if state is None:
        step, weights = store.load_weights(chosen)
    else:
        step, weights, average = store.load_average(state, chosen)
    if strict and chosen is None and step != store.latest():
        raise CheckpointError(
            f"the newest checkpoint of {run.path}, of step {store.latest()}, is damaged",
            hint=f"use the one before it: --checkpoint {step}",
        )
    try:
        model.load_state_dict(weights)
        # Over the weights, and not merged into them: a tensor with two names in the model has one in the average.
        model.load_state_dict(average, strict=False)
    except RuntimeError as error:
        changed = [key for key in overrides or () if key.startswith("model.")]
        raise CheckpointError(
            f"the checkpoint of step {step} does not fit the model of {run.path}: {misfit(error)}",
            hint=f"leave --{', --'.join(changed)} out"
            if changed
            else "use the plugins and versions that the run was trained with: see its plugins.lock.json",
        ) from error
    move(model, target)
    return LoadedRun(config, model.eval(), tokenizer, target, hooks, in_use, step)


def _quantised(model: Backbone, scheme: str, in_use: ProvidersInUse) -> Backbone:
    """The model in the form that the weights of a run of that scheme fit."""
    quantised: Any = in_use.use("quant", scheme, lambda provider: provider.quantize(model))
    if not isinstance(quantised, type(model)):
        raise ProviderError(f"quant:{scheme} made {type(quantised).__name__} of {type(model).__name__}")
    return quantised


def _step(store: CheckpointStore, checkpoint: str | int | None) -> int | None:
    """The step that "last", "best" or a number means; None for the newest that is whole."""
    if checkpoint == "best":
        if (best := store.best()) is None:
            raise CheckpointError("no checkpoint of this run has a validation loss", hint="use last, or a step")
        return best
    if checkpoint in (None, "last"):
        return None
    try:
        return int(str(checkpoint).removeprefix("step-"))
    except ValueError:
        raise CheckpointError(f"there is no checkpoint {checkpoint!r}", hint="use last, best or a step") from None
