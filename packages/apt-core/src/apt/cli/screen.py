"""How the screens of the command line look: aligned columns, and headings that stand out on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}
"""What a model, a file or its name may hold and a terminal would obey."""


def heading(text: str) -> str:
    """`text`, bold where standard output is a terminal that shows colour."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[1m{text}\033[0m"


def columns(rows: Sequence[Sequence[str]], indent: int = 2) -> list[str]:
    """One line for each row, the cells of a column under each other."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        (" " * indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def in_bytes(count: int) -> str:
    """1234567 as "1.2 MB"."""
    for unit, name in UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"
