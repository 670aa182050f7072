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
