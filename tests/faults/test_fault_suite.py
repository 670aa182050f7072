"""A few points of every experiment of the fault suite, and a proof that the suite notices what it is there for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the suite reads /proc, and forks")

SUITE = Path(__file__).with_name("suite.py")

BROKEN = {
    "nothing is synced": ("power", "durable.sync = store.sync = lambda path: None"),
    "the old ones go first": (
        "kill",
        "store.CheckpointStore._tidy = lambda self: [shutil.rmtree(old) for old in self._folders().values()]",
    ),
    "hashes are not looked at": ("damage", "manifest.verify = store.verify = trust"),
    "a lock holds nobody off": ("trainers", "import fcntl; fcntl.flock = lambda *_: None"),
}
"""What is wrong with a store: the experiment that shows it, and how it is brought about."""

BREAK = """
import shutil, sys
from apt.checkpoint import durable, manifest, store

def trust(folder, step, *, only=None):
    return manifest.read_manifest(folder, step)

{how}
sys.path.insert(0, {folder!r})
import suite
sys.exit(suite.main(["--smoke", {experiment!r}]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


EXPERIMENTS = {
    "kill torn power chain shards": 9,
    "signals errors damage": 10,
    "disk": 2,
    "positions finite trainers clock kept": 13,
    "plugins ages profiles texts": 14,
}
"""{experiments: their rows}; several to a process, since each imports torch. `worlds` takes most of a minute, and has
tests of its own."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("experiments", EXPERIMENTS)
def test_every_fault_is_survived(experiments: str) -> None:
    done = run(str(SUITE), "--smoke", *experiments.split())
    assert done.returncode == 0, done.stdout + done.stderr
    if skipped := re.search(r"not run: ([^|]+) \|", done.stdout):
        pytest.skip(skipped[1])
    rows = re.findall(r"^\| [^|]+ \| (\d+) \| (\d+) \|", done.stdout, flags=re.MULTILINE)
    assert len(rows) == EXPERIMENTS[experiments], done.stdout
    assert all(survived == tried and int(tried) >= 1 for survived, tried in rows), done.stdout


@pytest.mark.parametrize("what", BROKEN)
def test_the_suite_notices_that(what: str) -> None:
    experiment, how = BROKEN[what]
    done = run("-c", BREAK.format(how=how, folder=str(SUITE.parent), experiment=experiment))
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^\| .*\|\n[^|]", done.stdout, flags=re.MULTILINE), "it says what"
