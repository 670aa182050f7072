"""A run's folder: made or entered, gone on with where it is resumed, and told what the run is made of."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from apt.checkpoint.durable import cannot_write, replace
from apt.checkpoint.lock import check_age, check_frozen, check_lock, read_lock, write_lock
from apt.core.discovery import Plugin
from apt.core.errors import AptWarning, CheckpointError
from apt.core.hooks import TRAINING
from apt.core.in_use import Slot
from apt.core.logging import log_to_file
from apt.core.profiles import dump_yaml, resolve
from apt.core.runs import RunFolder, new_run
from apt.training.metrics import MetricsFile
from apt.training.plan import plan
from apt.training.run_lock import only_trainer
from apt.training.saving import RunSaver
from apt.training.state import restore

if TYPE_CHECKING:
    from apt.training.trainer import Trainer


def refuse_what_is_not_in(lock: Path, trainer: Trainer) -> None:
    """Raise PluginError for what a lock does not hold, before a plugin listens or any text is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AptWarning)  # the run itself will say it
        slots = plan(trainer.config, trainer.registry, strict=trainer.strict)[0].slots.values()
    check_frozen(read_lock(lock), lock, trainer.plugins.found, _plugins_of(trainer, slots), slots)


def open_run(trainer: Trainer, stack: ExitStack) -> None:
    """Make the run's folder, or enter the one that is resumed and go on from its last good checkpoint; then write down
    what the run is made of.

    Args:
        trainer: its parts are built; its `run` and its `saver` are set here.
        stack: closes, at the end of the run, what is opened here.

    Raises:
        CheckpointError: the folder cannot be written to, is another run's, or holds nothing to go on from; or what is
            in use does not fit what the run was made with.
        RunInUseError: another trainer is at work in it.
    """
    trainer.run = run = _own_folder(trainer, stack)
    slots = list(trainer.in_use.slots.values())
    trainer.saver = RunSaver(trainer)
    if trainer.lock:
        _tell_changes(trainer, run)
        checkpoint = trainer.saver.store.load()
        check_age(trainer.lock, slots, trainer.plugins.found, checkpoint.plugins)
        check_lock(trainer.lock, slots)
        restore(trainer, checkpoint)
        if len(found := set(trainer.world.gather(trainer.step))) > 1:
            raise CheckpointError(
                f"the processes find different checkpoints in {run.checkpoints}: of steps {sorted(found)}",
                hint="the run's folder must be the same one on every machine",
            )
    if trainer.world.is_first:
        _write_down(trainer, run, slots, stack)


def _tell_changes(trainer: Trainer, run: RunFolder) -> None:
    """Say where the model is to be another one than the run was made with: what fits its shapes is not refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AptWarning)
        before = resolve(run.profile).config.model.model_dump(mode="json")
    now = trainer.config.model.model_dump(mode="json")
    changed = [f"model.{key} {now[key]} (was {before.get(key)})" for key in now if now[key] != before.get(key)]
    if changed:
        warnings.warn(f"the run goes on with another model: {', '.join(changed)}", AptWarning, stacklevel=2)


def _write_down(trainer: Trainer, run: RunFolder, slots: list[Slot], stack: ExitStack) -> None:
    try:
        stack.enter_context(log_to_file(trainer.logger, run.log))
        trainer.hooks.add(MetricsFile(run.metrics, trainer.step if trainer.resumed else None), "metrics")
        if not trainer.resumed:
            trainer.tokenizer.save(run.tokenizer)
    except OSError as error:
        raise CheckpointError(
            f"cannot write to the run's folder {run.path}: {error.strerror or error}",
            hint="free some space, or choose another output_dir",
        ) from error
    if trainer.resumed and trainer.step >= trainer.total_steps and trainer.epoch_closed:
        return  # nothing is left to do, and nothing is to be changed
    before = (trainer.lock or {}).get("plugins", ())
    absent = [record for record in before if record["name"] in trainer.carried_states]
    write_lock(run.lock, slots, trainer.model, trainer.modules_by_slot, _plugins_of(trainer, slots), absent)
    replace(run.profile, dump_yaml(trainer.config.model_dump(mode="json")).encode())
    for slot in slots:
        if slot.is_fallback:
            trainer.logger.warning(
                "%s:%s is in effect instead of %s: %s", slot.kind, slot.name, slot.requested, slot.reason
            )


def _own_folder(trainer: Trainer, stack: ExitStack) -> RunFolder:
    """The run's folder, which process 0 makes or enters, and has for its run alone."""
    if not trainer.world.is_first:
        return RunFolder(Path(trainer.world.gather(None)[0]))
    run = trainer.run or new_run(trainer.config.output_dir, trainer.config.name)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(error, run.path, 0) from error
    stack.enter_context(only_trainer(run.path))
    if run.holds_a_run() and not trainer.resumed:
        raise CheckpointError(
            f"{run.path} holds a run already",
            hint=f"go on with it (--resume {run.path}) or choose another folder",
        )
    trainer.world.gather(str(run.path))
    return run


def _plugins_of(trainer: Trainer, slots: Iterable[Slot]) -> list[Plugin]:
    return trainer.plugins.used({slot.registration.plugin for slot in slots if slot.registration}, TRAINING)
