"""The cache folders: where they lie, what is cleared, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apt.core import cache
from apt.core.errors import AptWarning


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _put(folder: Path, name: str, size: int, age: float) -> Path:
    path = folder / name
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_root_is_the_first_of_three_that_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache.cache_root() == tmp_path / "cache"
    monkeypatch.setenv("APT_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "apt-core"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_root() == tmp_path / "home" / ".cache" / "apt-core"


def test_clean_removes_what_was_unused_longest_until_it_fits(root: Path) -> None:
    assert cache.size() == 0 and cache.clean() == 0, "before there is a cache at all"
    tokens, others = cache.cache_dir("tokens"), cache.cache_dir("others")
    old, middle, new = _put(tokens, "old", 10, 300), _put(others, "middle", 10, 200), _put(tokens, "new", 10, 100)
    assert cache.size() == 30
    assert cache.clean(max_bytes=20) == 10
    assert [path.exists() for path in (old, middle, new)] == [False, True, True]
    assert cache.clean(older_than=150) == 10
    assert [path.exists() for path in (middle, new)] == [False, True]
    assert cache.clean() == 10 and cache.size() == 0


def test_one_cache_or_another_root_is_sized_and_cleaned_alone(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    kept = [_put(cache.cache_dir("others"), "a", 10, 0), _put(cache.cache_dir("tokens", elsewhere), "b", 20, 0)]
    gone = _put(cache.cache_dir("tokens"), "c", 5, 0)
    (root / "not_ours").mkdir()
    assert cache.names() == ["others", "tokens"] and cache.names(elsewhere) == ["tokens"]
    assert [cache.size(), cache.size("tokens"), cache.size("none"), cache.size(root=elsewhere)] == [15, 5, 0, 20]
    assert cache.clean("tokens") == 5
    assert not gone.exists() and all(path.exists() for path in kept)
    assert cache.clean(root=elsewhere, max_bytes=0) == 20 and kept[0].exists()


def test_clean_touches_nothing_that_the_cache_did_not_make(root: Path) -> None:
    (root / "mine").mkdir(parents=True)
    thesis, loose = root / "mine" / "thesis.txt", root / "loose.txt"
    thesis.write_text("years of work")
    loose.write_text("more of it")
    assert cache.cache_dir("mine") == root / "mine"
    (root / "forged").mkdir()
    (root / "forged" / cache.TAG).write_text("Signature: of somebody else")
    forged = _put(root / "forged", "file", 1, 1e6)
    assert cache.clean() == 0
    assert thesis.exists() and loose.exists() and forged.exists()


def test_clean_leaves_what_is_being_written_and_takes_what_a_dead_process_left(root: Path) -> None:
    folder = cache.cache_dir("tokens")
    running, dead = _put(folder, ".a.tmp", 5, 10), _put(folder, ".b.tmp", 5, 2 * cache.UNFINISHED_SECONDS)
    assert cache.clean() == 5
    assert running.exists() and not dead.exists()


def test_a_folder_that_cannot_be_written_gives_way_to_a_temporary_one_aloud(root: Path) -> None:
    root.write_text("a file where the folder should be")
    with pytest.warns(AptWarning, match="cannot be written.*APT_CACHE_DIR"):
        folder = cache.cache_dir("tokens")
    assert not folder.is_relative_to(root)
    (folder / "works").write_text("yes")
    with pytest.warns(AptWarning):
        assert cache.cache_dir("tokens") == folder, "the same one for the whole process"


def test_an_explicit_root_is_used_without_a_word(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.cache_dir("tokens", tmp_path / "elsewhere") == tmp_path / "elsewhere" / "tokens"


def test_atomic_write_replaces_a_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with cache.atomic_write(path) as file:
        file.write(b"new and longer")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new and longer"
    assert os.listdir(tmp_path) == ["file"]


def _fail(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["fsync", "replace", "body", "interrupt"])
def test_a_write_that_fails_anywhere_leaves_the_old_file_and_no_other(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    failures: dict[str, Callable[[], None]] = {
        "body": _fail,
        "interrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt),
    }
    if where not in failures:
        monkeypatch.setattr(os, where, _fail)
    with pytest.raises((OSError, KeyboardInterrupt)), cache.atomic_write(path) as file:
        file.write(b"new")
        failures.get(where, lambda: None)()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_two_writers_at_once_do_not_clash(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with cache.atomic_write(path) as one, cache.atomic_write(path) as other:
        one.write(b"one")
        other.write(b"other")
    assert path.read_bytes() == b"one", "the last to finish wins"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_write_takes_away_what_a_dead_process_left_of_the_same_file(tmp_path: Path) -> None:
    old = 2 * cache.UNFINISHED_SECONDS
    stale = _put(tmp_path, f".file[1].99-abcd{cache.UNFINISHED}", 5, old)
    kept = [
        _put(tmp_path, f".file[1].99-ef01{cache.UNFINISHED}", 5, 10),  # somebody writes it
        _put(tmp_path, f".file1.99-abcd{cache.UNFINISHED}", 5, old),  # of another file
        _put(tmp_path, f"file[1].mine{cache.UNFINISHED}", 5, old),  # not ours
    ]
    with cache.atomic_write(tmp_path / "file[1]") as file:
        file.write(b"new")
    assert not stale.exists() and all(path.exists() for path in kept)
    assert (tmp_path / "file[1]").read_bytes() == b"new"


def test_who_leaves_at_once_takes_along_what_is_being_written_and_nothing_else(tmp_path: Path) -> None:
    path, done = tmp_path / "file", tmp_path / "done"
    path.write_bytes(b"old")
    with cache.atomic_write(done) as file:
        file.write(b"whole")
    with pytest.raises(FileNotFoundError), cache.atomic_write(path) as file:
        file.write(b"half")
        assert len(os.listdir(tmp_path)) == 3
        cache.remove_unfinished()
        assert sorted(os.listdir(tmp_path)) == ["done", "file"]
    assert (path.read_bytes(), done.read_bytes()) == (b"old", b"whole")
    cache.remove_unfinished()
    assert sorted(os.listdir(tmp_path)) == ["done", "file"]
