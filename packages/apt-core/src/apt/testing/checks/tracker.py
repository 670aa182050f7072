"""Tracker: is told of a run, and never gets in its way."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from apt.core.hooks import Hooks, has_hooks
from apt.testing.check import check
from apt.testing.compare import require
from apt.testing.subjects import Subject, skip

CONFIG = {"name": "conformance", "model": {"d_model": 16, "tva": {"r": 4}}, "training": {"learning_rate": 1e-3}}
HOOKS = ("on_training_start", "on_log", "on_training_end", "on_exception")


def record(step: int, **more: Any) -> dict[str, Any]:
    """One record, as a run logs it."""
    return {"event": "train", "step": step, "epoch": 0, "loss": 2.5 - step / 100, **more}


@contextmanager
def started(subject: Subject, step: int = 0, folder: Path | None = None) -> Iterator[tuple[Any, Path]]:
    """A tracker whose run has begun in a folder of its own, finished when the block ends well."""
    with tempfile.TemporaryDirectory() as temporary:
        run_dir = folder or Path(temporary)
        tracker = subject.provider()
        tracker.start(run_dir, copy.deepcopy(CONFIG), step)
        yield tracker, run_dir
        tracker.finish()


def content(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@check("tracker")
def a_run_is_followed(subject: Subject) -> None:
    """start, records of training and of evaluation, finish: nothing is raised, from the first step to a good end."""
    with started(subject) as (tracker, _):
        for step in range(1, 6):
            tracker.log(record(step, learning_rate=1e-3, tokens_per_second=1234.5))
        tracker.log({"event": "eval", "step": 5, "epoch": 0, "val_loss": 2.25})


@check("tracker")
def any_record_is_taken(subject: Subject) -> None:
    """Whatever JSON holds is taken: strings, None, booleans, lists, nested values, huge integers, NaN and infinity, and
    records that have nothing but step and epoch. Plugins add entries of their own, and a loss may turn NaN."""
    odd: dict[str, Any] = {
        "note": "text \u2603",
        "none": None,
        "flag": True,
        "list": [1, 2.5],
        "nested": {"a": {"b": 1}},
        "big": 2**70,
    }
    others: list[dict[str, Any]] = [odd, {"loss": float("nan")}, {"loss": float("inf")}, {"a/b c": 1, "": 2}]
    with started(subject) as (tracker, _):
        for number, more in enumerate(others):
            try:
                tracker.log(record(number, **more))
            except Exception as error:
                shown = repr(more)[:60]
                require(
                    False, f"a record with {shown} raises {type(error).__name__}: {error}; pass over what is no number"
                )
        tracker.log({"event": "eval", "step": 9, "epoch": 1})


@check("tracker")
def records_stay_as_they_are(subject: Subject) -> None:
    """A record and the config are not written to: every tracker and every hook is handed the same ones."""
    given, config = record(1, nested={"a": 1}), copy.deepcopy(CONFIG)
    before = json.dumps([given, config], sort_keys=True)
    with tempfile.TemporaryDirectory() as folder:
        tracker = subject.provider()
        tracker.start(Path(folder), config, 0)
        tracker.log(given)
        tracker.finish()
    after = json.dumps([given, config], sort_keys=True, default=repr)
    require(after == before, f"start or log changes what it is given, {before} to {after}: work on a copy")


@check("tracker")
def the_end_may_come_at_any_time(subject: Subject) -> None:
    """`finish` may come without `start`, twice, and right after it: a run can fail before it has begun, and while it is
    ending."""
    subject.provider().finish()
    with started(subject) as (tracker, _):
        tracker.finish()


@check("tracker")
def a_run_can_be_resumed(subject: Subject) -> None:
    """A second tracker goes on in the same folder from a step in the middle, and may log again what was logged: what is
    there is no reason to fail, and none to begin a new history."""
    with tempfile.TemporaryDirectory() as folder:
        for step in (0, 4):
            with started(subject, step, Path(folder)) as (tracker, _):
                for done in range(step, step + 6):
                    tracker.log(record(done + 1))


@check("tracker")
def what_is_logged_is_kept(subject: Subject) -> None:
    """After `finish` more records have left more in the run's folder: what sits in a buffer when a run ends is lost,
    and it is the part that one wants to see."""
    sizes = []
    for count in (1, 200):
        with tempfile.TemporaryDirectory() as folder:
            with started(subject, folder=Path(folder)) as (tracker, _):
                for step in range(count):
                    tracker.log(record(step, val=step * 0.37))
            sizes.append(content(Path(folder)))
    if not any(sizes):
        skip("it writes nothing into the run's folder")
    require(
        sizes[1] > sizes[0] + 200, f"1 record leaves {sizes[0]:,} bytes and 200 leave {sizes[1]:,}: flush in finish"
    )


@check("tracker")
def a_run_reaches_it_through_its_hooks(subject: Subject) -> None:
    """Called as a run calls it, through the hooks of its interface, it starts, logs and ends: a hook that was renamed
    or overridden without calling `start` and `log` records nothing, and says nothing."""
    provider = subject.provider()
    missing = [name for name in HOOKS if not callable(getattr(provider, name, None))]
    require(not missing, f"it does not listen to {missing}: subclass TrackerProvider, which does")
    require(has_hooks(provider), "it has no hooks: subclass TrackerProvider")
    calls: list[str] = []
    for name in ("start", "log", "finish"):
        original = getattr(provider, name)

        def noted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        setattr(provider, name, noted)
    hooks = Hooks()
    hooks.add(provider)
    with tempfile.TemporaryDirectory() as folder:
        config = SimpleNamespace(model_dump=lambda **_: copy.deepcopy(CONFIG), **CONFIG)
        trainer = SimpleNamespace(run_dir=Path(folder), config=config, step=0, epoch=0)
        hooks.manager.hook.on_training_start(trainer=trainer)
        hooks.manager.hook.on_log(record=record(1))
        hooks.manager.hook.on_training_end(trainer=trainer)
    require(calls == ["start", "log", "finish"], f"a run's beginning, record and end lead to {calls}")
