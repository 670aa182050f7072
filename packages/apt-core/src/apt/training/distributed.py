"""One run in several processes: each computes the gradients of its share of every batch, and all take the same step.

A step trains on the same rows whatever the number of processes is. The first process has the first rows, and so on; as
many of the step's micro-batches as can be are dealt out whole, and only what is left over is split.
"""

from __future__ import annotations

import inspect
import math
import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apt.core.config import TrainingConfig
from apt.core.device import count_devices, pick_device
from apt.core.errors import ConfigError, DeviceError
from apt.core.world import World
from apt.training.sharding import ShardedLoss, become_as_the_first, is_sharded
from apt.training.step import BatchLoss


def own_device(name: str, world: World) -> torch.device:
    """The device of this process, as `hardware.device` says: of several GPUs, or other accelerators, each process of a
    machine has its own.

    Raises:
        DeviceError: it is not here, or cannot be shared.
    """
    if world.size == 1:
        return pick_device(name)
    device = pick_device(name)
    has = count_devices(device.type)
    if name == "auto" and (device.type == "mps" or has < world.local_size):
        return torch.device("cpu")
    if device.type == "cpu":
        return device
    if device.type == "mps" or device.index is not None:
        raise DeviceError(
            f"hardware.device: {name} is one device, and there are {world.size} processes", hint="use cuda or cpu"
        )
    if has < world.local_size:
        raise DeviceError(
            f"{world.local_size} processes on this machine need a GPU each, and it has {has}",
            hint=f"start {has}, or set hardware.device: cpu",
        )
    return pick_device(f"{device.type}:{world.local_rank}")


def own_micro_batches(training: TrainingConfig, world: World) -> int:
    """How many micro-batches this process makes of its share of a step.

    Raises:
        ConfigError: the step's rows do not make equal shares.
    """
    dealt = math.gcd(training.gradient_accumulation, world.size)
    sharing = world.size // dealt
    if training.batch_size % sharing:
        rows = training.batch_size * training.gradient_accumulation
        fits = [n for n in range(1, rows + 1) if _fits(training, n)]
        raise ConfigError(
            f"a step of training.batch_size {training.batch_size} x training.gradient_accumulation "
            f"{training.gradient_accumulation} cannot be dealt out evenly to {world.size} processes",
            hint=f"use {', '.join(map(str, fits))} processes, or another batch size",
        )
    return training.gradient_accumulation // dealt


def _fits(training: TrainingConfig, processes: int) -> bool:
    return training.batch_size % (processes // math.gcd(training.gradient_accumulation, processes)) == 0


def share_cores(world: World) -> None:
    """Give each process of this machine as many threads as there are cores for it, unless OMP_NUM_THREADS says how
    many."""
    if world.size > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // world.local_size))


def seed_all(seed: int) -> None:
    """Begin all the generators that a plugin may draw from anew: torch's, Python's and NumPy's."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def own_numbers(world: World, seed: int, step: int) -> None:
    """Let every process draw numbers of its own in a step: process 0 goes on as it would alone, the others begin anew,
    so that their generators are no part of a checkpoint."""
    if not world.is_first:
        seed_all(int(np.random.SeedSequence((seed, step, world.rank)).generate_state(1)[0]))


def reduced(batch_loss: BatchLoss, model: nn.Module, world: World) -> nn.Module:
    """`batch_loss`, so that its backward averages the gradients over all processes: those of a `model` in shards into
    each process's own, else all of them in every process (DistributedDataParallel).

    Under the latter every process begins with the weights and buffers of process 0. Parameters that take no part in a
    step, as of experts that are not switched on yet, keep no gradient, as they do in one process.
    """
    if world.size == 1:
        return batch_loss
    if is_sharded(model):
        return ShardedLoss(batch_loss, model)
    become_as_the_first(model)
    # torch 2.13 gave it another name. What buffers hold, the processes compute alike.
    known = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {sync_buffers: False, "init_sync": False}
    return DistributedDataParallel(batch_loss, gradient_as_bucket_view=True, find_unused_parameters=True, **options)


def mean_of(world: World, facts: Mapping[str, float]) -> dict[str, float]:
    """The mean of each number over the processes that have it."""
    if world.size == 1:
        return dict(facts)
    everyones = world.gather(facts)
    names = dict.fromkeys(name for own in everyones for name in own)
    return {name: _mean([own[name] for own in everyones if name in own]) for name in names}


def _mean(numbers: list[float]) -> float:
    # What is the same everywhere stays what it is, to the last bit.
    return numbers[0] if len(set(numbers)) == 1 else math.fsum(numbers) / len(numbers)
