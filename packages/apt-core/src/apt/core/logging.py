"""What `apt` logs, and the run's log file: what the console says in one line stands there with its traceback."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from apt.core.files import only_a_file

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


class _RunLog(logging.FileHandler):
    """What cannot be written is left out: the run says itself what it cannot save, and a full disk must not end it."""

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", opener=only_a_file)

    def handleError(self, record: logging.LogRecord) -> None:
        """The base class would print a traceback."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """What is still in the buffer may not find room either."""
        with suppress(OSError):
            super().close()


@contextmanager
def log_to_file(logger: logging.Logger, path: Path) -> Iterator[None]:
    """Append what `logger` says to `path` inside this block. Each run has a logger of its own, so that two runs in one
    process do not mix.

    Raises:
        OSError: it cannot be written to, or is no file.
    """
    handler = _RunLog(path)
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
