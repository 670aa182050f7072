"""The alignment under the conformance kit of core."""

from __future__ import annotations

from typing import Any

from apt.testing import parametrize_with_checks
from apt_plugin_align.align import BistateAlign


@parametrize_with_checks("align", BistateAlign, at_least=16, name="bistate_default")
def test_bistate(check: Any) -> None:
    check()


@parametrize_with_checks(
    "align", lambda: BistateAlign({"alpha": 0.0, "beta": 1.0}), at_least=16, name="bistate_default"
)
def test_the_contrast_alone(check: Any) -> None:
    check()
