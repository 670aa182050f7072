"""What the tests of this package share: the plugin as if pip had installed it, and a small trained run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from small_run import register_for_one_test

from apt_plugin_rag import plugin


class Result(NamedTuple):
    """What a call of the command line came to."""

    code: int
    out: str
    err: str


@pytest.fixture
def apt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], installed: None
) -> Callable[..., Result]:
    """Call the command line in this process, in an empty folder, with this plugin installed."""
    from apt.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        return Result(main([str(argument) for argument in arguments]), *capsys.readouterr())

    return run


@pytest.fixture
def installed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin where it is found by its entry point, and its providers in the registry that scripts use."""
    for variable in ("APT_PLUGINS", "APT_DISABLE_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)
    site = tmp_path_factory.mktemp("site-packages")
    info = site / "apt_plugin_rag-2.0.0a1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: apt-plugin-rag\nVersion: 2.0.0a1\n")
    (info / "entry_points.txt").write_text("[apt.providers]\nrag = apt_plugin_rag.plugin\n")
    monkeypatch.syspath_prepend(site)
    register_for_one_test(monkeypatch, plugin)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three small texts."""
    docs = tmp_path / "docs"
    (docs / "deep").mkdir(parents=True)
    (docs / "bears.txt").write_text("Bears sleep in winter.\n\nA bear eats honey and salmon.\n")
    (docs / "deep" / "birds.md").write_text("# Birds\n\nSwallows fly south in autumn.\n")
    (docs / "notes.jsonl").write_text('{"text": "Honey keeps for years."}\n\n{"text": "Salmon swim upstream."}\n')
    return docs


TEXT = "".join(f"{n} green bottles hanging on the wall\n" for n in range(60))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small character model's run, and its text beside it in text.txt."""
    from apt.training.trainer import Trainer

    home = tmp_path_factory.mktemp("trained")
    (home / "text.txt").write_text(TEXT)
    config = {
        "name": "small",
        "output_dir": str(home / "runs"),
        "model": {"d_model": 16, "num_heads": 2, "num_layers": 1, "max_seq_len": 24, "attention_name": "mha"},
        "data": {"train_path": str(home / "text.txt"), "cache_dir": str(home / "cache"), "tokenizer": "char"},
        "training": {"max_epochs": 1, "max_steps": 12, "batch_size": 8, "learning_rate": 0.01},
        "hardware": {"device": "cpu"},
    }
    trainer = Trainer(config, quiet=True)
    trainer.train()
    return Path(trainer.run_dir)
