"""What a run shows: a live line on a terminal, plain lines elsewhere. It listens to the run as any plugin does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from apt.core.in_use import Slot
from apt.hookspecs import hookimpl
from apt.training.sharding import is_sharded

PLAIN_SECONDS = 10.0
"""Where there is no terminal, a line about the step comes at most this often."""


class _Screen(Console):
    """A console whose reader may leave: nothing is shown from then on, where rich would end the program."""

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):
            super().on_broken_pipe()


class Progress:
    """Shows one run.

    Args:
        quiet: show nothing.
        console: where to; standard output if left out.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or _Screen(quiet=quiet, highlight=False, soft_wrap=True)
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._epoch_started = self._line_shown = time.monotonic()
        self._epoch = self._epochs = 0
        self._loss: float | None = None
        self._speed: list[float] = []
        self._evaluation: dict[str, float] = {}

    # Before the run

    def preparing(self, label: str, done: int, total: int | None) -> None:
        """Long work on the data: `done` of `total` bytes."""
        finished = total is not None and done >= total
        if self.console.is_terminal and not self.console.quiet:
            if self._bar is None:
                columns = (
                    TextColumn("{task.description}"),
                    BarColumn(),
                    TextColumn("{task.percentage:>3.0f} %"),
                    TimeRemainingColumn(),
                )
                self._bar = Bar(*columns, console=self.console, transient=True)
                self._bar.start()
                self._task = self._bar.add_task(label, total=total)
            assert self._task is not None
            self._bar.update(self._task, description=label, completed=done, total=total)
            if finished:
                self._close_bar()
        elif time.monotonic() - self._line_shown >= PLAIN_SECONDS:
            self._line_shown = time.monotonic()
            of = f" of {total / 1e6:.1f}" if total else ""
            self._print(f"{label}: {done / 1e6:.1f}{of} MB")

    # The run

    def on_training_start(self, trainer: Any) -> None:
        self._close_bar()
        config, data = trainer.config, trainer.data
        self._epochs = config.training.max_epochs
        shape = f"{config.model.num_layers} layers, d_model {config.model.d_model}, {config.model.num_heads} heads"
        resumed = f", resumed at step {trainer.step:,}" if trainer.resumed else ""
        where = str(trainer.device) + (f", in {trainer.world.size} shards" if is_sharded(trainer.model) else "")
        rows = [
            ("profile", f"{config.name} ({trainer.profile.source})"),
            *((slot.kind, describe_slot(slot)) for slot in trainer.in_use.slots.values()),
            ("data", f"{data.train.size} to train on, {data.val.size} held out"),
            (
                "model",
                f"{config.model.backbone}, {shape}, {trainer.model.num_params():,} parameters, on {where}",
            ),
            ("training", f"{trainer.total_steps:,} steps, {trainer.steps_per_epoch:,} an epoch{resumed}"),
            ("run", str(trainer.run_dir)),
        ]
        for label, fact in rows:
            self._print(f"{label:<10} {fact}")
        if trainer.step >= trainer.total_steps:
            more = "--training.max_steps N" if config.training.max_steps == trainer.total_steps else "--epochs N"
            self._print(f"Nothing is left to do: every step is done. More with {more}")
        elif self.console.is_terminal and not self.console.quiet:
            columns = (
                TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[numbers]}"),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f}"), TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = Bar(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("", total=trainer.total_steps, completed=trainer.step, numbers="")
            self._bar.start()

    def on_epoch_start(self, epoch: int, trainer: Any) -> None:
        self._epoch, self._epoch_started, self._line_shown = epoch, time.monotonic(), time.monotonic()
        self._speed, self._loss = [], None
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=self._title())

    def on_log(self, record: Mapping[str, Any]) -> None:
        if record["event"] != "train":
            return
        step, self._loss = record["step"] + 1, record["loss"]
        self._speed.append(record["tokens_per_second"])
        if self._bar is None and time.monotonic() - self._line_shown < PLAIN_SECONDS:
            return
        numbers = f"loss={self._loss:.4f}  {record['tokens_per_second']:,} tokens/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        else:
            self._line_shown = time.monotonic()
            self._print(f"{self._title()}: step {step:,}  {numbers}")

    def note(self, text: str) -> None:
        """What a plugin has to say, on a line of its own. Not being read is no reason to fail: rich would exit."""
        with suppress(OSError, SystemExit):
            self._print(text)

    def on_evaluation_end(self, metrics: Mapping[str, float], trainer: Any) -> None:
        self._evaluation = dict(metrics)
        in_mid_epoch = trainer.batch_index < trainer.steps_per_epoch and trainer.step < trainer.total_steps
        if in_mid_epoch:
            self._print(f"{self._title()}: step {trainer.step:,}  val_loss={metrics['val_loss']:.4f}")

    def on_epoch_end(self, epoch: int, trainer: Any) -> None:
        seconds = time.monotonic() - self._epoch_started
        parts = [f"loss={self._loss:.4f}"] if self._loss is not None else []
        parts += [f"val_loss={self._evaluation['val_loss']:.4f}"] if self._evaluation else []
        accuracies = ("accuracy", "voted_accuracy")
        parts += [f"{name}={self._evaluation[name]:.1%}" for name in accuracies if name in self._evaluation]
        speed = f"{sum(self._speed) / len(self._speed):,.0f} tokens/s" if self._speed else ""
        self._print(f"{self._title()}: {' '.join(parts)}  {speed}  {seconds:.1f} s")

    # Last of all: what fails in another one's hook belongs into the summary.

    @hookimpl(trylast=True)
    def on_training_end(self, trainer: Any) -> None:
        self._close_bar()
        self._summary(trainer)
        self._print(f"Training is complete. The run lies in {trainer.run_dir}")
        # What an encoder-decoder answers is for its pairs to say.
        pairs = trainer.config.model.backbone == "encdec"
        self._print(
            f"Next: apt chat {trainer.run_dir}" if pairs else f'Next: apt generate {trainer.run_dir} --prompt "The"'
        )

    @hookimpl(trylast=True)
    def on_exception(self, error: BaseException, trainer: Any) -> None:
        self._close_bar()
        self._summary(trainer)

    def _summary(self, trainer: Any) -> None:
        """What the run went on without, once more at its end, where it is read."""
        last = {failure.where: failure for failure in trainer.hooks.failures}
        for failure in last.values():
            self._print(f"Note: {failure}")
        for where in trainer.hooks.dropped:
            if where not in last:
                self._print(f"Note: {where} was left out: it failed before this run was resumed")

    def _print(self, line: str) -> None:
        """One line, as it is: no markup, and not broken where it is longer than the screen."""
        self.console.print(line, markup=False, soft_wrap=True)

    def _title(self) -> str:
        return f"Epoch {self._epoch + 1}/{self._epochs} (epoch={self._epoch})"

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


def describe_slot(slot: Slot) -> str:
    """One line: the provider in effect, and what was asked for where that is another one."""
    if slot.name is None or slot.registration is None:
        return f"none (asked for {slot.requested}: {slot.reason})"
    claim = slot.registration
    version = f" {claim.version}" if claim.version else ""
    origin = (
        f" ({claim.distribution} {claim.distribution_version})" if claim.distribution_version else f" ({claim.plugin})"
    )
    asked = f", instead of {slot.requested}: {slot.reason}" if slot.is_fallback else ""
    return f"{slot.name}{version}{origin}{asked}"
