"""What `apt` logs, and the run's log file: what the console says in one line stands there with its traceback."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logging.getLogger("apt").addHandler(logging.NullHandler())

_FORMAT = "%(asctime)s %(levelname)s %(message)s"

_set_up: list[logging.Handler] = []
"""What the last `setup_logging` added."""


def get_logger(name: str = "apt") -> logging.Logger:
    """A logger under `apt`; silent unless the program that uses the library configures logging."""
    return logging.getLogger(name if name == "apt" or name.startswith("apt.") else f"apt.{name}")


def setup_logging(log_file: str | Path | None = None, level: int | str = logging.INFO) -> logging.Logger:
    """For scripts that do not configure logging themselves: what `apt` logs goes to standard error from now on, and is
    appended to `log_file`, whose folder is made. A second call replaces the first.

    Returns:
        The logger `apt`.

    Raises:
        OSError: the file cannot be written.
        ValueError: there is no such level.
    """
    logger = get_logger()
    logger.setLevel(level)
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if log_file is not None:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    for handler in _set_up:
        logger.removeHandler(handler)
        handler.close()
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(handler)
    _set_up[:] = handlers
    return logger


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
