"""What an option is given, from its text: a number, a step. What does not fit is said in the option's own error."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def whole_number(least: int) -> Callable[[str], int]:
    """Makes a reader of whole numbers of at least so much."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number, at least {least}, got {text!r}")
        return value

    return parse


def number(text: str) -> float:
    """Any number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def checkpoint(text: str) -> str | int:
    """best, last, or the steps behind a checkpoint, as 200 or as step-00000200."""
    if text in ("best", "last"):
        return text
    steps = text.removeprefix("step-")
    if steps.isascii() and steps.isdigit():
        return int(steps)
    raise argparse.ArgumentTypeError(f"expected best, last or a step, got {text!r}")
