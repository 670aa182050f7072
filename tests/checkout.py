"""Names that the tests of this folder share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The checkout."""

Apt = Callable[..., subprocess.CompletedProcess[str]]
"""The fixture `apt`."""
