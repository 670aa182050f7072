"""A plugin that is not to be used is not imported: one that notes every import of itself shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkout import Apt

SENTINEL = """\
import os, sys
with open({witness!r}, "a") as file:
    print(sys.orig_argv[1], file=file)
from apt.hookspecs import hookimpl
API_VERSION = (1, 0)

@hookimpl
def on_step_end(step): ...
"""


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    """The file that the sentinel's import writes to."""
    return tmp_path / "imported.txt"


@pytest.fixture
def site(tmp_path: Path, witness: Path) -> Path:
    """A folder with the sentinel, as pip would leave it."""
    site = tmp_path / "site"
    info = site / "apt_sentinel-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: apt-sentinel\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[apt.providers]\nsentinel = sentinel_plugin\n")
    (site / "sentinel_plugin.py").write_text(SENTINEL.format(witness=str(witness)))
    return site


def test_no_plugins_imports_none(apt: Apt, site: Path, small: Path, witness: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    short = ["--training.max_steps", "2", "--run-dir", run]
    env = {"APT_CACHE_DIR": str(tmp_path / "cache")}  # nobody has looked into it before
    for command in (
        ["train", "--help"],
        ["train", "-p", str(small), *short],
        ["train", "--resume", run, "--training.max_steps", "3"],
        ["generate", run, "--prompt", "1", "--max-tokens", "2"],
        ["eval", run, "--batches", "1"],
        ["plugin-lock", "-p", str(small), "--output", str(tmp_path / "lock.json")],
    ):
        apt(*command, "--no-plugins", path=[site], env=env)
        assert not witness.exists(), f"apt {' '.join(command)} --no-plugins: {witness.read_text()}"
    for command in (["--version"], ["--help"], ["plugin-list"], ["doctor"], ["generate", run, "--max-tokens", "2"]):
        apt(*command, path=[site], env=env | {"APT_PLUGINS": ""})
        assert not witness.exists(), f"APT_PLUGINS= apt {' '.join(command)}: {witness.read_text()}"


def test_whoever_lists_plugins_imports_them_once_and_elsewhere(apt: Apt, site: Path, witness: Path) -> None:
    env = {"APT_CACHE_DIR": str(witness.with_name("cache"))}
    assert "sentinel" in apt("plugin-list", path=[site], env=env).stdout
    lines = witness.read_text().splitlines()
    assert lines == ["-c"], "in a child process that looks into plugins"
    for command in ("plugin-list", "doctor"):
        assert "sentinel" in apt(command, path=[site], env=env).stdout
    apt("--help", path=[site], env=env)
    assert witness.read_text().splitlines() == lines


def test_the_sentinel_notices(apt: Apt, site: Path, small: Path, witness: Path) -> None:
    said = apt("train", "-p", str(small), "--training.max_steps", "1", path=[site])
    assert "Training is complete" in said.stdout
    assert witness.read_text().splitlines()[-1] == "-m", "it listens, so the run itself has imported it"
