"""A run's own record of its metrics: metrics.jsonl, one JSON object a line."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apt.checkpoint.durable import replacing
from apt.core.errors import AptWarning
from apt.core.files import only_a_file, open_file


class MetricsFile:
    """Appends records as they come.

    Args:
        path: the file.
        resume_step: a resumed run continues at this step: what an earlier process wrote from there on is cut off, so
            that no step stands in the file twice.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        if resume_step is not None and path.exists():
            with replacing(path) as file:
                for record in read_metrics(path):
                    if record["step"] < resume_step:
                        file.write(_line(record).encode())
        # Line by line: what was logged is in the file, whatever becomes of this process.
        self._file = open(path, "a", encoding="utf-8", buffering=1, opener=only_a_file)  # noqa: SIM115

    def on_log(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        self._file.write(_line(record))

    def on_training_end(self, trainer: Any) -> None:
        """The run has ended well."""
        self._file.close()

    def on_exception(self, error: BaseException, trainer: Any) -> None:
        """The run has ended early."""
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file. A last line that was cut off by a crash is passed over; so is, with an
    AptWarning, any other that is no record.

    Raises:
        OSError: it cannot be read, or is no file.
    """
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and type(record.get("step")) is int:
                yield record
            elif line.endswith(b"\n"):
                warnings.warn(f"{path}:{number} is no record of metrics, and is passed over", AptWarning, stacklevel=2)


def _line(record: Mapping[str, Any]) -> str:
    # JSON has no NaN; null is what every reader understands.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite) + "\n"
