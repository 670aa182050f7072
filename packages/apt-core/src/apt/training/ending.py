"""What is said where a run ends before its time: how far it came, what is saved, and how to go on."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from apt.core.errors import AptError, DeviceError, PeerLostError, TrainingError, in_a_line, is_out_of_memory
from apt.training.memory import in_less_memory
from apt.training.signals import Interrupted

if TYPE_CHECKING:
    from apt.training.trainer import Trainer


def interrupted(trainer: Trainer, signum: int) -> Interrupted:
    """The end of a run that a signal has stopped, after a step that is saved."""
    name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
    return Interrupted(
        signum,
        f"stopped by {name} after step {trainer.step} of {trainer.total_steps}; saved",
        hint=f"go on with: apt train --resume {trainer.run_dir}",
    )


def before_training(trainer: Trainer, error: BaseException, failed: str | None) -> AptError | None:
    """What to raise for an error that came up while the run was built; None if it says all there is to say.

    Args:
        failed: which other process failed and with what, if one did that could still say so.
    """
    if isinstance(error, PeerLostError) and failed:
        return PeerLostError(f"{failed}; before the first step")
    if not is_out_of_memory(error):
        return None
    return DeviceError(
        f"{in_a_line(error)} on {trainer.device} in the first batch, or before it",
        hint=in_less_memory(trainer.config.training, trainer.world),
    )


def in_training(trainer: Trainer, error: BaseException, failed: str | None, saved: bool) -> AptError | None:
    """The same for an error in the loop.

    Args:
        failed: which other process failed and with what, if one did that could still say so.
        saved: whether the run is saved as it was after its last step.
    """
    kept = f"the run is saved in {trainer.run_dir}" if saved else "what was saved before is kept"
    again = f"apt train --resume {trainer.run_dir}"
    if isinstance(error, PeerLostError):
        lost = f"another process of the run was killed, or is out of reach, in step {trainer.step}; {kept}"
        return PeerLostError(
            f"step {trainer.step} failed in {failed}; {kept}" if failed else lost, hint=f"go on with: {again}"
        )
    if is_out_of_memory(error):
        return DeviceError(
            f"{in_a_line(error)} on {trainer.device} in step {trainer.step}; {kept}",
            hint=f"{in_less_memory(trainer.config.training, trainer.world)}; go on with: {again}",
        )
    if isinstance(error, AptError) or not isinstance(error, Exception):
        return None
    return TrainingError(
        f"step {trainer.step} failed: {in_a_line(error)}; {kept}",
        hint=f"see {trainer.run_dir / 'run.log'}, then go on with: {again}",
    )
