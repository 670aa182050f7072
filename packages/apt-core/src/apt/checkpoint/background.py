"""Saving beside the training: the state is copied, and a thread writes the copy while training goes on.

Writing is hashing, waiting for the disk and reading back, which leave Python's lock to the training thread. At most one
copy is on its way: who saves again waits for it. What is written, and in which order, is the store's business; a
process that dies in mid-save leaves what it would have left without a thread.
"""

from __future__ import annotations

import warnings
from threading import Thread

from apt.checkpoint.store import Checkpoint, CheckpointStore, Snapshot
from apt.core.device import free_memory
from apt.core.errors import AptWarning

SPARE = 1.25
"""What must be free for a copy, in copies: training must not be the one that runs out of memory."""


class BackgroundSaver:
    """Saves to a store, for one thread that trains.

    Args:
        asynchronous: whether to write in the background; if not, `save` does it all.
        savers: how many processes of this machine save at the same time.
    """

    def __init__(self, store: CheckpointStore, *, asynchronous: bool = True, savers: int = 1) -> None:
        self._store = store
        self._savers = savers
        self._asynchronous = asynchronous
        self._thread: Thread | None = None
        self._failure: BaseException | None = None

    def save(self, checkpoint: Checkpoint, *, wait: bool = False) -> None:
        """Copy a checkpoint and return; it is on the disk when `wait` returns. The save before is waited for.

        Args:
            wait: return when it is on the disk, and make no copy. So does, once and for all and with an AptWarning, a
                saver that finds no memory for one.

        Raises:
            CheckpointError: the save before has failed, or this one: it cannot be written, or it is none that a
                checkpoint can keep.
        """
        self.wait()
        if wait or not self.copies(checkpoint.nbytes):
            self._store.save(checkpoint)
        else:
            self.begin(checkpoint, copy=True)

    def copies(self, nbytes: int) -> bool:
        """Whether a checkpoint of so many bytes is to be copied, and written while training goes on."""
        return self._asynchronous and self._finds_memory(nbytes)

    def begin(self, checkpoint: Checkpoint, *, copy: bool) -> None:
        """Begin to write a checkpoint, or a copy of it, in a thread; the save before has ended.

        Raises:
            CheckpointError: it is none that a checkpoint can keep.
        """
        snapshot = self._store.snapshot(checkpoint, copy=copy)
        # A daemon: a process that is told to leave at once does not wait for it.
        self._thread = Thread(target=self._write, args=(snapshot,), name="apt-checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether a save is on its way."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise what a save has failed with, if one has ended that way; waits for no save."""
        if self._failure is not None:
            self.wait()

    def wait(self) -> None:
        """Return once everything is on the disk.

        Raises:
            CheckpointError: it could not be saved.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _finds_memory(self, needed: int) -> bool:
        if free_memory() > SPARE * needed * self._savers:
            return True
        self._asynchronous = False
        warnings.warn(
            f"there is no memory for a copy of the run's state ({needed / 1e9:,.2f} GB): from now on training waits "
            "while checkpoints are written",
            AptWarning,
            stacklevel=3,
        )
        return False

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self._store.write(snapshot)
        except BaseException as failure:
            self._failure = failure
