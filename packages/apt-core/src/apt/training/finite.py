"""Numbers that are none: how they are noticed, and what becomes of a run that meets them.

`training.on_not_finite` says it. `stop` (the default) ends the run at the next record or checkpoint; nothing in the
loop waits for the device. `skip` and `rollback` look at the loss and the gradients of every step before the weights
change, and pass a bad step over: its batch counts as seen, the weights stay. `rollback` also takes weights, moments and
the plugins' states back to the last checkpoint, for what led to the bad step lies before it; the text and the schedules
go on from where they were, past the batches in between (as in PaLM, arXiv:2204.02311, section 5.1).

Under all three a checkpoint is written only if the weights and the optimizer's state are finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from apt.core.errors import NotFiniteError
from apt.core.world import own_part
from apt.training.state import take_back
from apt.training.step import Loss, of_all

if TYPE_CHECKING:
    from apt.training.trainer import Trainer

MAX_SKIPPED = 10
"""Steps in a row that are passed over; one more, and the run is not training."""

MAX_ROLLBACKS = 3
"""Times that a run goes back with no new checkpoint in between."""


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number that this process holds is finite; waits for the devices.

    A sum is finite only if all its terms are, and is found several times as fast as the terms are looked at one by one;
    that is left for a sum which overflows.
    """
    parts = (own_part(tensor.detach()) for tensor in tensors)
    floating = [part for part in parts if part.is_floating_point() and part.numel()]
    sums: dict[torch.device, list[Tensor]] = {}
    for tensor in floating:
        sums.setdefault(tensor.device, []).append(tensor.sum().float())
    if all(bool(torch.isfinite(torch.stack(of_device)).all()) for of_device in sums.values()):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in floating)


class FiniteGuard:
    """Watches one run.

    Args:
        policy: `training.on_not_finite`.
    """

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self._skipped = self._rollbacks = 0
        self._culprits = ""

    def wrong_in_step(self, trainer: Trainer, loss: Loss, parameters: Sequence[nn.Parameter]) -> str:
        """What of a step, its gradients complete, is not finite; "" if nothing is, and under `stop`."""
        if self.policy == "stop":
            return ""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = of_all(torch.nn.utils.get_total_norm(gradients))
        wrong = "" if bool(torch.isfinite(norm + loss.total)) else self.of_losses(trainer, [loss]) or "the gradients"
        self._skipped = self._skipped + 1 if wrong else 0
        return wrong

    def of_losses(self, trainer: Trainer, losses: Iterable[Loss]) -> str:
        """What to say of the first of `losses` that is not finite, and of the plugins that made it so, which is certain
        where the cross-entropy is finite; "" if all are."""
        for loss in losses:
            if bool(torch.isfinite(loss.total)):
                continue
            own = bool(torch.isfinite(loss.cross_entropy))
            wrong = [name for name, part in loss.parts.items() if own and not bool(torch.isfinite(part))]
            plugins = {name: trainer.plugin_of_loss.get(name.removeprefix("extra."), "the model") for name in wrong}
            self._culprits = ", ".join(f"{name!r} of {plugin}" for name, plugin in plugins.items())
            return "the loss" + (f", by {self._culprits}" if wrong else "")
        return ""

    def wrong_in_state(self, trainer: Trainer) -> str:
        """What of a run between two steps, as far as this process holds it, is not finite and must not be saved; "" if
        nothing is."""
        if not trainer.window.is_finite():
            return self.of_losses(trainer, trainer.window.losses)
        if wrong := _wrong_in_model(trainer.model):
            return wrong
        state = [value for values in trainer.optimizer.state.values() for value in values.values()]
        return "" if all_finite(value for value in state if isinstance(value, Tensor)) else "the optimizer's state"

    def saved(self) -> None:
        """A checkpoint is being written: there is something new to go back to."""
        self._rollbacks = 0

    def pass_over(self, trainer: Trainer, wrong: str) -> None:
        """Leave out a step that is `wrong`: clear its gradients, get the run fit to go on, and say so.

        Raises:
            NotFiniteError: it cannot go on, or has tried often enough.
        """
        trainer.optimizer.zero_grad(set_to_none=True)
        if self.policy == "rollback":
            self.roll_back(trainer, wrong)
            return
        # With weights that are not finite every step to come is wrong, too.
        lost = bool(_wrong_in_model(trainer.model))
        if self._skipped > MAX_SKIPPED or trainer.world.maximum([int(lost)])[0]:
            raise self.error(trainer, wrong)
        self._tell(trainer, wrong, "passed over")

    def roll_back(self, trainer: Trainer, wrong: str) -> None:
        """Take a run that is `wrong` back to the weights of its last checkpoint, if the policy says so.

        Raises:
            NotFiniteError: it is another policy, there is no checkpoint, or it has gone back often enough.
        """
        if self.policy != "rollback" or self._rollbacks == MAX_ROLLBACKS or trainer.last_saved() is None:
            raise self.error(trainer, wrong)
        self._rollbacks += 1
        step = take_back(trainer, trainer.saver.store.load())
        self._tell(trainer, wrong, f"going on with the state of step {step}")

    def _tell(self, trainer: Trainer, wrong: str, what: str) -> None:
        trainer.note(f"not finite at step {trainer.step}: {wrong}; {what}")
        trainer.extra_metrics["not_finite"] = trainer.extra_metrics.get("not_finite", 0) + 1

    def error(self, trainer: Trainer, wrong: str) -> NotFiniteError:
        """What ends the run, with what is kept of it."""
        saved = trainer.last_saved()
        kept = f"the checkpoint of step {saved} is kept" if saved is not None else "nothing was saved yet"
        tried = ""
        if self._skipped > MAX_SKIPPED:
            tried = f", after {MAX_SKIPPED} steps that were passed over"
        elif self._rollbacks:
            tried = f", after {self._rollbacks} returns to the last checkpoint"
        return NotFiniteError(
            f"not finite at step {trainer.step}{tried}: {wrong}; {kept}",
            hint=f"mend {self._culprits}, or train without it"
            if self._culprits and self._culprits in wrong
            else "lower training.learning_rate, or set training.gradient_clip",
        )


def _wrong_in_model(model: nn.Module) -> str:
    if not all_finite(model.parameters()):
        return "the weights"
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    kept = [own_part(x) for name, x in model.state_dict().items() if name not in names and isinstance(x, Tensor)]
    # A buffer may well hold infinity: masks do.
    return "a buffer of the model" if any(bool(x.isnan().any()) for x in kept) else ""
