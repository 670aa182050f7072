"""What pytest loads of apt-core: an option and a marker for the conformance kit's slow checks, and nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

OPTION = "--slow-checks"
MARKER = "slow_check"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--slow-checks`."""
    parser.getgroup("apt").addoption(
        OPTION, action="store_true", help="run the slow checks of APT's conformance kit too (torch.compile)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", f"{MARKER}: a check that takes seconds, run with {OPTION}")


def pytest_collection_modifyitems(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    """Skip what is slow, visibly, unless it is asked for."""
    if config.getoption(OPTION):
        return
    import pytest

    skip = pytest.mark.skip(reason=f"slow: run it with {OPTION}")
    for item in items:
        if item.get_closest_marker(MARKER):
            item.add_marker(skip)
