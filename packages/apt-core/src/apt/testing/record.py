"""The last conformance result of each provider, kept in the user's cache for `apt plugin-info`. Imports no torch."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from apt.core.cache import atomic_write, cache_dir, cache_root

FOLDER = "conformance"


@dataclass(frozen=True, slots=True)
class Record:
    """What came of checking one provider."""

    kind: str
    name: str
    distribution: str | None
    version: str
    """The provider's, as `apt plugin-info` shows it."""
    passed: int
    failed: int
    skipped: int
    settings: str = ""
    """What its section held, in words; empty for the defaults."""
    date: str = ""
    """The day, in UTC: 2026-01-31."""

    @property
    def slot(self) -> str:
        """ "kind:name"."""
        return f"{self.kind}:{self.name}"

    def summary(self, version: str) -> str:
        """One line for someone who has `version` installed."""
        result = f"{self.passed} of {self.passed + self.failed} checks passed"
        result += f", {self.skipped} skipped" if self.skipped else ""
        result += f", with {self.settings}" if self.settings else ""
        result += f", on {self.date}, version {self.version}"
        if version != self.version:
            result += f"; this is {version}: apt plugin-check {self.slot}"
        return result


def write(record: Record) -> Record:
    """Keep `record`, dated today, in place of the provider's last one; returns it. A cache that cannot be written is
    passed over."""
    dated = asdict(record) | {"date": time.strftime("%Y-%m-%d", time.gmtime())}
    with suppress(OSError), atomic_write(cache_dir(FOLDER) / _file_name(record.kind, record.name)) as file:
        file.write(json.dumps(dated, indent=1).encode())
    return Record(**dated)


def read(kind: str, name: str) -> Record | None:
    """The last record of a provider; None if there is none that can be read."""
    path: Path = cache_root() / FOLDER / _file_name(kind, name)
    try:
        record = Record(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    whole = all(isinstance(number, int) for number in (record.passed, record.failed, record.skipped))
    return record if whole and (record.kind, record.name) == (kind, name) else None


def _file_name(kind: str, name: str) -> str:
    return f"{kind}-{quote(name, safe='')}.json"


__all__ = ["Record", "read", "write"]
