"""Whether a model fits into memory, told from its shapes alone: nothing of its size is allocated to find out."""

from __future__ import annotations

import warnings

import torch

from apt.core.config import RunConfig, TrainingConfig
from apt.core.device import Need, estimate_memory, memory_of
from apt.core.errors import DeviceError
from apt.core.in_use import ProvidersInUse
from apt.core.registry import Registry
from apt.core.world import World
from apt.modeling.compose import ModelBuilder
from apt.training.distributed import own_micro_batches
from apt.training.sharding import shards_of


def check_memory(
    config: RunConfig, registry: Registry, device: torch.device, vocab_size: int | None, world: World | None = None
) -> None:
    """Refuse a model that cannot be trained on `device`, before any of it is allocated.

    Args:
        registry: the run's view of the providers, which is left as it is.
        vocab_size: rows of the embedding; while they are not known, nothing is refused.
        world: the processes of the run: those of one machine share its memory.

    Raises:
        DeviceError: even without activations it does not fit.
    """
    world = world or World()
    has = memory_of(device)
    need = need_of(config, registry, vocab_size) if has is not None and vocab_size is not None else None
    if has is None or need is None:
        return
    shared = device.type in ("cpu", "mps")
    here = world.local_size if shared else 1
    of_each = need.memory / shards_of(config, world)
    if of_each * here <= has:
        return
    there = f"there are {has / 1e9:,.1f} GB here" if shared else f"{device} has {has / 1e9:,.1f} GB"
    several = f" in each of {world.local_size} processes" if world.size > 1 else ""
    needs = f"at least {of_each / 1e9:,.1f} GB{several}"
    smaller = config.smaller_profile
    raise DeviceError(
        f"a model of {_short(need.parameters)} parameters needs {needs} for weights, gradients and AdamW's moments, "
        f"before any activation, and {there}",
        hint=f"train {smaller} instead: apt train -p {smaller}"
        if smaller
        else "lower model.num_layers or model.d_model, or take a larger machine",
    )


def in_less_memory(training: TrainingConfig, world: World) -> str:
    """What to do where a run's memory has run out: the same rows in smaller micro-batches, as options of the command,
    if what a process computes at once can be halved."""
    micro_batches = world.size * own_micro_batches(training, world)
    rows = training.batch_size * training.gradient_accumulation // micro_batches
    if rows % 2:
        return "lower training.batch_size or model.max_seq_len"
    return (
        f"the same steps take less with --training.batch_size {rows // 2} "
        f"--training.gradient_accumulation {2 * micro_batches}"
    )


def need_of(config: RunConfig, registry: Registry, vocab_size: int) -> Need | None:
    """What the model of a profile needs; None if it cannot be told, as of layers that cannot be built without memory.

    The model is built on the meta device, with provider instances of its own and without a word: the real one warns,
    falls back and is refused where it is built.
    """
    in_use = ProvidersInUse(registry.view(), config.sections)
    # Layers that draw on the CPU whatever the device is shall not change what the real ones draw.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            model = ModelBuilder(config, in_use).build_model(vocab_size=vocab_size)
        except Exception:
            return None
    if in_use.incomplete:
        return None  # one that is here and fails on the meta device may well be built where there is memory
    return estimate_memory(model)


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
