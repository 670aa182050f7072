"""A file system of its own that is soon full, and a disk that is slow: for the tests of every package."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from apt.checkpoint.store import CheckpointStore, Snapshot


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of so many bytes ("32k", "1m") in a new folder; the test is skipped where it cannot be mounted."""
    folder.mkdir()
    if not shutil.which("mount"):
        pytest.skip("there is no mount command")
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def slow_down_saves(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let every checkpoint take so much longer to write."""
    write = CheckpointStore.write

    def slow(store: CheckpointStore, snapshot: Snapshot) -> Path:
        time.sleep(seconds)
        return write(store, snapshot)

    monkeypatch.setattr(CheckpointStore, "write", slow)
