"""What a checkpoint holds of a run, and how a run is put back into that state."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from apt.checkpoint.codec import encode
from apt.checkpoint.lock import requirement_of_listener
from apt.checkpoint.rng import rng_state, set_rng_state
from apt.checkpoint.store import Checkpoint
from apt.core.catalogue import how_to_restore
from apt.core.errors import AptWarning, CheckpointError, misfit

if TYPE_CHECKING:
    from apt.training.trainer import Trainer


def capture(trainer: Trainer) -> Checkpoint:
    """The run as it stands between two steps.

    Raises:
        TrainingError: a plugin does not give its state, and plugins' failures are to stop the run.
    """
    return Checkpoint(
        step=trainer.step,
        epoch=trainer.epoch,
        batch_index=trainer.batch_index,
        model=trainer.model.state_dict(),
        optimizer=trainer.optimizer.state_dict(),
        rng=rng_state(),
        plugins=_states_of_plugins(trainer),
        metrics=trainer.metrics if trainer.evaluated_step == trainer.step else {},
        extra={
            "best_val_loss": trainer.best_val_loss,
            "epoch_closed": trainer.epoch_closed,
            "data": trainer.data.fingerprint,
            "dealing": _dealing(trainer),
        },
        dropped=trainer.hooks.dropped,
    )


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Put a run that has just been built into the state of `checkpoint`.

    Raises:
        CheckpointError: the checkpoint's weights are not those of this model; or, where everything is to be strict, it
            holds state of a plugin that is not here.
    """
    _load_parameters(trainer, checkpoint)
    if not checkpoint.extra:
        return  # a model that was made elsewhere: the run begins with its weights
    trainer.step, trainer.epoch, trainer.batch_index = checkpoint.step, checkpoint.epoch, checkpoint.batch_index
    trainer.epoch_closed = checkpoint.extra["epoch_closed"]
    _deal_on(trainer, checkpoint.extra["dealing"])
    trainer.measure()
    trainer.best_val_loss = checkpoint.extra["best_val_loss"]
    if checkpoint.metrics:
        trainer.metrics, trainer.evaluated_step = dict(checkpoint.metrics), checkpoint.step
    if checkpoint.extra["data"] != trainer.data.fingerprint:
        warnings.warn(
            "the text is not the one this run began with; going on with the text as it is now", AptWarning, stacklevel=2
        )
    _restore_plugins(trainer, checkpoint.plugins)
    if checkpoint.dropped:
        trainer.hooks.switch_off(checkpoint.dropped)
        lost = ", ".join(checkpoint.dropped)
        warnings.warn(f"going on without {lost}: it failed earlier in this run", AptWarning, stacklevel=2)
    set_rng_state(checkpoint.rng)


def take_back(trainer: Trainer, checkpoint: Checkpoint) -> int:
    """Put weights, moments and plugins of a run under way into the state of `checkpoint`, one of its own, and return
    that one's step. Position, random numbers and effects that were dropped stay as they are."""
    _load_parameters(trainer, checkpoint)
    for plugin, state in checkpoint.plugins.items():
        trainer.hooks.call_one(plugin, "on_checkpoint_load", state=state, trainer=trainer)
    return checkpoint.step


def _load_parameters(trainer: Trainer, checkpoint: Checkpoint) -> None:
    settings = [{key: value for key, value in group.items() if key != "params"} for group in _groups(trainer)]
    try:
        trainer.model.load_state_dict(checkpoint.model)
        if checkpoint.extra:
            _load_optimizer(trainer.optimizer, checkpoint.optimizer)
        else:
            trainer.optimizer.state.clear()  # a model that was made elsewhere has no moments
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} does not fit this model: {misfit(error)}",
            hint="resume without overrides of model.*, or start a new run",
        ) from error
    # The moments are the checkpoint's; what the profile says (weight decay, betas) is as it says now.
    for group, own in zip(_groups(trainer), settings, strict=True):
        group.update(own)


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict`, which casts what it is given to the dtype of the weights, and leaves every tensor in its own:
    what a plugin keeps of a parameter may be a count, or finer than the weights."""
    optimizer.load_state_dict(state)
    keys = [key for group in state["param_groups"] for key in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, parameter in zip(keys, parameters, strict=True):
        own = optimizer.state.get(parameter, {})
        for name, value in state["state"].get(key, {}).items():
            if isinstance(value, Tensor) and own[name].dtype != value.dtype:
                own[name] = value.to(own[name].device)


def _states_of_plugins(trainer: Trainer) -> dict[str, Any]:
    states = dict(trainer.carried_states)
    for plugin, state in trainer.hooks.call("on_checkpoint_save", trainer=trainer):
        try:
            encode(state, plugin)
            states[plugin] = state
        except CheckpointError as error:
            # One plugin's mistake must not cost the run its checkpoint.
            trainer.hooks.report(plugin, "on_checkpoint_save", error)
    return states


def _restore_plugins(trainer: Trainer, states: dict[str, Any]) -> None:
    listening = set(trainer.hooks.names())
    for plugin, state in states.items():
        if plugin in listening:
            trainer.hooks.call_one(plugin, "on_checkpoint_load", state=state, trainer=trainer)
            continue
        requirement = requirement_of_listener(trainer.lock, plugin) if trainer.lock else None
        fix = how_to_restore(requirement) if requirement else None
        what = f"the checkpoint holds state of {plugin!r}, which is not here"
        if trainer.strict:
            raise CheckpointError(what, hint=fix or "go on without --strict: its state is then kept for later")
        trainer.carried_states[plugin] = state
        warnings.warn(
            f"{what}; it is kept for the next checkpoint" + (f" (to use it again: {fix})" if fix else ""),
            AptWarning,
            stacklevel=3,
        )


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = trainer.optimizer.param_groups
    return groups


def _dealing(trainer: Trainer) -> dict[str, int]:
    """How the text is dealt out: what a position in an epoch means depends on all of it."""
    loader = trainer.data.train
    return {
        "steps_per_epoch": trainer.steps_per_epoch,
        "batch_size": loader.batch_size,
        "block_size": loader.block_size,
        "seed": trainer.config.training.seed,
    }


def _deal_on(trainer: Trainer, before: dict[str, int]) -> None:
    """Where the text is dealt out in another way than before, go on at the same share of the epoch, and say so."""
    now = _dealing(trainer)
    if now == before:
        return
    changed = ", ".join(
        f"{key.replace('_', ' ')} {before[key]} -> {now[key]}" for key in now if now[key] != before[key]
    )
    if trainer.batch_index:
        share = trainer.batch_index / before["steps_per_epoch"]
        trainer.batch_index = min(round(share * now["steps_per_epoch"]), now["steps_per_epoch"])
    warnings.warn(
        f"the text is dealt out in another way than before ({changed}): "
        "some of this epoch may be seen twice, and some not at all",
        AptWarning,
        stacklevel=3,
    )
