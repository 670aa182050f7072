"""The error handler of 1.x: its calls, on the kernel's recovery."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from apt.core.errors import AptWarning, ErrorHandler, is_out_of_memory


class EnhancedErrorHandler(ErrorHandler):
    """Recovers from errors that pass, at most `attempts` times in a row.

    Args:
        checkpoint_manager: its `save_emergency_checkpoint()` is called after memory ran out.
    """

    def __init__(self, logger: logging.Logger | None = None, checkpoint_manager: Any = None) -> None:
        super().__init__(logger=logger)
        self._save = getattr(checkpoint_manager, "save_emergency_checkpoint", None)
        if checkpoint_manager is not None and self._save is None:
            warnings.warn(
                f"{type(checkpoint_manager).__name__} has no save_emergency_checkpoint: nothing is saved when memory "
                "runs out",
                AptWarning,
                stacklevel=2,
            )
        self._handlers: dict[str, Callable[[str, str], object]] = {}

    def register_handler(self, error_pattern: str, handler: Callable[[str, str], object]) -> None:
        """Call `handler(name of the class, message)` for errors in either of which the text stands."""
        self._handlers[error_pattern] = handler

    def handle_exception(self, exception: Exception, context: str = "") -> bool:
        """Say what failed, and recover from it; whether it is worth going on."""
        return self.handle(exception, context)

    def reset_error_counts(self) -> None:
        """As after a success."""
        self.counts.clear()

    def _recovery_from(self, error: Exception) -> Callable[[Exception], object] | None:
        name, message = type(error).__name__, str(error)
        for pattern, handler in self._handlers.items():
            if pattern in name or pattern in message:
                return lambda _: bool(handler(name, message))
        recover, save = super()._recovery_from(error), self._save
        if recover is None or save is None or not is_out_of_memory(error):
            return recover
        return lambda error: (recover(error), save())


class ErrorContext:
    """A block that is left after an error from which `error_handler` recovers.

    Attributes:
        result: `default_return`, until it is set.
    """

    def __init__(
        self,
        error_handler: ErrorHandler | None,
        context: str,
        logger: logging.Logger | None = None,
        default_return: Any = None,
    ) -> None:
        self.error_handler, self.context, self.logger = error_handler, context, logger
        self.result = default_return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if self.error_handler is not None and error is None:
            self.error_handler.counts.clear()
        if not isinstance(error, Exception):
            return False
        if self.error_handler is not None:
            return self.error_handler.handle(error, self.context)
        _log(self.logger, self.context, error)
        return False


def safe_execute(
    func: Callable[[], Any],
    error_handler: ErrorHandler | None = None,
    logger: logging.Logger | None = None,
    context: str = "",
    default_return: Any = None,
) -> Any:
    """The result of `func`, called again after each recovery; `default_return` where it fails."""
    try:
        return func() if error_handler is None else error_handler.run(func, context)
    except Exception as error:
        if error_handler is None:
            _log(logger, context, error)
        return default_return


def _log(logger: logging.Logger | None, context: str, error: Exception) -> None:
    if logger is not None:
        logger.error("%s: %s: %s", context, type(error).__name__, error, exc_info=error)
