"""What a check is, and where the checks of each kind lie.

A check is a function that proves one property of one provider. Its name says the property, its docstring what is proved
and why it matters, and what it raises tells an author what is wrong, in numbers, and where to look.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from apt.core.catalogue import KINDS

F = TypeVar("F", bound=Callable[[Any], None])


class CheckFailure(AssertionError):
    """A provider does not have the property that a check is about."""


class CheckSkipped(Exception):
    """A check finds that it cannot be run here; only the kit itself raises this."""


@dataclass(frozen=True, slots=True)
class Check:
    """One property that providers of a kind have."""

    kind: str
    name: str
    function: Callable[[Any], None]
    needs: tuple[str, ...] = ()
    """What a provider must say it can do; without that the check is skipped."""
    may_refuse: bool = False
    """Whether the request may be refused with a ProviderError or ConfigError; the check is then skipped."""
    slow: bool = False
    """Whether it takes seconds; run only when asked for."""

    @property
    def summary(self) -> str:
        """What it proves and why, as one paragraph."""
        return " ".join((self.function.__doc__ or "").split())

    @property
    def is_unconditional(self) -> bool:
        """Whether every provider of the kind has to run it."""
        return not (self.needs or self.may_refuse or self.slow)


_CHECKS: dict[str, dict[str, Check]] = {}

_LAYERS = ("provider", "layer", "layer_state", "layer_dropout")
_MODULES: dict[str, tuple[str, ...]] = {
    "attention": (
        *_LAYERS,
        "attention",
        "attention_masks",
        "attention_cache",
        "attention_plain",
        "attention_capabilities",
    ),
    "ffn": (*_LAYERS, "ffn"),
    "router": (*_LAYERS, "router"),
    "align": ("provider", "align"),
    "retrieval": ("provider", "retrieval"),
    "voter": ("provider", "voter"),
    "quant": ("provider", "quant"),
    "dataset": ("provider", "dataset"),
    "tokenizer": ("provider", "tokenizer"),
    "tracker": ("provider", "tracker"),
}
"""Kind -> the modules of `apt.testing.checks` that hold its checks, in the order in which they are run."""


def check(
    *kinds: str, needs: str | tuple[str, ...] = (), may_refuse: bool = False, slow: bool = False
) -> Callable[[F], F]:
    """Make a function of a subject (`apt.testing.subjects`) a check of `kinds`, under the function's own name."""

    def add(function: F) -> F:
        for kind in kinds:
            assert kind in KINDS, kind
            known = _CHECKS.setdefault(kind, {})
            assert function.__name__ not in known, f"{kind} has two checks called {function.__name__}"
            wanted = (needs,) if isinstance(needs, str) else needs
            known[function.__name__] = Check(kind, function.__name__, function, wanted, may_refuse, slow)
        return function

    return add


def checks_of(kind: str) -> Mapping[str, Check]:
    """{name: check} of a kind, in the order in which they are run."""
    for module in _MODULES[kind]:
        importlib.import_module(f"apt.testing.checks.{module}")
    return MappingProxyType(_CHECKS[kind])
