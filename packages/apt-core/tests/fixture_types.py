"""What the fixtures of conftest.py give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Result(NamedTuple):
    """What a call of the command line came to."""

    code: int
    out: str
    err: str


RunApt = Callable[..., Result]

MakeDistribution = Callable[..., Path]
