"""The faults, tried on one trainer: `python experiments.py hf --work DIR` in an environment that has it.

Prints a line of progress per row on stderr, and all rows as JSON in the end. `faults.py` runs this for all three.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import peer
import torch
from peer import Order, Peer, Watch
from system_calls import Supervisor

SECONDS = 60.0
"""What a training, which takes about one, may take."""
TOMORROW = 86_400.0
FLIPS = 100
LOST = "steps lost at most, of these"


@dataclass
class Row:
    """What came of an experiment on one trainer: a cell of the table.

    Attributes:
        good, of: how often it went well, and how often it was tried.
        said: what else is to be told, such as exit codes.
        wrong: why it did not go well: {reason: how often}.
    """

    experiment: str
    good: int = 0
    of: int = 0
    said: str = ""
    wrong: dict[str, int] = field(default_factory=dict)

    def add(self, problem: str | None) -> None:
        """A try, and what was wrong with how it went: "" if nothing."""
        self.of += 1
        self.good += not problem
        if problem:
            self.wrong[problem] = self.wrong.get(problem, 0) + 1


@dataclass
class Outcome:
    """How a training's process ended."""

    code: int
    watch: Watch
    operations: list[str]
    said: str
    cut_power: Callable[[], None]


@dataclass
class Lab:
    """Trains in processes forked from this one, which has imported everything. The run's folder is always the same, for
    checkpoints hold paths.

    Args:
        folder: where everything is made, temporary files too: Lightning writes a checkpoint to one of them first.
    """

    peer: Peer
    folder: Path

    def __post_init__(self) -> None:
        self.run, self.temporary = self.folder / "run", self.folder / "tmp"

    def train(self, order: Order | None = None, nth: int = 0, fault: str = "kill") -> Outcome:
        """Begin the run, or go on with it. `nth` and `fault`: as for `Supervisor`."""
        watch = Watch(order or Order())
        said = self.folder / "said.txt"

        def work() -> None:
            code = 1
            try:
                peer.quiet(said)
                os.environ["TMPDIR"] = tempfile.tempdir = str(self.temporary)
                for name in ("SIGINT", "SIGTERM"):  # they may be ignored where this was started
                    signal.signal(getattr(signal, name), signal.SIG_DFL)
                self.peer.train(self.run, watch.order, watch)
                code = 0
            except BaseException as error:
                traceback.print_exc()
                code = exit_code(error)
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)

        supervisor = Supervisor([self.run, self.temporary], nth, fault)
        try:
            code = supervisor.run(work, SECONDS)
        except TimeoutError:
            code = -signal.SIGALRM
        watch.read()
        text = said.read_text(errors="replace").strip().splitlines() if said.exists() else []
        return Outcome(code, watch, supervisor.operations, text[-1] if text else "", supervisor.ledger.cut_power)

    def begin(self, order: Order) -> Outcome:
        """A run of its own."""
        self.clear()
        return self.train(order)

    def clear(self) -> None:
        """Away with the run, and with temporary files."""
        for folder in (self.run, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)
        self.temporary.mkdir(parents=True)

    @contextmanager
    def temporary_files_in(self, folder: Path | None) -> Iterator[None]:
        """What is trained meanwhile has its temporary files there, in a folder that is gone in the end; None for the
        usual place."""
        usual = self.temporary
        if folder is not None:
            self.temporary = folder
        try:
            yield
        finally:
            self.temporary = usual
            if folder is not None:
                shutil.rmtree(folder)

    def keep(self, name: str) -> Path:
        """A copy of the run as it is now."""
        copy = self.folder / name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.run, copy, symlinks=True)
        return copy

    def restore(self, copy: Path) -> None:
        """Make the run what it was."""
        self.clear()
        shutil.copytree(copy, self.run, symlinks=True)

    def half(self) -> Path:
        """A run that was stopped, saved, at half its way."""
        self.begin(Order(until=peer.STEPS // 2))
        return self.keep("half")

    def finish(self, order: Order | None = None) -> tuple[str, Watch]:
        """Go on with the run; says what was wrong with that, "" if nothing."""
        outcome = self.train(order)
        watch = outcome.watch
        if outcome.code:
            return f"resuming ends with {describe(outcome)}", watch
        if watch.done != peer.STEPS:
            return f"resuming ends at step {watch.done}", watch
        if not watch.finite:
            return "the resumed run ends with numbers that are none", watch
        return ("" if watch.first else "resuming begins at step 0"), watch

    def finish_by_hand(self) -> str:
        """As `finish`, of someone who tries one checkpoint after the other, the newest first."""
        broken = self.keep("broken")
        for checkpoint in self.peer.checkpoints(self.run):
            self.restore(broken)
            if not self.finish(Order(by_hand=checkpoint))[0]:
                return ""
        return "no checkpoint is whole"


def exit_code(error: BaseException) -> int:
    """What Python, or the program that was called, would exit with."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return int(getattr(error, "exit_code", 1))


def describe(outcome: Outcome) -> str:
    if outcome.code < 0:
        return signal.Signals(-outcome.code).name.replace("SIGALRM", "a hang")
    return f"exit {outcome.code}: {outcome.said[:160]}"


def ended(outcome: Outcome) -> str:
    return signal.Signals(-outcome.code).name if outcome.code < 0 else f"exit {outcome.code}"


def points(last: int, most: int) -> list[int]:
    """Numbers from 1 to `last`: all of them, or `most` that are spread over them evenly."""
    if last <= most:
        return list(range(1, last + 1))
    return sorted({1 + round(at * (last - 1) / (most - 1)) for at in range(most)})


# The experiments


def resumed(lab: Lab, most: int) -> Iterator[Row]:
    """Nothing happens but that the run is stopped after a save and resumed. Well: its end is bit for bit that of a run
    that was not stopped."""
    for plain in (False, True):
        row = Row(
            "the same without dropout and shuffling" if plain else "none: stopped after a save, resumed, bit for bit"
        )
        order = Order(plain=plain)
        end = lab.begin(order).watch.end
        for step in range(peer.EVERY, peer.STEPS, peer.EVERY):
            lab.begin(dataclasses.replace(order, until=step))
            problem, watch = lab.finish(order)
            row.add(problem or ("" if watch.end == end else "the end is another one"))
        yield row


def dying(lab: Lab, most: int) -> Iterator[Row]:
    """Killed, or without power, or with a full disk, at each operation of three saves with rotation; then resumed."""
    end = lab.begin(Order()).watch.end
    half = lab.half()
    for fault, offer, temporary in (
        ("SIGKILL", "", None),
        ("SIGKILL, temporary files on another disk,", "", another_disk(lab.folder)),
        ("SIGKILL", "saving in line", None),
        ("power cut", "", None),
        ("power cut", "saving in line", None),
        ("full disk", "", None),
    ):
        name = f"{fault}, {offer}," if offer else fault
        alone, exact, lost = Row(f"{name} at a file operation: resumed"), Row("of these bit for bit"), 0
        by_hand, order = Row("of the others resumed by hand"), Order(offer=offer)
        if offer and offer not in lab.peer.offers:
            yield from (alone, exact, Row(LOST), by_hand)
            continue
        with lab.temporary_files_in(temporary):
            lab.restore(half)
            operations = len(lab.train(order).operations)
            for nth in points(operations, most):
                lab.restore(half)
                outcome = lab.train(order, nth, "ENOSPC" if fault == "full disk" else "kill")
                if fault != "full disk" and outcome.code != -signal.SIGKILL:
                    continue  # a thread saves, and the run made a few operations fewer this time
                if fault == "power cut":
                    outcome.cut_power()
                broken = lab.keep("broken")
                problem, watch = lab.finish(order)
                alone.add(problem)
                if problem:
                    lab.restore(broken)
                    by_hand.add(lab.finish_by_hand())
                else:
                    exact.add("" if watch.end == end else "the end is another one")
                    lost = max(lost, outcome.watch.done - watch.first)
        yield from (alone, exact, Row(LOST, said=str(lost)), by_hand)


def another_disk(folder: Path) -> Path:
    """A folder on another file system than this one.

    Raises:
        RuntimeError: none is known.
    """
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == folder.stat().st_dev:
        raise RuntimeError(f"{memory} is no other file system than that of {folder}: choose another --work")
    return Path(tempfile.mkdtemp(dir=memory, prefix="peers-"))


def damage(lab: Lab, most: int) -> Iterator[Row]:
    """One bit of the newest checkpoint is another. Well: it is noticed, or the end is as if nothing had been."""
    row = Row("one bit of the newest checkpoint flipped: noticed, or without effect")
    half = lab.half()
    lab.restore(half)
    end = lab.train().watch.end
    lab.restore(half)
    files = newest(lab.run)
    rng = random.Random(0)
    for file in rng.choices(files, weights=[file.stat().st_size for file in files], k=min(most, FLIPS)):
        lab.restore(half)
        data = bytearray(file.read_bytes())
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        outcome = lab.train()
        row.add("it is not noticed" if outcome.code == 0 and outcome.watch.end != end else "")
    yield row


def newest(run: Path) -> list[Path]:
    """The files of the newest checkpoint: those that were written since the one before."""
    marks = [path for path in run.rglob("*") if path.is_file() and path.suffix in WEIGHTS]
    last = max(marks, key=lambda path: path.stat().st_mtime_ns)
    return [last] if last.suffix == ".ckpt" else sorted(path for path in last.parent.iterdir() if path.is_file())


WEIGHTS = {".safetensors", ".ckpt"}


def not_a_number(lab: Lab, most: int) -> Iterator[Row]:
    """One loss is NaN. Well: the exit code says so, and what is kept is finite."""
    for offer in ("", "an early stop", "checks for debugging"):
        row = Row(f"the same with {offer}" if offer else "a loss that is NaN: told, and what is kept is finite")
        if offer and offer not in lab.peer.offers:
            yield row
            continue
        codes, kept = set(), []
        for step in (5, 6, 7, 8):
            outcome = lab.begin(Order(nan_at=step, offer=offer))
            codes.add(ended(outcome))
            finite = [all(t.isfinite().all() for t in weights.values()) for weights in lab.peer.kept(lab.run).values()]
            kept += finite
            row.add("" if outcome.code and finite and all(finite) else f"{ended(outcome)}, {sum(finite)} are finite")
        row.said = f"{', '.join(sorted(codes))}; {sum(kept)} of {len(kept)} kept are finite"
        yield row


def told_to_stop(lab: Lab, most: int) -> Iterator[Row]:
    """SIGTERM between two saves. Well: what is done is saved, but for the step under way, and can be gone on from."""
    for offer in ("", "saving at a signal"):
        row = Row(f"the same with {offer}" if offer else "SIGTERM: saved, resumed")
        exact = Row("of these bit for bit")
        if offer and offer not in lab.peer.offers:
            yield from (row, exact)
            continue
        end = lab.begin(Order(every=peer.STEPS)).watch.end
        codes = set()
        for step in (2, 3, 4):
            # Nothing else saves before step 12: the checkpoint is the signal's.
            order = Order(every=peer.STEPS, sigterm_at=step, offer=offer)
            outcome = lab.begin(order)
            codes.add(ended(outcome))
            kept = max(lab.peer.kept(lab.run), default=0)
            if not kept:
                row.add("nothing is saved")
                continue
            problem, watch = lab.finish(dataclasses.replace(order, sigterm_at=None))
            row.add(problem or (f"{lost} steps are lost" if (lost := outcome.watch.done - watch.first) > 1 else ""))
            exact.add("" if watch.end == end else "the end is another one")
        row.said = ", ".join(sorted(codes))
        yield from (row, exact)


def clock(lab: Lab, most: int) -> Iterator[Row]:
    """The clock was a day ahead in the first half. Well: the newest checkpoints are kept."""
    row = Row("a clock that was a day ahead: the newest are kept")
    half = lab.half()
    for until in (8, 10, 12):
        lab.restore(half)
        ahead = time.time() + TOMORROW
        for path in [lab.run, *lab.run.rglob("*")]:
            os.utime(path, (ahead, ahead), follow_symlinks=False)
        lab.train(Order(until=until))
        kept = sorted(lab.peer.kept(lab.run))
        row.add("" if {until, until - peer.EVERY} <= set(kept) else f"after step {until}, {kept} are kept")
    yield row


def pickles(lab: Lab, most: int) -> Iterator[Row]:
    """The files of a checkpoint. Well: it is no pickle. Told besides: whether resuming lets one name what it runs."""
    row = Row("files of a checkpoint that are no pickle")
    lab.restore(lab.half())
    for file in newest(lab.run):
        row.add("a pickle" if is_pickle(file) else "")
    named = lab.folder / "named.txt"
    named.unlink(missing_ok=True)

    class Audited:
        def train(self, run: Path, order: Order, watch: Watch) -> None:
            sys.addaudithook(note)
            real.train(run, order, watch)

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "pickle.find_class":  # torch's restricted reading does not go this way
            with open(named, "a") as file:
                print(*arguments[1:], file=file)

    real, lab.peer = lab.peer, Audited()  # type: ignore[assignment]
    problem, _ = lab.finish()
    lab.peer = real
    row.said = problem or f"{'' if named.exists() else 'none '}read without restriction"
    yield row


def is_pickle(file: Path) -> bool:
    """Whether a file is a pickle, or an archive of torch.save, which holds one."""
    start = file.read_bytes()
    return start[:1] == b"\x80" or (start[:2] == b"PK" and b"data.pkl" in start)


EXPERIMENTS = (resumed, dying, damage, not_a_number, told_to_stop, clock, pickles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=["apt", "hf", "lightning"])
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--points", type=int, default=10**9, help="how many operations, 2 or more, to fail at")
    names = [experiment.__name__ for experiment in EXPERIMENTS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="EXPERIMENT", help=", ".join(names))
    args = parser.parse_args()
    if args.points < 2:
        parser.error("--points must be 2 or more")
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    found: Peer = importlib.import_module(f"peer_{args.peer}").PEER
    lab = Lab(found, args.work.resolve())
    lab.clear()
    gc.freeze()  # what is forked need not copy what is only looked at
    rows = []
    for experiment in EXPERIMENTS:
        if args.only and experiment.__name__ not in args.only:
            continue
        started = time.monotonic()
        for row in experiment(lab, args.points):
            rows.append(dataclasses.asdict(row))
            print(f"{found.name}: {row}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps({"name": found.name, "versions": found.versions(), "rows": rows}))


if __name__ == "__main__":
    main()
