"""Models that were made elsewhere, as runs: used, and trained from there on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apt.api import ModelBuilder, Trainer, load_run, save_model
from apt.checkpoint.store import CheckpointStore
from apt.core.errors import CheckpointError
from apt.core.runs import RunFolder


@pytest.fixture
def builder(tmp_path: Path) -> ModelBuilder:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} green bottles hanging on the wall\n" for n in range(24)))
    return ModelBuilder(
        {
            "model": {"d_model": 16, "num_heads": 2, "num_layers": 1, "max_seq_len": 16},
            "data": {"train_path": str(text), "cache_dir": str(tmp_path / "cache")},
            "training": {"max_steps": 2, "batch_size": 4},
            "hardware": {"device": "cpu"},
        }
    )


def save(path: Path, builder: ModelBuilder) -> RunFolder:
    tokenizer: Any = builder.in_use.use("tokenizer", "byte", lambda provider: provider.build(lambda: []))
    return save_model(path, builder, builder.build_model(256), tokenizer)


def test_it_opens_as_it_was(tmp_path: Path, builder: ModelBuilder) -> None:
    torch.manual_seed(1)
    run = save(tmp_path / "run", builder)
    torch.manual_seed(1)
    wanted = builder.build_model(256).state_dict()
    loaded = load_run(run)
    assert loaded.step == 0
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.model.state_dict().items())
    with pytest.raises(CheckpointError, match="exists already"):
        save(tmp_path / "run", builder)


@pytest.mark.filterwarnings("error::apt.core.errors.AptWarning")
def test_a_training_begins_with_its_weights(tmp_path: Path, builder: ModelBuilder) -> None:
    run = save(tmp_path / "run", builder)
    given = load_run(run).model.state_dict()

    class First:
        weights: dict[str, torch.Tensor]

        def on_training_start(self, trainer: Any) -> None:
            self.weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}

    first = First()
    trainer = Trainer(run.profile, resume=run, quiet=True)
    trainer.register_hook(first)
    trainer.train()
    assert all(torch.equal(tensor, given[name]) for name, tensor in first.weights.items())
    assert CheckpointStore(run.checkpoints).latest() == 2
    assert load_run(run).step == 2
