"""A run that takes a second, and what tests do with it: for the tests of every package."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from apt.core.registry import registry
from apt.training.trainer import Trainer

Config = dict[str, Any]

TEXT = "".join(f"{n} green bottles hanging on the wall\n" for n in range(24))
NOTHING: Mapping[str, Any] = MappingProxyType({})


def small_config(
    folder: Path, *, model: Mapping[str, Any] = NOTHING, training: Mapping[str, Any] = NOTHING, **sections: Any
) -> Config:
    """A profile of 6 steps an epoch on a text in `folder`, with dropout, so that the random state matters.

    Args:
        model, training: keys of these sections over those below.
        sections: other keys of the profile.
    """
    text = folder / "text.txt"
    text.write_text(TEXT)
    return {
        "name": "small",
        "output_dir": str(folder / "runs"),
        "model": {"d_model": 16, "num_heads": 2, "num_layers": 2, "max_seq_len": 16, "dropout": 0.1, **model},
        "data": {"train_path": str(text), "cache_dir": str(folder / "cache")},
        "training": {"max_epochs": 3, "batch_size": 8, "log_every": 2, "learning_rate": 0.01, **training},
        "hardware": {"device": "cpu"},
        **sections,
    }


def train(config: Config | str, *hooks: object, **options: Any) -> Trainer:
    """Train quietly, with these objects listening."""
    trainer = Trainer(config, quiet=True, **options)
    for hook in hooks:
        trainer.register_hook(hook)
    trainer.train()
    return trainer


class StopAt:
    """Asks the run to stop after so many steps, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, step: int) -> None:
        if step + 1 == self.step:
            signal.raise_signal(signal.SIGINT)


def register_for_one_test(monkeypatch: pytest.MonkeyPatch, *plugins: Any) -> None:
    """Register what these plugins' modules bring in the registry that scripts use, for the length of one test."""
    registry.list_providers()
    monkeypatch.setattr(registry, "_claims", {key: list(claims) for key, claims in registry._claims.items()})
    for plugin in plugins:
        plugin.apt_register_providers(registry)
