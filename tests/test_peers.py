"""The comparison of benchmarks/peers: the fault it makes at a system call, what it tells a power cut by, its table; and
all of it on APT at two operations. The other two trainers are not installed here."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from checkout import ROOT

PEERS = ROOT / "benchmarks" / "peers"
sys.path.append(str(PEERS))

import faults as driver  # noqa: E402
import system_calls  # noqa: E402

needs_the_kernel = pytest.mark.skipif(bool(system_calls.supported()), reason=system_calls.supported() or "it can")


@pytest.fixture
def experiments() -> ModuleType:
    return importlib.import_module("experiments")


WORK = """
import json, os, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from system_calls import Supervisor

root, nth, fault = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
(root / "watched").mkdir(parents=True)
os.chdir(root)

def work():
    code = 0
    try:
        Path("elsewhere").write_text("not counted")
        with open("watched/new", "w") as file:
            file.write("data")
        os.rename("watched/new", "watched/name")
        with open("watched/synced", "w") as file:
            file.write("data")
            file.flush()
            os.fsync(file.fileno())
        os.makedirs("watched/a")
        os.symlink("../name", "watched/a/link")
        Path("watched/a/link").read_text()
        shutil.rmtree("watched/a")
    except OSError as error:
        code = error.errno
    finally:
        os._exit(code)

supervisor = Supervisor([root / "watched"], nth, fault)
code = supervisor.run(work, 30)
if fault == "kill":
    supervisor.ledger.cut_power()
print(json.dumps([code, supervisor.operations]))
"""
OPERATIONS = [
    "openat new",
    "write new",
    "rename new",
    "openat synced",
    "write synced",
    "fsync synced",
    "mkdir a",
    "symlink a/link",
    "unlinkat a/link",
    "rmdir a",
]


def supervised(folder: Path, nth: int, fault: str) -> tuple[int, list[str], dict[str, str]]:
    """Exit code, operations, and {name: text} of the files that are left."""
    command = [sys.executable, "-c", WORK, str(PEERS), str(folder), str(nth), fault]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    code, operations = json.loads(done.stdout)
    return code, operations, {path.name: path.read_text() for path in (folder / "watched").iterdir() if path.is_file()}


@needs_the_kernel
def test_every_operation_is_counted_and_nothing_else(tmp_path: Path) -> None:
    code, operations, left = supervised(tmp_path / "run", 0, "none")
    assert (code, operations, left) == (0, OPERATIONS, {"name": "data", "synced": "data"})


@needs_the_kernel
@pytest.mark.parametrize(
    ("nth", "left"),
    [(1, {}), (2, {"new": ""}), (3, {"new": ""}), (4, {"name": ""}), (6, {"name": "", "synced": ""})],
)
def test_the_process_dies_before_the_operation_and_the_power_takes_what_is_not_synced(
    nth: int, left: dict[str, str], tmp_path: Path
) -> None:
    assert supervised(tmp_path / "run", nth, "kill") == (-9, OPERATIONS[:nth], left)


@needs_the_kernel
def test_what_was_synced_outlives_the_power(tmp_path: Path) -> None:
    assert supervised(tmp_path / "run", 7, "kill")[2] == {"name": "", "synced": "data"}


@needs_the_kernel
@pytest.mark.parametrize(("nth", "left"), [(1, {}), (2, {"new": ""}), (4, {"name": "data"}), (9, None)])
def test_a_full_disk_refuses_what_needs_space(nth: int, left: dict[str, str] | None, tmp_path: Path) -> None:
    code, _operations, found = supervised(tmp_path / "run", nth, "ENOSPC")
    assert (code, found) == ((28, left) if left is not None else (0, {"name": "data", "synced": "data"}))


def test_a_rename_takes_along_what_is_not_synced() -> None:
    ledger = system_calls.Ledger()
    ledger.note("write", ["/run/new/a"])
    ledger.note("write", ["/run/old"])
    ledger.note("rename", ["/run/new", "/run/final"])
    assert ledger.unsynced == {"/run/final/a", "/run/old"}
    ledger.note("fsync", ["/run/final/a"])
    ledger.note("rename", ["/run/final/a", "/run/old"])
    assert ledger.unsynced == set(), "what was synced has taken the place of what was not"


def test_the_table_has_a_column_for_each_and_goes_into_the_page() -> None:
    def cell(experiment: str, **more: object) -> dict[str, object]:
        return {"experiment": experiment, "good": 0, "of": 0, "said": "", "wrong": {}} | more

    results = [
        {"name": "A", "versions": {"a": "1", "torch": "2"}, "rows": [cell("kill", good=3, of=4), cell("stop")]},
        {"name": "B", "versions": {"b": "1"}, "rows": [cell("kill", said="4"), cell("stop", good=1, of=1, said="x")]},
    ]
    text = driver.table(results)
    assert (
        text
        == "| fault | A (a 1, torch 2) | B (b 1) |\n|---|---|---|\n| kill | 3 of 4 | 4 |\n| stop | - | 1 of 1; x |\n"
    )
    page = f"before\n{driver.BEGIN}old\n{driver.END}after\n"
    once = driver.put_in(page, text)
    assert text in once and "old" not in once and once.startswith("before\n") and once.endswith("after\n")
    assert driver.put_in(once, text) == once


def test_the_page_holds_a_table_in_which_apt_loses_nothing() -> None:
    shown = driver.PAGE.read_text(encoding="utf-8").partition(driver.BEGIN)[2].partition(driver.END)[0]
    rows = [line.strip("|").split("|") for line in shown.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 20 and all(len(row) == 4 for row in rows)
    counted = [match.groups() for row in rows if (match := re.match(r" (\d+) of (\d+)", row[1]))]
    assert len(counted) >= 13 and all(good == of for good, of in counted)


@pytest.mark.parametrize(("last", "most", "chosen"), [(3, 9, [1, 2, 3]), (9, 3, [1, 5, 9]), (149, 2, [1, 149])])
def test_points_are_spread_from_the_first_to_the_last(
    last: int, most: int, chosen: list[int], experiments: ModuleType
) -> None:
    assert experiments.points(last, most) == chosen


def test_a_file_of_torch_is_a_pickle(experiments: ModuleType, tmp_path: Path) -> None:
    import torch

    torch.save({"x": torch.ones(1)}, tmp_path / "new.pt")
    torch.save({"x": torch.ones(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "text.json").write_text("{}")
    assert [experiments.is_pickle(tmp_path / name) for name in ("new.pt", "old.pt", "text.json")] == [True, True, False]


@needs_the_kernel
def test_apt_survives_what_is_tried_on_all_three(tmp_path: Path) -> None:
    known = {key: value for key, value in os.environ.items() if not key.startswith(("APT_", "COV_"))}
    known |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "packages" / "apt-core" / "src")}
    command = [sys.executable, str(PEERS / "experiments.py"), "apt", "--work", str(tmp_path), "--points", "2"]
    done = subprocess.run([*command, "--only", "dying"], env=known, capture_output=True, text=True)
    if "is no other file system" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert not any(row["wrong"] for row in rows), rows
    counted = [(row["good"], row["of"]) for row in rows if "at a file operation" in row["experiment"]]
    assert len(counted) == 6 and all(1 <= good == of for good, of in counted), rows
