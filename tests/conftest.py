"""What the tests that cross packages share: the command line as a user has it, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT, Apt


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty home, so that no test sees another one's cache."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def apt(tmp_path: Path, home: Path) -> Apt:
    """`apt("train", "-p", "tiny_debug", path=[...])` runs the command in an empty folder and returns what it said.

    `path` are folders to put in front of the Python path: where a test has installed something. `expect` is the exit
    code that it must end with.
    """

    def run(
        *arguments: str, path: list[Path] | None = None, expect: int | None = 0, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        known = {key: value for key, value in os.environ.items() if not key.startswith(("APT_", "COV_"))}
        source = [str(folder) for folder in (ROOT / "packages").glob("*/src")]
        known |= {
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([*map(str, path or []), *source]),
            "COLUMNS": "120",
        }
        done = subprocess.run(
            [sys.executable, "-m", "apt", *arguments],
            cwd=tmp_path,
            env=known | (env or {}),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert expect is None or done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A profile whose run takes a second."""
    (tmp_path / "text.txt").write_text("".join(f"{n} green bottles hanging on the wall\n" for n in range(40)))
    profile = tmp_path / "small.yaml"
    profile.write_text(
        """\
name: small
model: {d_model: 16, num_heads: 2, num_layers: 2, max_seq_len: 16}
data: {train_path: text.txt}
training: {max_epochs: 2, batch_size: 8, learning_rate: 0.01, log_every: 2}
hardware: {device: cpu}
"""
    )
    return profile
