"""What a user can get wrong: one clear line with the fix, exit code 2, no traceback, and nothing lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkout import Apt

Case = tuple[list[str], tuple[str, ...]]

CASES: dict[str, Case] = {
    "a misspelt key": (["--model.d_modle", "8"], ("command line", "d_modle", "did you mean 'd_model'")),
    "a misspelt section": (["--trainin.max_epochs", "8"], ("trainin", "did you mean 'training'")),
    "a misspelt option": (["--epoch", "8"], ("--epoch", "--epochs")),
    "a wrong type": (["--training.batch_size", "many"], ("training.batch_size", "expected a whole number", "'many'")),
    "a wrong choice": (["--model.norm", "layernrm"], ("model.norm", "'layernorm'")),
    "heads that do not divide": (["--model.d_model", "18", "--model.num_heads", "4"], ("d_model 18", "num_heads")),
    "an r that does not fit": (["--model.tva.r", "3"], ("model.tva.r: 3 does not fit", "r that fit")),
    "an unknown plugin": (["--plugins", "frobnicate"], ("there is no plugin 'frobnicate'",)),
    "a slip of a plugin": (["--plugins", "aling"], ("did you mean 'align'",)),
    "a slip of a provider": (["--model.attention_name", "tva_defalt"], ("did you mean 'tva_default'",)),
    "an unknown dataset": (["--data.dataset", "wikipedia"], ("dataset:wikipedia is not installed",)),
    "a slip of a dataset": (["--data.dataset", "stdlibb"], ("did you mean 'stdlib'",)),
    "an unknown tokenizer": (["--data.tokenizer", "bites"], ("tokenizer:bites",)),
    "a missing provider under --strict": (
        ["--model.attention_name", "flash_v2", "--strict"],
        ("attention:flash_v2 ", " not installed", "apt-plugin-flash[cuda]"),
    ),
    "an unknown device": (["--hardware.device", "toaster"], ("hardware.device", "toaster")),
    "a block longer than the text": (["--model.max_seq_len", "100000"], ("100001", "model.max_seq_len")),
    "a batch larger than the text": (["--training.batch_size", "100000"], ("training.batch_size",)),
    "no text": (["--data.train_path", "nowhere.txt"], ("nowhere.txt does not exist",)),
    "a run that is none": (["--resume", "runs/none-1"], ("runs/none-1",)),
    "not a number": (["--training.learning_rate", ".nan"], ("training.learning_rate",)),
}  # fmt: skip


def one_clear_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert "Traceback" not in done.stderr
    error = done.stderr[done.stderr.index("error: ") :]
    assert len(error.strip().splitlines()) <= 2, "the message, and the fix below it"
    for word in words:
        assert word in error, error


@pytest.mark.parametrize("case", CASES)
def test_a_call_that_cannot_work(apt: Apt, small: Path, case: str) -> None:
    arguments, words = CASES[case]
    one_clear_line(apt("train", "-p", str(small), *arguments, expect=2), *words)
    assert not (small.parent / "runs").exists(), "nothing is left of a run that never began"


def test_an_unknown_profile_and_command(apt: Apt) -> None:
    one_clear_line(apt("train", "-p", "tiny_debgu", expect=2), "tiny_debgu", "did you mean 'tiny_debug'")
    one_clear_line(apt("trian", expect=2), "trian", "did you mean train?")
    one_clear_line(apt("train", expect=2), "profile")
    one_clear_line(apt("plugin-info", "attention", "mhaa", expect=2), "did you mean 'mha'")
    one_clear_line(apt("generate", expect=2), "no run")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

PROFILES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "a YAML bomb": (BOMB, ("bad.yaml:",)),
    "nesting": ("a: " + "[" * 1000, ("bad.yaml:1",)),
    "a duplicate key": ("name: a\nmodel: {}\nname: b\n", ("bad.yaml:3", "name")),
    "a tag": ("name: !!python/object/apply:os.system [ls]\n", ("bad.yaml:1",)),
    "not UTF-8": (b"name: \xff\xfe\n", ("bad.yaml",)),
    "a misspelt key with its line": ("name: a\nmodel:\n  d_modle: 3\n", ("bad.yaml:3: model.d_modle", "'d_model'")),
    "a list": ("- 1\n", ("bad.yaml:1",)),
    "extends nothing": ("extends: no_such\n", ("bad.yaml:1: extends", "no_such")),
}


@pytest.mark.parametrize("case", PROFILES)
def test_a_profile_that_cannot_be_read(apt: Apt, tmp_path: Path, case: str) -> None:
    content, words = PROFILES[case]
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    one_clear_line(apt("train", "-p", "bad.yaml", expect=2), *words)


FILES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "an empty file": ("bad.txt", b"", ("bad.txt is empty",)),
    "a binary file": ("bad.txt", b"\x7fELF\x00\x01\x02" * 100, ("bad.txt", "not text")),
    "invalid UTF-8": ("bad.txt", b"fine so far \xff\n" * 100, ("bad.txt: not UTF-8", "byte 12")),
    "a jsonl line without the field": (
        "bad.jsonl", b'{"text": "one"}\n{"txt": "two"}\n', ("bad.jsonl:2: no field 'text'", "did you mean 'txt'"),
    ),
    "a jsonl line that is no JSON": ("bad.jsonl", b'{"text": "one"}\n{"text": \n', ("bad.jsonl:2: not JSON",)),
    "a set shorter than a block": ("bad.txt", b"short", ("model.max_seq_len",)),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_text_that_cannot_be_read(apt: Apt, small: Path, case: str) -> None:
    name, content, words = FILES[case]
    (small.parent / name).write_bytes(content)
    one_clear_line(apt("train", "-p", str(small), "--data.train_path", name, expect=2), *words)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a real file system of so many bytes; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        if os.getuid() != 0:
            pytest.skip("mounting a small file system needs root")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no small file system can be mounted here: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def test_a_full_disk_while_saving_loses_nothing(apt: Apt, small: Path, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(800_000)
    one = apt("train", "-p", str(small), "--run-dir", str(disk / "run"), "--epochs", "1")
    assert "Training is complete" in one.stdout
    checkpoints = disk / "run/checkpoints"
    before = {path.name for path in checkpoints.iterdir()}
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(bytes(max(free - 40_000, 0)))
    full = apt("train", "--resume", str(disk / "run"), "--epochs", "3", expect=2)
    one_clear_line(full, str(checkpoints), "bytes")
    assert {path.name for path in checkpoints.iterdir()} == before, (
        "the old one stays, and nothing half-written beside it"
    )
    (disk / "filler").unlink()
    assert "Training is complete" in apt("train", "--resume", str(disk / "run"), "--epochs", "3").stdout
