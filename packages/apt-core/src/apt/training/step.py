"""The maths of one optimizer step: forward, loss, backward, clip, update."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from apt.checkpoint.rng import torch_rng_kept
from apt.core.errors import AptError, TrainingError, in_a_line, is_out_of_memory
from apt.core.world import World
from apt.data.loader import NO_TARGET, Batch
from apt.modeling.layers.mode import evaluation_mode

ExtraLosses = Callable[[Batch, Tensor, Tensor, dict[str, Any]], Mapping[str, Tensor]]


@dataclass(slots=True)
class Loss:
    """The loss of one step; every tensor 0-d and detached."""

    total: Tensor
    """What was minimised: nats per token, extra losses included."""
    cross_entropy: Tensor
    """The cross-entropies of the micro-batches, added up: finite where they are."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """The extra losses by name; empty where there are none."""

    def __add__(self, other: Loss) -> Loss:
        parts = dict(self.parts)
        for name, part in other.parts.items():
            parts[name] = parts[name] + part if name in parts else part
        return Loss(self.total + other.total, self.cross_entropy + other.cross_entropy, parts)


def free_name(taken: Container[str], name: str) -> str:
    """`name`, or another one where core has an entry of its own under it: a plugin's must replace nothing."""
    return name if name not in taken else f"extra.{name}"


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean negative log-likelihood of the targets, nats per token, in fp32 whatever the logits are in."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=NO_TARGET)


class BatchLoss(nn.Module):
    """The loss of a micro-batch, as a module: all that uses parameters happens in its forward, the plugins' losses
    included, so that whoever reduces gradients over processes sees which of them take part.

    Args:
        model: the module, or what torch.compile makes of it.
        autocast: the precision to compute in.
        extra_losses: asked for losses to add before `backward`; None if nobody has any.
    """

    def __init__(
        self, model: Callable[..., Any], autocast: AbstractContextManager[Any], extra_losses: ExtraLosses | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.extra_losses = extra_losses

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What to minimise, 0-d, nats per token; what of it is cross-entropy; and what is not, by name. The last two
        are detached."""
        parts: dict[str, Tensor] = {}
        with self.autocast:
            output = self.model(batch.tokens, **batch.context)
            own = total = cross_entropy(output.logits, batch.targets)
            if output.aux_loss is not None:
                parts["aux_loss"] = output.aux_loss
            if self.extra_losses is not None:
                model_state = {
                    "tokens": batch.tokens,
                    "hidden": output.hidden,
                    "aux_loss": output.aux_loss,
                    "document_ids": batch.document_ids,
                }
                for name, part in self.extra_losses(batch, output.logits, batch.targets, model_state).items():
                    parts[free_name(parts, name)] = part
        for part in parts.values():
            total = total + part
        return total, own.detach(), {name: part.detach() for name, part in parts.items()}


def accumulate_gradients(batch_loss: nn.Module, micro_batches: Sequence[Batch], world: World | None = None) -> Loss:
    """Run every micro-batch forward and backward; the gradients add up to those of the mean loss over the whole step.

    Args:
        batch_loss: a `BatchLoss`, or one whose gradients DistributedDataParallel averages over the processes; that is
            then done once, while the last micro-batch runs backward.
        micro_batches: equal in rows, here and in every process.
        world: the processes, over which the loss that is returned is still to be averaged.
    """
    world = world or World()
    loss: Loss | None = None
    for batch, share in zip(micro_batches, _shares(micro_batches, world), strict=True):
        is_last = batch is micro_batches[-1]
        with nullcontext() if is_last else getattr(batch_loss, "no_sync", nullcontext)():
            total, own, parts = batch_loss(batch)
            if len(micro_batches) * world.size > 1:
                total = total * share
            total.backward()
        this = Loss(total.detach(), own, {name: part * share for name, part in parts.items()})
        loss = this if loss is None else loss + this
    assert loss is not None
    return loss


def _shares(micro_batches: Sequence[Batch], world: World) -> Sequence[float | Tensor]:
    """What each micro-batch counts for: its share of the tokens that an average process has to predict."""
    if micro_batches[0].source is None:  # blocks of text are full
        return [1.0 / len(micro_batches)] * len(micro_batches)
    counts = torch.stack([(batch.targets != NO_TARGET).sum() for batch in micro_batches])
    return (counts / world.mean(counts.sum())).unbind()


def clip_gradients(parameters: Sequence[nn.Parameter], norm: float) -> Tensor | None:
    """Scale the gradients so that all of them together have at most this norm; 0 leaves them as they are.

    Returns:
        The norm before, a 0-d tensor; None if it was not needed.
    """
    return of_all(torch.nn.utils.clip_grad_norm_(parameters, norm)) if norm else None


def update(optimizer: Optimizer, learning_rate: float) -> None:
    """Take one optimizer step, and clear the gradients.

    Args:
        learning_rate: for every group of the optimizer, times the group's own `lr_scale` if it has one.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def of_all(norm: Tensor) -> Tensor:
    """A norm of gradients, over all the shards of them."""
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def dry_run(model: nn.Module, batch: Batch, device: torch.device, autocast: AbstractContextManager[Any]) -> None:
    """One micro-batch forward and backward, so that what cannot work fails before the first step.

    It leaves no trace: the model is in evaluation mode, its gradients are dropped, the random state is put back.

    Args:
        model: not compiled, for its other mode would have it compiled twice.
        batch: the micro-batch.

    Raises:
        TrainingError: it fails; the message says with what. Memory that runs out is raised as it is.
    """
    try:
        with torch_rng_kept(), evaluation_mode(model):
            accumulate_gradients(BatchLoss(model, autocast), [batch.to(device)])
    except AptError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        raise TrainingError(
            f"the model cannot be trained: the first batch fails with {in_a_line(error)}",
            hint="--debug shows where",
        ) from error
    model.zero_grad(set_to_none=True)
