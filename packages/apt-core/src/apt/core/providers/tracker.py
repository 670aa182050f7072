"""Tracker: sends a run's metrics somewhere."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt.core.registry import Provider


class TrackerProvider(Provider):
    """Records what a run logs. Steps that a resumed run does again are logged again."""

    @abstractmethod
    def start(self, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        """The run begins or resumes at `step`. `config` is the resolved profile as plain data."""

    @abstractmethod
    def log(self, record: Mapping[str, Any]) -> None:
        """One record, JSON-compatible, with at least "step" and "epoch"."""

    def finish(self) -> None:
        """The run has ended, well or not."""

    def on_training_start(self, trainer: Any) -> None:
        """Hands the run's beginning to `start`."""
        self.start(trainer.run_dir, trainer.config.model_dump(mode="json"), trainer.step)

    def on_log(self, record: Mapping[str, Any]) -> None:
        """Hands a record to `log`."""
        self.log(record)

    def on_training_end(self, trainer: Any) -> None:
        """Hands a good end to `finish`."""
        self.finish()

    def on_exception(self, error: BaseException, trainer: Any) -> None:
        """Hands a bad end to `finish`."""
        self.finish()


__all__ = ["TrackerProvider"]
