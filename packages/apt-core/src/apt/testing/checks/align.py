"""Align: a loss beside the cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apt.testing.check import check
from apt.testing.compare import require, require_equal, require_finite
from apt.testing.subjects import Subject, probe, skip

B, T, V, D = 2, 6, 11, 16
NO_TARGET = -100


class Batch:
    """What a loss is given: predictions, targets, and the two states of the model.

    Args:
        seed: of the random content.
        copies: how often the rows are repeated.
        dtype: of predictions and states.
    """

    def __init__(self, seed: int = 0, copies: int = 1, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(B, T, *shape, generator=generator).repeat(copies, 1, 1).to(dtype)

        self.logits, self.hidden, stable_logits, stable_hidden = draw(V), draw(D), draw(V), draw(D)
        self.targets = torch.randint(V, (B, T), generator=generator).repeat(copies, 1)
        self.stable = {"logits": stable_logits, "hidden": stable_hidden}

    def with_graph(self) -> Batch:
        """Itself, with gradients for predictions and hidden states."""
        self.logits.requires_grad_()
        self.hidden.requires_grad_()
        return self

    def state(self) -> dict[str, Any]:
        """`model_state`, as a run gives it."""
        return {
            "tokens": self.targets.clamp_min(0),
            "hidden": self.hidden,
            "aux_loss": None,
            "document_ids": None,
            "stable": self.stable,
            "align": {"hidden": self.hidden},
        }


def switched_on(subject: Subject) -> Any:
    """A provider that has been told of a run's first step, whose schedule switches it on."""
    from types import SimpleNamespace

    from apt.core.hooks import Hooks, has_hooks
    from apt.core.schedules import Schedule

    provider = subject.provider()
    if has_hooks(provider) and hasattr(provider, "on_step_start"):
        hooks = Hooks()
        hooks.add(provider)
        schedule = Schedule({"training": {"max_epochs": 1, "max_steps": 10}})
        trainer = SimpleNamespace(epoch=0, step=0, schedule=schedule, note=lambda text: None, extra_metrics={})
        hooks.manager.hook.on_step_start(step=0, batch=None, trainer=trainer)
    return provider


def loss_of(provider: Any, batch: Batch, **state: Any) -> Tensor:
    """The provider's loss for a batch; `state` replaces parts of the model_state."""
    loss: Tensor = provider.compute_align_loss(batch.logits, batch.targets, {**batch.state(), **state})
    return loss


@check("align")
def the_loss_is_a_finite_number(subject: Subject) -> None:
    """The loss is a 0-d floating tensor and finite: it is added to the cross-entropy as it is."""
    loss = loss_of(switched_on(subject), Batch().with_graph())
    require(isinstance(loss, Tensor), f"compute_align_loss returns {type(loss).__name__}, not a tensor")
    require(loss.dim() == 0, f"the loss has the shape {list(loss.shape)}, and must be 0-d: take its mean")
    require(loss.is_floating_point(), f"the loss is of {loss.dtype}")
    require_finite(loss, "the loss", "look for logarithms and divisions")


@check("align")
def the_model_learns_from_it(subject: Subject) -> None:
    """The loss has a gradient for the predictions or the hidden states, and a finite one: without it, it only costs
    time."""
    batch = Batch().with_graph()
    loss = loss_of(switched_on(subject), batch)
    require(loss.requires_grad, "the loss has no graph: look for detach, .item() and torch.no_grad")
    loss.backward()
    grads = [x.grad for x in (batch.logits, batch.hidden) if x.grad is not None]
    require(any(bool(grad.any()) for grad in grads), "the loss gives logits and hidden states no gradient")
    for grad in grads:
        require_finite(grad, "the gradient of the loss", "look for norms and logarithms at zero")


@check("align")
def the_gradient_is_that_of_the_loss(subject: Subject) -> None:
    """Along a random direction the loss changes as its gradient says: a part of it that is detached by accident, or
    scaled in one pass alone, trains towards something else."""
    provider = switched_on(subject)
    for what in ("logits", "hidden"):
        batch = Batch().with_graph()
        loss = loss_of(provider, batch)
        (grad,) = torch.autograd.grad(loss, getattr(batch, what), allow_unused=True)
        direction = probe(getattr(batch, what))
        values = []
        for sign in (1, -1):
            moved = Batch()
            setattr(moved, what, getattr(moved, what) + sign * 1e-2 * direction)
            values.append(float(loss_of(provider, moved)))
        numeric = (values[0] - values[1]) / 2e-2
        analytic = 0.0 if grad is None else float((grad * direction).sum())
        require(
            abs(analytic - numeric) <= 0.02 * abs(numeric) + 2e-3 * max(1.0, abs(float(loss.detach()))),
            f"along a random direction of {what} the gradient says {analytic:.4g}, finite differences {numeric:.4g}: "
            "look for detach, no_grad, and weights applied in one place alone",
        )


@check("align")
def positions_without_a_target_take_no_part(subject: Subject) -> None:
    """Predictions where the target is -100 do not move the loss: padding would be trained on otherwise."""
    provider, batch, other = switched_on(subject), Batch(), Batch()
    without = torch.zeros(B, T, dtype=torch.bool)
    without[0, -2:] = without[1, 2] = True
    for b in (batch, other):
        b.targets = b.targets.masked_fill(without, NO_TARGET)
    noise = torch.where(without[..., None], 3 * torch.randn(B, T, 1, generator=torch.Generator().manual_seed(1)), 0)
    other.logits = other.logits + noise * probe(other.logits)
    require_equal(
        loss_of(provider, other),
        loss_of(provider, batch),
        "with other predictions where the target is -100, the loss",
        "leave those positions out of sums and of counts",
    )


@check("align")
def a_batch_without_targets_is_finite(subject: Subject) -> None:
    """Where no position has a target the loss is finite and so is its gradient: a mean over nothing is NaN, and ends
    the run."""
    batch = Batch().with_graph()
    batch.targets = torch.full_like(batch.targets, NO_TARGET)
    loss = loss_of(switched_on(subject), batch)
    advice = "divide by the number of targets, but never by 0: .clamp(min=1)"
    require_finite(loss, "without any target, the loss", advice)
    if loss.requires_grad:
        loss.backward()
        for grad in (batch.logits.grad, batch.hidden.grad):
            if grad is not None:
                require_finite(grad, "without any target, the gradient", advice)


@check("align")
def missing_states_do_no_harm(subject: Subject) -> None:
    """Without the states "stable" and "align" the loss is still a finite 0-d tensor: in a run's first steps, and beside
    other plugins, they may not be there."""
    provider = switched_on(subject)
    for missing in ({"stable": None, "align": None}, {"stable": None}, {"align": None}):
        loss = loss_of(provider, Batch(), **missing)
        require(isinstance(loss, Tensor) and loss.dim() == 0, f"without {sorted(missing)} it returns no 0-d tensor")
        require_finite(loss, f"without {sorted(missing)}, the loss", "return zero where a state is missing")
    batch = Batch()
    loss = provider.compute_align_loss(batch.logits, batch.targets, {"tokens": batch.targets, "hidden": batch.hidden})
    require_finite(loss, "with tokens and hidden states alone, the loss", "read states with .get()")


@check("align")
def the_loss_has_the_scale_of_a_mean(subject: Subject) -> None:
    """The same rows eight times over give about the same loss: it joins a mean per token, and a sum would grow with the
    batch size."""
    provider = switched_on(subject)
    once, often = (float(loss_of(provider, Batch(copies=copies))) for copies in (1, 8))
    require(
        abs(often) <= 3 * abs(once) + 1e-6,
        f"the loss is {once:.4g} for {B * T} tokens and {often:.4g} for the same eight times over: take a mean",
    )


@check("align")
def extreme_predictions_are_finite(subject: Subject) -> None:
    """Predictions of +-10,000 give a finite loss and gradient: exp overflows at 89, log_softmax never does."""
    for scale in (1e4, 0.0):
        batch = Batch()
        batch.logits, batch.hidden = batch.logits * scale, batch.hidden * scale
        batch.stable = {name: tensor * scale for name, tensor in batch.stable.items()}
        loss = loss_of(switched_on(subject), batch.with_graph())
        what = "predictions of 10,000" if scale else "predictions and hidden states of zero"
        require_finite(loss, f"for {what}, the loss", "use log_softmax, logsumexp and F.normalize")
        if loss.requires_grad:
            loss.backward()
            for grad in (batch.logits.grad, batch.hidden.grad):
                if grad is not None:
                    require_finite(grad, f"for {what}, the gradient", "use log_softmax, logsumexp and F.normalize")


@check("align")
def low_precision_is_enough(subject: Subject) -> None:
    """With predictions and states in bfloat16 the loss is near that in float32: in mixed precision they come so."""
    provider = switched_on(subject)
    exact, coarse = (float(loss_of(provider, Batch(dtype=dtype))) for dtype in (torch.float32, torch.bfloat16))
    require(
        abs(coarse - exact) <= 0.05 * abs(exact) + 1e-3,
        f"the loss is {exact:.4g} in float32 and {coarse:.4g} in bfloat16: compute in float32, with x.float()",
    )


@check("align")
def the_loss_is_deterministic(subject: Subject) -> None:
    """The same predictions give the same loss, and neither they nor the states are written to: other losses of the step
    read them too, and a run must be repeatable."""
    provider, batch = switched_on(subject), Batch()
    before = {name: tensor.clone() for name, tensor in _tensors_of(batch).items()}
    torch.manual_seed(1)
    first = loss_of(provider, batch)
    torch.manual_seed(1)
    again = loss_of(provider, batch)
    require(
        torch.equal(first, again), f"two calls give {float(first):.6g} and {float(again):.6g}: keep nothing between"
    )
    for name, tensor in _tensors_of(batch).items():
        require(torch.equal(tensor, before[name]), f"{name} is changed in place: work on a copy")


def _tensors_of(batch: Batch) -> dict[str, Tensor]:
    return {"logits": batch.logits, "hidden": batch.hidden, "targets": batch.targets, **batch.stable}


@check("align")
def the_loss_is_what_a_run_adds(subject: Subject) -> None:
    """What joins the run's loss is a mapping of names to 0-d tensors: `extra_losses` of the interface makes one of
    `compute_align_loss`."""
    provider = switched_on(subject)
    extra: Callable[..., Any] | None = getattr(provider, "extra_losses", None)
    if extra is None:
        require(False, "it has no extra_losses, so a run adds nothing: subclass AlignProvider")
    from apt.core.providers.align import AlignProvider

    if getattr(type(provider), "extra_losses", None) is not AlignProvider.extra_losses:
        skip("it has an extra_losses of its own, which needs a trainer")
    batch = Batch()
    found = provider.extra_losses(None, None, batch.logits, batch.targets, batch.state())
    require(
        isinstance(found, dict) and all(isinstance(v, Tensor) and v.dim() == 0 for v in found.values()),
        f"extra_losses returns {found!r:.80}, not {{name: 0-d tensor}}",
    )
