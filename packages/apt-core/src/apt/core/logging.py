"""The run's log file: everything the console says in one line stands there with its traceback."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logging.getLogger("apt").addHandler(logging.NullHandler())

_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def get_logger(name: str = "apt") -> logging.Logger:
    """A logger under `apt`; silent unless the program that uses the library configures logging."""
    return logging.getLogger(name if name == "apt" or name.startswith("apt.") else f"apt.{name}")


@contextmanager
def log_to_file(logger: logging.Logger, path: Path) -> Iterator[None]:
    """Append what `logger` says to `path` inside this block. Each run has a logger of its own, so that two runs in one
    process do not mix."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT))
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()
