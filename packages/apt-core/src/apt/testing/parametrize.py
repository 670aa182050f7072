"""The checks of a kind as the cases of one test."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from apt.testing.run import Factory, cases, require_count

COUNT = "count_of_checks"


def parametrize_with_checks(
    kind: str,
    factory: Factory,
    expected_failures: Mapping[str, str] | None = None,
    *,
    at_least: int | None = None,
    name: str | None = None,
    device: str = "cpu",
) -> Any:
    """Run a test once for each check of `kind`: its argument `check` is to be called.

        @parametrize_with_checks("attention", MyAttention, at_least=60)
        def test_conformance(check):
            check()

    Slow checks are run with `pytest --slow-checks`.

    Args:
        kind: the provider's kind.
        factory: builds a fresh provider each time: its class, or a function without arguments.
        expected_failures: {check: why it fails}. One that passes all the same is a failure.
        at_least: how many checks, slow ones not counted, have to be run: a capability that is lost by accident fails.
        name: the name that the provider is registered under, which it must give itself.
        device: where layers are built and run.

    Raises:
        ConfigError: there is no such kind, or an expected failure names no check of it.
    """
    every = cases(kind, factory, expected_failures, name=name, device=device)
    parameters = [
        pytest.param(case, id=case.check.name, marks=[pytest.mark.slow_check] if case.check.slow else [])
        for case in every
    ]
    count: Callable[[], None] = functools.partial(require_count, every, at_least)
    return pytest.mark.parametrize("check", [*parameters, pytest.param(count, id=COUNT)])


__all__ = ["COUNT", "parametrize_with_checks"]
