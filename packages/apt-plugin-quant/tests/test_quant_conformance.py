"""The schemes under the conformance kit of core."""

from __future__ import annotations

from typing import Any

import pytest

from apt.testing import parametrize_with_checks

pytest.importorskip("torchao", reason="torchao is not installed")

from apt_plugin_quant.providers import Int4Weights, Int8Dynamic, Int8Weights


@parametrize_with_checks("quant", Int8Weights, at_least=15, name="int8")
def test_int8(check: Any) -> None:
    check()


@parametrize_with_checks("quant", Int8Dynamic, at_least=15, name="int8_dynamic")
def test_int8_dynamic(check: Any) -> None:
    check()


@parametrize_with_checks("quant", Int4Weights, at_least=15, name="int4")
def test_int4(check: Any) -> None:
    check()
