"""The conformance kit: tells the author of a provider whether it keeps the contract of its kind.

    from apt.testing import parametrize_with_checks
    from my_package.attention import MyAttention

    @parametrize_with_checks("attention", MyAttention)
    def test_conformance(check):
        check()

`apt plugin-check attention:my_attention` does the same from the command line. docs/conformance.md lists the checks.
Importing this imports neither torch nor pytest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apt.testing.check import Check, CheckFailure, checks_of
from apt.testing.run import Case, Result, cases

if TYPE_CHECKING:
    from apt.testing.parametrize import parametrize_with_checks

__all__ = ["Case", "Check", "CheckFailure", "Result", "cases", "checks_of", "parametrize_with_checks"]


def __getattr__(name: str) -> Any:
    if name == "parametrize_with_checks":
        from apt.testing.parametrize import parametrize_with_checks

        return parametrize_with_checks
    raise AttributeError(f"module 'apt.testing' has no attribute {name!r}")
