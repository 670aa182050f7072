"""Files of which nothing is known yet."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from apt.core.files import open_file, read_file


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one\ntwo\n")
    assert read_file(path) == b"one\ntwo\n"
    with open_file(path) as file:
        assert list(file) == [b"one\n", b"two\n"]
    (tmp_path / "b").symlink_to(path)
    assert read_file(tmp_path / "b") == b"one\ntwo\n"


def test_one_that_is_too_large_is_not(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file:
        file.truncate(2 << 20)
    assert len(read_file(tmp_path / "a", 2 << 20)) == 2 << 20
    with pytest.raises(OSError, match="larger than 1 MiB"):
        read_file(tmp_path / "a", 1 << 20)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pipes and devices of this kind")
def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(OSError, match="it is a pipe or a device") as caught:
            read_file(path)
        assert caught.value.filename == str(path)
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none")
