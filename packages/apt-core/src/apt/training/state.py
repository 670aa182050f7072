"""What a checkpoint holds of a run, and how a run is put back into that state."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from apt.checkpoint.codec import encode
from apt.checkpoint.rng import rng_state, set_rng_state
from apt.checkpoint.store import Checkpoint
from apt.core.errors import AptWarning, CheckpointError

if TYPE_CHECKING:
    from apt.training.trainer import Trainer


def capture(trainer: Trainer) -> Checkpoint:
    """The run as it stands between two steps."""
    states = dict(trainer.carried_states)
    for plugin, state in trainer.hooks.call("on_checkpoint_save", trainer=trainer):
        try:
            encode(state, plugin)
            states[plugin] = state
        except CheckpointError as error:
            # One plugin's mistake must not cost the run its checkpoint.
            trainer.hooks.report(plugin, "on_checkpoint_save", error)
    return Checkpoint(
        step=trainer.step,
        epoch=trainer.epoch,
        batch_index=trainer.batch_index,
        model=trainer.model.state_dict(),
        optimizer=trainer.optimizer.state_dict(),
        rng=rng_state(),
        plugins=states,
        metrics=trainer.metrics if trainer.evaluated_step == trainer.step else {},
        extra={"best_val_loss": trainer.best_val_loss, "data": trainer.data.fingerprint},
        dropped=trainer.hooks.dropped,
    )


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Put a run that has just been built into the state of `checkpoint`.

    Raises:
        CheckpointError: the checkpoint's weights are not those of this model.
    """
    try:
        trainer.model.load_state_dict(checkpoint.model)
        trainer.optimizer.load_state_dict(checkpoint.optimizer)
    except (RuntimeError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} does not fit this model: {text}",
            hint="resume without overrides of model.*, or start a new run",
        ) from error
    trainer.step, trainer.epoch, trainer.batch_index = checkpoint.step, checkpoint.epoch, checkpoint.batch_index
    trainer.best_val_loss = checkpoint.extra["best_val_loss"]
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


def _restore_plugins(trainer: Trainer, states: dict[str, Any]) -> None:
    listening = set(trainer.hooks.names())
    for plugin, state in states.items():
        if plugin in listening:
            trainer.hooks.call_one(plugin, "on_checkpoint_load", state=state, trainer=trainer)
        else:
            trainer.carried_states[plugin] = state
            warnings.warn(
                f"the checkpoint holds state of {plugin!r}, which is not here; it is kept for the next checkpoint",
                AptWarning,
                stacklevel=3,
            )
