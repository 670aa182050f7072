"""Trackers that come with core."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from apt.core.config import NoConfig
from apt.core.errors import ProviderError
from apt.core.providers.tracker import TrackerProvider


class TensorBoardTracker(TrackerProvider):
    """Writes event files for TensorBoard into the run's folder `tensorboard/`."""

    Config: ClassVar[type[Any] | None] = NoConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ProviderError(
                "tracker:tensorboard needs the package tensorboard", hint='pip install "apt-core[tensorboard]"'
            ) from error
        self._make = SummaryWriter
        self._writer: Any = None

    def get_name(self) -> str:
        return "tensorboard"

    def get_version(self) -> str:
        return "1.0.0"

    def get_dependencies(self) -> list[str]:
        return ["tensorboard"]

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        # purge_step hides what an earlier process of a resumed run wrote from here on.
        self._writer = self._make(str(run_dir / "tensorboard"), purge_step=step or None)
        self._writer.add_text("profile", f"```json\n{json.dumps(config, indent=2)}\n```")

    def log(self, record: Mapping[str, Any]) -> None:
        for key, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("step", "epoch"):
                self._writer.add_scalar(f"{record['event']}/{key}", value, record["step"])

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
