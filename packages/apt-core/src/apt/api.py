"""What scripts and plugins may use, in one place. Each name is imported when it is first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apt.core.config import RunConfig
    from apt.core.device import free_memory
    from apt.core.errors import (
        AptError,
        AptWarning,
        CheckpointError,
        ConfigError,
        DataError,
        FallbackWarning,
        ProviderError,
    )
    from apt.core.profiles import resolve
    from apt.core.registry import Provider, Registry, registry
    from apt.core.runs import RunFolder, find_run
    from apt.core.schedules import Schedule
    from apt.evaluation.evaluate import evaluate
    from apt.hookspecs import API_VERSION, hookimpl
    from apt.inference.chat import Chat
    from apt.inference.generator import Generator
    from apt.inference.loading import LoadedRun, load_run
    from apt.inference.saving import save_model, save_run
    from apt.modeling.backbones.gpt import GPT
    from apt.modeling.compose import ModelBuilder
    from apt.training.trainer import Trainer

_HOMES = {
    "API_VERSION": "apt.hookspecs",
    "AptError": "apt.core.errors",
    "AptWarning": "apt.core.errors",
    "CheckpointError": "apt.core.errors",
    "ConfigError": "apt.core.errors",
    "DataError": "apt.core.errors",
    "Chat": "apt.inference.chat",
    "FallbackWarning": "apt.core.errors",
    "GPT": "apt.modeling.backbones.gpt",
    "Generator": "apt.inference.generator",
    "LoadedRun": "apt.inference.loading",
    "ModelBuilder": "apt.modeling.compose",
    "Provider": "apt.core.registry",
    "ProviderError": "apt.core.errors",
    "Registry": "apt.core.registry",
    "RunConfig": "apt.core.config",
    "RunFolder": "apt.core.runs",
    "Schedule": "apt.core.schedules",
    "Trainer": "apt.training.trainer",
    "evaluate": "apt.evaluation.evaluate",
    "find_run": "apt.core.runs",
    "free_memory": "apt.core.device",
    "hookimpl": "apt.hookspecs",
    "load_run": "apt.inference.loading",
    "registry": "apt.core.registry",
    "resolve": "apt.core.profiles",
    "save_model": "apt.inference.saving",
    "save_run": "apt.inference.saving",
}

__all__ = [
    "API_VERSION",
    "GPT",
    "AptError",
    "AptWarning",
    "Chat",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FallbackWarning",
    "Generator",
    "LoadedRun",
    "ModelBuilder",
    "Provider",
    "ProviderError",
    "Registry",
    "RunConfig",
    "RunFolder",
    "Schedule",
    "Trainer",
    "evaluate",
    "find_run",
    "free_memory",
    "hookimpl",
    "load_run",
    "registry",
    "resolve",
    "save_model",
    "save_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'apt.api' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
