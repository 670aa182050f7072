"""A model in shards (torch's FSDP2): each process keeps a part of every parameter, of its gradient and of what the
optimizer keeps of it.

What a block needs is gathered from all processes while it computes, and let go of after it; its gradients are summed
into the shards as soon as they are complete. Embedding, final norm and projection, which begin and end a step, are
gathered once for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apt.core.config import RunConfig
from apt.core.device import move
from apt.core.errors import ConfigError
from apt.core.world import World
from apt.data.loader import Batch
from apt.modeling.backbones.gpt import TransformerBlock
from apt.training.step import BatchLoss

_WHOLE: WeakSet[nn.Module] = WeakSet()
"""Models that every process has all of, for the time being."""


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has been here."""
    return hasattr(model, "set_requires_gradient_sync")


def shards_of(config: RunConfig, world: World) -> int:
    """Among how many processes a profile has its weights shared out."""
    return world.size if config.hardware.parallel == "fsdp" else 1


def become_as_the_first(model: nn.Module) -> None:
    """Give a model that every process has all of the weights and buffers of process 0."""
    for tensor in filter(Tensor.numel, (*model.parameters(), *model.buffers())):
        tensor.data = tensor.data.contiguous()
        dist.broadcast(tensor.data.view(-1).view(torch.uint8), 0)  # gloo knows few dtypes


def shard(model: nn.Module, world: World, device: torch.device, *, bf16: bool) -> None:
    """Shard a model that every process has built, in place: the weights of process 0, on `device`.

    Args:
        bf16: gather weights and compute in bf16, the stream between the blocks included; what is kept, the sums of
            gradients and the optimizer's work stay in fp32.

    Raises:
        ConfigError: a parameter is one number alone.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise ConfigError(
                f"hardware.parallel: fsdp cannot shard {name}, which is one number",
                hint="make it a vector of length 1, or use hardware.parallel: ddp",
            )
    marks = {name: dict(parameter.__dict__) for name, parameter in model.named_parameters()}
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world.size,)),
        "mp_policy": half if bf16 else MixedPrecisionPolicy(),
    }
    become_as_the_first(model)
    for module in [module for module in model.modules() if isinstance(module, TransformerBlock)]:
        move(module, device)
        fully_shard(module, **options)
    move(model, device)
    fully_shard(model, **options)
    for name, parameter in model.named_parameters():
        parameter.__dict__.update(marks[name])  # what a module says of its parameters, such as no_weight_decay
    model.register_forward_hook(_let_go)


class ShardedLoss(nn.Module):
    """A `BatchLoss` whose backward leaves each process the mean of all gradients of its own shard."""

    def __init__(self, batch_loss: BatchLoss, model: nn.Module) -> None:
        super().__init__()
        self.batch_loss = batch_loss
        self.model: Any = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        result: tuple[Tensor, Tensor, dict[str, Tensor]] = self.batch_loss(batch)
        return result

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside this block gradients add up in each process, and go nowhere."""
        self._set_sync(False)
        try:
            yield
        finally:
            self._set_sync(True)

    def _set_sync(self, sync: bool) -> None:
        self.model.set_requires_gradient_sync(sync)
        self.model.set_is_last_backward(sync)


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """Inside this block each process has all weights, and computes without the others. No gradients."""
    if not is_sharded(model):
        yield
        return
    parts = [module for module in model.modules() if is_sharded(module)]
    model.set_reshard_after_forward(False)
    _WHOLE.add(model)
    try:
        for part in parts:
            part.unshard()
        yield
    finally:
        _WHOLE.discard(model)
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def _let_go(model: Any, *_: Any) -> None:
    """Where no backward follows, the root lets go of its weights too: they would be old after the next update."""
    if not torch.is_grad_enabled() and model not in _WHOLE:
        model.reshard()
