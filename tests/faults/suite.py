"""The fault suite: `python tests/faults/suite.py` does all of it and prints the table of docs/faults.md; `--smoke`
takes a few points of each experiment; names of experiments take those alone.

Each experiment prints one row: how many faults, how many of them the run survived as it should, and the worst of what
was lost. The exit code is 1 if any was not survived, and the reasons stand below the table.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import fuzz
import hostile
import hostile_folders
from faulty_files import FaultyFiles
from lab import KILLED, Lab, Row, end_of, last_good, prepare_process
from machines import machines
from plugin_faults import FAULTS, Bench, ages, healthy, plugin_row
from resuming import PLACES, clock, consecutive, fewer, killed, not_finite, position, trainers

from apt.checkpoint.store import MANIFEST, MODEL, STRUCTURE, TENSORS, CheckpointStore
from apt.core.errors import AptWarning, CheckpointError
from apt.core.runs import RunFolder

SMOKE_POINTS = 5
PAGE = 4096
NEEDED = "bytes are needed"
SHARDS = ("model-00000-of-00002.safetensors", "state-00001-of-00002.safetensors")


def points(last: int, smoke: bool) -> Iterator[int]:
    """The numbers of the operations to fail at: all of them, or a few that are spread over them."""
    if not smoke or last <= SMOKE_POINTS:
        yield from range(1, last + 1)
        return
    yield from sorted({1 + round(i * (last - 1) / (SMOKE_POINTS - 1)) for i in range(SMOKE_POINTS)})


def places(operations: list[int], smoke: bool) -> Iterator[tuple[int, int, str]]:
    """The operations of every process to fail at: the process, the number, and both in words."""
    for rank, last in enumerate(operations):
        for nth in points(last, smoke):
            yield rank, nth, f"operation {nth}" + (f" of process {rank}" if len(operations) > 1 else "")


# Dying


def kills(lab: Lab, fault: str, smoke: bool) -> Row:
    """Die at every file operation of a run that saves three times, with rotation; go on; end as if nothing had been."""
    what = {"kill": "SIGKILL", "torn": "SIGKILL in mid-write", "power": "power cut"}[fault]
    if lab.processes > 1 and fault != "power":
        what += f" of one of {lab.processes} processes"
    row = Row(f"{what}, {lab.way}" + (", steps longer than a save" if lab.pause else ""))
    base, whole, watched, operations = rotation(lab)
    for rank, nth, place in places(operations, smoke):
        run = lab.copy(base, "victim")
        for old in lab.folder.glob("unsynced*"):
            old.unlink()
        ledger = lab.folder / "unsynced" if fault == "power" else None
        code, said = lab.train(run, faults=FaultyFiles(watched(run), nth, fault, rank=rank, ledger=ledger))
        if code == 0 and nth > operations[rank] - 3:
            continue  # in the background the last operations may come in another order
        done = lab.steps_done(run)
        if fault == "power":
            for unsynced in lab.folder.glob("unsynced*"):
                cut_power(unsynced)
        good = last_good(run)
        problem = f"exit {code}, not killed: {said}" if code != KILLED else ""
        if good is None:
            problem = problem or "no checkpoint is left"
        begun = max((int(path.name[5:13]) for path in RunFolder(run).checkpoints.glob("step-*")), default=0)
        if begun - (good or 0) > lab.every:
            problem = problem or f"the checkpoint of step {begun} was being written, and the last good one is of {good}"
        lost = done - (good or 0)
        if lost > (2 if lab.asynchronous else 1) * lab.every:
            problem = problem or f"{lost} steps are lost"
        problem = problem or replace(lab, pause=0.0).finish(run, whole)
        row.add(place, problem, lost)
        lab.remove(run)
    return row


def rotation(lab: Lab) -> tuple[Path, str, Callable[[Path], Path], list[int]]:
    """A run that has been stopped at half its way, the end it should come to, the folder whose operations are counted,
    and how many there are in each process from there to the end."""
    whole = lab.folder / "whole"
    base = lab.folder / "base"
    assert lab.train(whole)[0] == 0
    assert lab.train(base, until=lab.steps // 2)[0] == 143

    def watched(run: Path) -> Path:
        # In the background the order of a save's operations is fixed only among themselves.
        return RunFolder(run).checkpoints if lab.asynchronous else run

    operations = []
    for rank in range(lab.processes):
        run, counted = lab.copy(base, "counting"), lab.folder / "counted"
        code, said = lab.train(run, faults=FaultyFiles(watched(run), rank=rank, tally=counted))
        assert code == 0, said
        operations.append(int(counted.read_text()))
    return base, end_of(whole), watched, operations


def cut_power(ledger: Path) -> None:
    """What was written and not synced is empty after the power has gone."""
    for line in ledger.read_text().splitlines():
        path = Path(line)
        if path.is_file():
            path.write_bytes(b"")


def chain(lab: Lab, links: int) -> Row:
    """Killed over and over, resumes of resumes and while resuming, at random operations."""
    row = Row(f"a chain of {links} SIGKILLs")
    rng = random.Random(0)
    whole, run = lab.folder / "whole-chain", lab.folder / "chain"
    assert lab.train(whole)[0] == 0
    assert lab.train(run, until=2)[0] == 143
    killed = 0
    while killed < links:
        before = lab.steps_done(run)
        code, said = lab.train(run, faults=FaultyFiles(run, rng.randint(1, 150), rng.choice(["kill", "torn"])))
        if code == 0:
            break
        killed += 1
        good = last_good(run)
        problem = f"exit {code}: {said}" if code != KILLED else "" if good is not None else "no checkpoint is left"
        row.add(f"link {killed}", problem, max(lab.steps_done(run), before) - (good or 0))
    problem = lab.finish(run, end_of(whole))
    if killed < links:
        problem = f"the run was over after {killed} kills"
    if problem:
        row.survived = 0
        row.wrong.append(f"{row.name}: {problem}")
    return row


def signals(lab: Lab, name: str) -> Row:
    """A signal comes in a save and in between: the run ends with its code, saved. A second one ends it at once."""
    row = Row(f"{name}, once and twice, {lab.way}")
    base, whole, watched, (operations,) = rotation(lab)
    number = getattr(signal, name)
    for nth in points(operations, smoke=True):
        for fault, expected in ((name, 128 + number), (f"{name} {name}", -number)):
            run = lab.copy(base, "victim")
            code, said = lab.train(run, faults=FaultyFiles(watched(run), nth, fault))
            good = last_good(run)
            lost = lab.steps_done(run) - (good or 0)
            # Before the first step and after the last there is nothing to stop, and so nothing to save.
            early, late = lab.steps_done(run) == lab.steps_done(base), good == lab.steps
            right = code == expected or (code == -number and (early or late)) or (code == 0 and late)
            problem = "" if right else f"exit {code} and not {expected}: {said}"
            if fault == name and lost:
                problem = problem or f"{lost} steps are lost"
            problem = problem or lab.finish(run, whole)
            row.add(f"{fault} at operation {nth}", problem, lost)
            lab.remove(run)
    return row


# A disk that fails


def errors(lab: Lab, fault: str, smoke: bool) -> Row:
    """The disk fails at every file operation: the run says so or does without, what was saved stays, and once the disk
    works again the run goes on to the same end."""
    row = Row(f"{fault} at a file operation, {lab.way}")
    base, whole, watched, operations = rotation(lab)
    for rank, nth, place in places(operations, smoke):
        run = lab.copy(base, "victim")
        code, said = lab.train(run, faults=FaultyFiles(watched(run), nth, fault, rank=rank))
        problem = ""
        if code not in (0, 2):
            problem = f"exit {code}: {said}"
        elif code == 2 and (str(run) not in said or "\n" in said):
            problem = f"the message does not name the path: {said}"
        elif code == 2 and fault == "ENOSPC" and "checkpoints" in said and NEEDED not in said:
            problem = f"the message does not say how much is needed: {said}"
        good = last_good(run)
        if good is None:
            problem = problem or "no checkpoint is left"
        lost = lab.steps_done(run) - (good or 0)
        problem = problem or lab.finish(run, whole)
        row.add(place, problem, lost)
        lab.remove(run)
    return row


def small_disk(lab: Lab, smoke: bool) -> Row:
    """A file system of its own fills up, a page earlier from time to time, while a run saves on it."""
    row = Row(f"a tmpfs runs full, {lab.way}")
    whole, base, disk = lab.folder / "whole", lab.folder / "base", lab.folder / "disk"
    assert lab.train(whole)[0] == 0
    assert lab.train(base, until=lab.steps // 2)[0] == 143
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        row.skipped = mounted.stderr.strip()
        return row
    try:
        saved = max(RunFolder(base).checkpoints.iterdir())
        pages = sum(-(-path.stat().st_size // PAGE) for path in saved.iterdir()) + 16  # logs and locks as well
        for free in points(pages, smoke):
            run = disk / "victim"
            shutil.copytree(base, run)
            lab.progress(run).write_text(f"{lab.steps_done(base):<9}")
            ballast = disk / "ballast"
            with ballast.open("wb") as file:
                file.write(bytes(max(shutil.disk_usage(disk).free - free * PAGE, 0)))
            code, said = lab.train(run)
            good = last_good(run)
            problem = ""
            if code == 2 and (str(run) not in said or "\n" in said or ("checkpoints" in said and NEEDED not in said)):
                problem = f"the message lacks the path or the bytes: {said}"
            elif code == 2 and good is None:
                problem = "no checkpoint is left"
            elif code not in (0, 2):
                problem = f"exit {code}: {said}"
            if any(path.suffix == ".tmp" for path in RunFolder(run).checkpoints.iterdir()):
                problem = problem or "what was begun is left"
            ballast.unlink()
            lost = lab.steps_done(run) - (good or 0)
            row.add(f"{free} pages free", problem or lab.finish(run, end_of(whole)), lost)
            lab.remove(run)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return row


# A disk that forgets


def damage(lab: Lab, name: str, smoke: bool) -> Row:
    """Flipped bits, cuts, a file that is missing, empty or another checkpoint's: noticed, and an older one is used. One
    more file than there should be is noticed as well, and does no harm."""
    flips, cuts = (10, 5) if smoke else (200, 50)
    row = Row(f"{name}: {flips} bit flips, {cuts} cuts, missing, extra, empty, swapped")
    run = lab.folder / "damaged"
    if not run.exists():
        assert lab.train(run)[0] == 0
    store = CheckpointStore(RunFolder(run).checkpoints)
    before, last = store.steps()[-2:]
    path = store.folder / f"step-{last:08d}" / name
    other = (store.folder / f"step-{before:08d}" / name).read_bytes()
    whole = path.read_bytes()
    rng = random.Random(name)
    cases: list[tuple[str, bytes | None]] = [("missing", None), ("empty", b""), ("swapped", other)]
    for bit in rng.sample(range(8 * len(whole)), min(flips, 8 * len(whole))):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        cases.append((f"bit {bit}", bytes(flipped)))
    cases += [(f"cut at {size}", whole[:size]) for size in rng.sample(range(1, len(whole)), cuts)]
    for what, data in cases:
        if data is None:
            path.unlink()
        else:
            path.write_bytes(data)
        row.add(what, use_damaged(store, before, last))
        path.write_bytes(whole)
    stray = path.with_name(f"copy-of-{name}")
    stray.write_bytes(whole)
    row.add("extra", load_beside(stray, store, last))
    stray.unlink()
    store.load(last)
    return row


def load_beside(stray: Path, store: CheckpointStore, last: int) -> str:
    """What is wrong with how the store takes it that a checkpoint has a file too many; "" if nothing is."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", AptWarning)
        used = store.load().step
    if used != last:
        return "the checkpoint is not used"
    return "" if any(stray.name in str(warning.message) for warning in told) else "not noticed"


def use_damaged(store: CheckpointStore, before: int, last: int) -> str:
    """What is wrong with how the store takes it that the checkpoint `last` is damaged; "" if nothing is."""
    try:
        store.load(last)
        return "not noticed"
    except CheckpointError:
        pass
    except Exception as error:
        return f"not noticed: {type(error).__name__}: {error}"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", AptWarning)
        used = store.load().step
    return "" if used == before and told else "the one before is not used, or it is not said"


# Files that are not what they should be


def tally(found: tuple[str, list[hostile.Result]]) -> Row:
    """What `hostile` found, as a row."""
    name, results = found
    row = Row(name)
    for case, problem in results:
        row.add(case, problem)
    return row


def changes(name: str, folder: Path, smoke: bool) -> Row:
    """One of the files that are read, changed at random: a result or an error of ours comes out, promptly."""
    row = Row(f"{name}, changed at random")
    times = (20 if smoke else 500) // (10 if name in fuzz.SLOW else 1)
    place = Path(tempfile.mkdtemp(dir=folder)) / "files"
    for number, problem in enumerate(fuzz.problems(fuzz.PARSERS[name], place, times)):
        row.add(f"change {number}", problem)
    return row


def experiments(folder: Path, smoke: bool) -> dict[str, list[Callable[[], Row]]]:
    """{name: what to do}."""

    def lab(name: str, **options: object) -> Lab:
        place = folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return Lab(place, **options)  # type: ignore[arg-type]

    @functools.cache
    def bench() -> Bench:
        return healthy(lab("plugin"))

    files = (MODEL, TENSORS, STRUCTURE, MANIFEST)
    ways = (True, False)
    links = 8 if smoke else 100

    def killing(fault: str) -> list[Callable[[], Row]]:
        return [lambda way=way: kills(lab(fault, asynchronous=way), fault, smoke) for way in ways]  # type: ignore[misc]

    return {
        "kill": [*killing("kill"), lambda: kills(lab("slow", pause=0.2), "kill", smoke)],
        "torn": killing("torn"),
        "power": killing("power"),
        "shards": [
            lambda fault=fault: kills(lab(fault, processes=2), fault, smoke)  # type: ignore[misc]
            for fault in (("power",) if smoke else ("power", "kill"))
        ]
        + ([] if smoke else [lambda: errors(lab("full", processes=2), "ENOSPC", smoke)]),
        "chain": [lambda: chain(lab("chain", every=1, steps=6 * links), links)],
        "signals": [
            lambda name=name, way=way: signals(lab(name, asynchronous=way), name)  # type: ignore[misc]
            for name in ("SIGTERM", "SIGINT", "SIGHUP")
            for way in (ways if name == "SIGTERM" or not smoke else ())
        ],
        "errors": [
            lambda fault=fault, way=way: errors(lab(fault, asynchronous=way), fault, smoke)  # type: ignore[misc]
            for fault in ("ENOSPC", "EIO", "EROFS")
            for way in (ways if fault == "ENOSPC" or not smoke else (False,))
        ],
        "disk": [lambda way=way: small_disk(lab("disk", asynchronous=way), smoke) for way in ways],  # type: ignore[misc]
        "positions": [
            lambda place=place: position(lab("positions", accumulation=2), place, smoke)  # type: ignore[misc]
            for place in PLACES
        ],
        "worlds": [lambda: fewer(lab("fewer"), smoke), lambda: killed(lab("killed"), smoke)],
        "machines": [] if smoke else [lambda: machines(lab("machines"))],
        "finite": [
            lambda policy=policy: not_finite(lab("finite", on_not_finite=policy))  # type: ignore[misc]
            for policy in ("stop", "skip", "rollback")
        ],
        "trainers": [lambda: trainers(lab("trainers"), smoke)],
        "clock": [lambda: clock(lab("clock"))],
        "kept": [
            lambda way=way: consecutive(lab("kept", asynchronous=way, every=1, keep_last=99))  # type: ignore[misc]
            for way in ways
        ],
        "plugins": [lambda fault=fault: plugin_row(bench(), fault, smoke) for fault in FAULTS],  # type: ignore[misc]
        "ages": [
            lambda what=what: ages(lab("ages"), what)  # type: ignore[misc]
            for what in (("align",) if smoke else ("ffn", "align", "listener"))
        ],
        "profiles": [lambda: tally(hostile.profiles(folder / "profiles", smoke))],
        "texts": [
            lambda: tally(hostile.text_that_changes(folder / "changing")),
            *([] if smoke else [lambda: tally(hostile.data(folder / "texts"))]),
        ],
        "folders": [lambda: tally(hostile_folders.folders(folder / "folders"))],
        "fuzz": [
            lambda name=name: changes(name, folder, smoke)  # type: ignore[misc]
            for name in fuzz.PARSERS
            if fuzz.can_be_read(name)
        ],
        "damage": [
            lambda name=name: damage(lab("damage", processes=1 + (name in SHARDS)), name, smoke)  # type: ignore[misc]
            for name in (*files, *(() if smoke else SHARDS))
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(experiments(Path(), smoke=True))
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=", ".join(names))
    parser.add_argument("--smoke", action="store_true", help="a few points of each")
    args = parser.parse_args(argv)
    if unknown := set(args.experiments) - set(names):
        parser.error(f"there is no experiment {', '.join(unknown)}")
    prepare_process()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="apt-faults-") as temporary:
        os.environ["APT_CACHE_DIR"] = str(Path(temporary, "cache"))
        known = experiments(Path(temporary), args.smoke)
        print("| fault | survived | of | steps lost at most | seconds |\n|---|---|---|---|---|", flush=True)
        for name in args.experiments or known:
            for experiment in known[name]:
                started = time.monotonic()
                row = experiment()
                seconds = time.monotonic() - started
                wrong += row.wrong
                if row.skipped:
                    print(f"| {row.name} | not run: {row.skipped} | | | |", flush=True)
                else:
                    print(f"| {row.name} | {row.survived} | {row.tried} | {row.worst} | {seconds:.0f} |", flush=True)
    print(*wrong[:50], sep="\n", end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
