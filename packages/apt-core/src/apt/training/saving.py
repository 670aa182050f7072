"""When a run is saved, by which of its processes, and what is saved of one that fails."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Any

from apt.checkpoint.background import BackgroundSaver
from apt.checkpoint.rng import set_torch_rng_state
from apt.checkpoint.store import Checkpoint, CheckpointStore
from apt.core.device import comes_to_an_end
from apt.core.errors import AptWarning, CheckpointError, NotFiniteError
from apt.core.world import PATIENCE
from apt.training.sharding import is_sharded
from apt.training.signals import Interrupted
from apt.training.state import capture

if TYPE_CHECKING:
    from apt.checkpoint.sharded import ShardedStore
    from apt.training.trainer import Trainer

POLL_SECONDS = 0.01

SLOWEST_STEP = 60.0
"""Seconds that a process which fails gives the others to notice it."""


class RunSaver:
    """Saves one run: process 0 all of it, or every process its shard.

    Args:
        trainer: the run; its model is built, and its folder is there.
    """

    def __init__(self, trainer: Trainer) -> None:
        assert trainer.run is not None
        self._trainer = trainer
        self._world = trainer.world
        keep = trainer.config.checkpoint
        folder, counts = trainer.run.checkpoints, (keep.keep_last, keep.keep_best, keep.keep_every)
        self._sharded: ShardedStore | None = None
        if is_sharded(trainer.model):
            from apt.checkpoint.sharded import ShardedStore

            parameters = dict(trainer.model.named_parameters())
            self._sharded = ShardedStore(folder, *counts, world=self._world, parameters=parameters)
        self.store = self._sharded or CheckpointStore(folder, *counts)
        savers = self._world.local_size if self._sharded else 1
        self._saver = BackgroundSaver(self.store, asynchronous=keep.asynchronous, savers=savers)

    def save(self, *, wait: bool = False) -> None:
        """Save, in the background unless told to wait; then no process goes on before it is on the disk.

        A model that is not finite is never kept.
        """
        trainer, guard = self._trainer, self._trainer.guard
        if wrong := self._world.first_said(guard.wrong_in_state(trainer)):
            if wait or trainer.step >= trainer.total_steps:
                raise guard.error(trainer, wrong)
            guard.roll_back(trainer, wrong)
            return
        checkpoint = capture(trainer)
        if self._sharded is not None:
            self._write_shards(checkpoint, wait)
        elif self._world.is_first:
            self._saver.save(checkpoint, wait=wait)
        guard.saved()
        if wait:
            self._world.wait_for_all()

    def check(self) -> None:
        """Raise what a save has failed with, if one has ended that way."""
        self._saver.check()

    def wait(self) -> None:
        """Return once what every process has saved is on the disk.

        Raises:
            CheckpointError: it could not be saved.
        """
        self._await_shards()
        self._saver.wait()
        self._world.wait_for_all()

    def last(self) -> int | None:
        """The step of the newest checkpoint, if there is one; the save that is on its way is waited for."""
        self._await_shards()
        self._finish()
        self._world.wait_for_all()
        return max((step for step in self.store.steps() if step <= self._trainer.step), default=None)

    def rescue(self, error: BaseException, *, between_updates: bool, rng: dict[str, Any] | None, killed: bool) -> bool:
        """Save a run that ends with `error` as it stood after its last whole step; returns whether that was possible.

        Not saved is what stopped in mid-update, is not finite, or for which nobody waits, and what saving itself has
        ended. Shards are saved if every process still has its own, of one and the same step.

        Args:
            between_updates: whether weights and moments are those of one step.
            rng: torch's random state before the step that failed, which is done again after a resume, with the numbers
                it had drawn; None if it was none.
            killed: whether another process is gone without a word.
        """
        is_whole = between_updates and isinstance(error, Exception)
        is_whole = is_whole and not isinstance(error, Interrupted | CheckpointError | NotFiniteError)
        is_whole = is_whole and self._is_sound()
        checkpoint = self._captured(rng) if is_whole and (self._world.is_first or self._sharded) else None
        if self._sharded is not None and isinstance(error, Exception):
            step = None if checkpoint is None else self._trainer.step
            checkpoint = checkpoint if self._all_stand(self._sharded, step, killed) else None
        elif self._sharded is not None:
            self._sharded.give_up()
        self._finish()
        if checkpoint is None:
            return False
        try:
            self._saver.save(checkpoint, wait=True)
        except Exception as failed:
            self._trainer.logger.error("it could not be saved either: %s", failed)
            return False
        return True

    def _is_sound(self) -> bool:
        """Whether the state is finite, and the device still gives it."""
        trainer = self._trainer
        try:
            if self._world.size > 1 and not comes_to_an_end(trainer.device, PATIENCE):
                trainer.logger.error("%s waits for a process that is gone: what it holds is not saved", trainer.device)
                self._world.abandon()
                return False
            return not trainer.guard.wrong_in_state(trainer)
        except RuntimeError as failed:  # a device that has failed says it again, whatever it is asked
            trainer.logger.error("it could not be saved either: %s", failed)
            return False

    def _captured(self, rng: dict[str, Any] | None) -> Checkpoint | None:
        """The run that ends, if it is worth saving. Without the state of a plugin that does not give it, it is not,
        where there is a checkpoint that has it: it would take that one's place."""
        hooks = self._trainer.hooks
        if rng is not None:
            set_torch_rng_state(rng)
        try:
            with hooks.forgiving():
                checkpoint = capture(self._trainer)
        except Exception as failed:
            self._trainer.logger.error("it could not be saved either: %s", failed)
            return None
        lacks = any(failure.effect and failure.hook == "on_checkpoint_save" for failure in hooks.failures)
        has_others = self._saver.is_busy or bool(self.store.steps())
        return None if lacks and hooks.on_plugin_error == "stop" and has_others else checkpoint

    def _write_shards(self, checkpoint: Checkpoint, wait: bool) -> None:
        """Save together with the other processes: in a thread, whoever waits for it, so that one that is killed in the
        meantime is missed."""
        self._await_shards()
        self._saver.wait()
        waits = wait or not self._saver.copies(checkpoint.nbytes)
        waits = bool(self._world.maximum([int(waits)])[0])
        self._saver.begin(checkpoint, copy=not waits)
        if waits:
            self._await_shards()
            self._saver.wait()

    def _await_shards(self) -> None:
        """Return once no process is writing its shards. They ask each other: a process that waited for its own thread
        alone would wait for ever for one that was killed.

        Raises:
            PeerLostError: a process is gone.
        """
        while self._sharded is not None and self._world.maximum([int(self._saver.is_busy)])[0]:
            time.sleep(POLL_SECONDS)

    def _all_stand(self, store: ShardedStore, step: int | None, killed: bool) -> bool:
        """Whether every process has its shard, and all of the same step."""
        said: Any = self._world.standings([step, store.number], 2 * PATIENCE if killed else SLOWEST_STEP)
        if said is None:
            store.give_up()
            return False
        store.number = max(number for _, number in said)
        return step is not None and {other for other, _ in said} == {step}

    def _finish(self) -> None:
        """Wait for the save that is on its way; its failure is said, for something else ends the run."""
        try:
            self._saver.wait()
        except Exception as failed:
            self._trainer.logger.error("the last save failed: %s", failed, exc_info=failed)
            warnings.warn(f"the last save failed: {failed}", AptWarning, stacklevel=3)
