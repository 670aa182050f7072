"""The attentions that run anywhere under the conformance kit of core."""

from __future__ import annotations

from typing import Any

from apt.testing import parametrize_with_checks
from apt_plugin_flash.flex import FlexAttention
from apt_plugin_flash.sdpa import SDPAAttention

GROUPED = {"num_kv_heads": 2, "qk_norm": True}


@parametrize_with_checks("attention", SDPAAttention, at_least=67, name="flash_sdpa")
def test_sdpa(check: Any) -> None:
    check()


@parametrize_with_checks("attention", lambda: SDPAAttention(GROUPED), at_least=67, name="flash_sdpa")
def test_sdpa_grouped(check: Any) -> None:
    check()


@parametrize_with_checks("attention", FlexAttention, at_least=67, name="flex")
def test_flex(check: Any) -> None:
    check()
