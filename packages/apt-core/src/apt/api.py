"""What scripts and plugins may use, in one place. Each name is imported when it is first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apt.core.config import RunConfig
    from apt.core.errors import AptError, AptWarning, ConfigError, FallbackWarning, ProviderError
    from apt.core.profiles import resolve
    from apt.core.registry import Provider, Registry, registry
    from apt.core.schedules import Schedule
    from apt.evaluation.evaluate import evaluate
    from apt.hookspecs import API_VERSION, hookimpl
    from apt.inference.generator import Generator
    from apt.modeling.backbones.gpt import GPT
    from apt.modeling.compose import ModelBuilder
    from apt.training.trainer import Trainer

_HOMES = {
    "API_VERSION": "apt.hookspecs",
    "AptError": "apt.core.errors",
    "AptWarning": "apt.core.errors",
    "ConfigError": "apt.core.errors",
    "FallbackWarning": "apt.core.errors",
    "GPT": "apt.modeling.backbones.gpt",
    "Generator": "apt.inference.generator",
    "ModelBuilder": "apt.modeling.compose",
    "Provider": "apt.core.registry",
    "ProviderError": "apt.core.errors",
    "Registry": "apt.core.registry",
    "RunConfig": "apt.core.config",
    "Schedule": "apt.core.schedules",
    "Trainer": "apt.training.trainer",
    "evaluate": "apt.evaluation.evaluate",
    "hookimpl": "apt.hookspecs",
    "registry": "apt.core.registry",
    "resolve": "apt.core.profiles",
}

__all__ = [
    "API_VERSION",
    "GPT",
    "AptError",
    "AptWarning",
    "ConfigError",
    "FallbackWarning",
    "Generator",
    "ModelBuilder",
    "Provider",
    "ProviderError",
    "Registry",
    "RunConfig",
    "Schedule",
    "Trainer",
    "evaluate",
    "hookimpl",
    "registry",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'apt.api' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
