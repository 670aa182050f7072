"""The router under the conformance kit of core, in the configurations that take other paths through its code."""

from __future__ import annotations

from typing import Any

from apt.testing import parametrize_with_checks
from apt_plugin_moe.router import MoERouter

DROPS = {"experts": 3, "overflow": "drop", "capacity": 0.5}
BALANCED = {"balance_loss": 0.0, "bias_rate": 0.001, "z_loss": 0.001, "shared_experts": 1, "jitter": 0.01}


@parametrize_with_checks("router", MoERouter, at_least=32, name="topk_moe")
def test_the_router(check: Any) -> None:
    check()


@parametrize_with_checks("router", lambda: MoERouter(DROPS), at_least=32, name="topk_moe")
def test_the_router_that_drops(check: Any) -> None:
    check()


@parametrize_with_checks("router", lambda: MoERouter(BALANCED), at_least=32, name="topk_moe")
def test_the_router_with_all_else(check: Any) -> None:
    check()
