"""Schedules: what is switched on when, and the values that change over a run."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import apt
from apt.core.config import RunConfig
from apt.core.errors import ConfigError
from apt.core.schedules import Schedule, faults


def schedule(max_epochs: int = 10, steps_per_epoch: int | None = None, **schedules: Any) -> Schedule:
    made = Schedule({"training": {"max_epochs": max_epochs}, "schedules": schedules})
    made.steps_per_epoch = steps_per_epoch
    return made


def values(made: Schedule, positions: range) -> list[float]:
    found = [made.get_param("x", epoch=n) for n in positions]
    assert all(value is not None for value in found)
    return [value for value in found if value is not None]


def test_the_guide() -> None:
    config = {
        "training": {"max_epochs": 10},
        "schedules": {"enable_moe_at_epoch": 2, "route_temp": {"start": 1.5, "end": 0.8, "by": "epoch"}},
    }
    made = Schedule(config)
    assert made.should_enable_plugin("moe", epoch=1) is False
    assert made.should_enable_plugin("moe", epoch=2) is True
    assert made.get_param("route_temp", epoch=0) == 1.5
    assert made.get_param("route_temp", epoch=5) == pytest.approx(1.15, abs=1e-15)
    assert made.get_param("route_temp", epoch=10) == 0.8
    as_profile = Schedule(RunConfig.model_validate(config))
    assert [as_profile.get_param("route_temp", epoch=n) for n in range(12)] == [
        made.get_param("route_temp", epoch=n) for n in range(12)
    ]


def test_what_no_schedule_names() -> None:
    made = schedule(x=3)
    assert made.should_enable_plugin("moe", epoch=0)
    assert made.get_param("y", epoch=0) is None
    assert made.get_param("x") == made.get_param("x", epoch=7, step=9) == 3
    assert Schedule({"training": {"max_epochs": 1}, "schedules": None}).params == ()


# Values


def test_curves_follow_their_formulas() -> None:
    formulas: dict[str, Callable[[float], float]] = {
        "linear": lambda t: 2 + 6 * t,
        "cosine": lambda t: 2 + 6 * (1 - math.cos(math.pi * t)) / 2,
        "exponential": lambda t: 2 * 4**t,
    }
    for curve, formula in formulas.items():
        found = values(schedule(x={"start": 2, "end": 8, "curve": curve}), range(11))
        assert found == pytest.approx([formula(n / 10) for n in range(11)], rel=1e-14)


def test_ranges_and_warm_up() -> None:
    linear = {"start": 0.0, "end": 1.0}
    assert values(schedule(x=linear | {"from_epoch": 2, "to_epoch": 6}), range(8)) == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert values(schedule(4, x=linear | {"warmup_epochs": 2}), range(6)) == [0, 0, 0, 0.5, 1, 1]
    both = linear | {"from_epoch": 1, "warmup_epochs": 1, "to_epoch": 4}
    assert values(schedule(x=both), range(6)) == [0, 0, 0, 0.5, 1, 1]


def test_by_step() -> None:
    made = schedule(2, 50, x={"start": 0.0, "end": 1.0, "by": "step", "from_step": 20, "warmup_steps": 20})
    assert [made.get_param("x", step=n) for n in (0, 40, 55, 70, 100, 10**9)] == [0, 0, 0.25, 0.5, 1, 1]


def test_the_run_may_end_within_its_epochs() -> None:
    config = {
        "training": {"max_epochs": 2, "max_steps": 40},
        "schedules": {"x": {"start": 0.0, "end": 1.0, "by": "step"}},
    }
    made = Schedule(config)
    assert made.get_param("x", step=20) == 0.5  # before anyone knows how long an epoch is
    made.steps_per_epoch = 50
    assert made.get_param("x", step=20) == 0.5
    made.steps_per_epoch = 10
    assert made.get_param("x", step=20) == 1.0


def test_the_length_of_a_run_may_differ_from_that_of_its_epochs() -> None:
    linear = {"start": 0.0, "end": 1.0, "by": "step"}
    made = schedule(2, 50, x=linear, late=linear | {"from_step": 80}, enable_a_at_step=90)
    assert (made.get_param("x", step=50), made.unreached()) == (0.5, [])
    made.total_steps = 80  # it went on with larger batches
    assert [made.get_param("x", step=n) for n in (0, 20, 40, 80, 100)] == [0, 0.25, 0.5, 1, 1]
    assert made.unreached() == ["late", "enable_a_at_step"]
    made.total_steps = 200  # with smaller ones
    assert [made.get_param("x", step=n) for n in (50, 100, 200)] == [0.25, 0.5, 1]
    assert made.unreached() == []


def test_epoch_and_step_stand_for_each_other() -> None:
    linear = {"start": 0.0, "end": 1.0}
    made = schedule(4, 10, x=linear, y=linear | {"by": "step"}, enable_a_at_step=15, enable_b_at_epoch=2)
    assert made.get_param("x", step=25) == made.get_param("x", epoch=2) == made.get_param("y", epoch=2) == 0.5
    assert made.get_param("y", epoch=2, step=30) == 0.75
    assert [made.should_enable_plugin("a", epoch=1, step=n) for n in (14, 15)] == [False, True]
    assert [made.should_enable_plugin("a", epoch=n) for n in (1, 2)] == [False, True]
    assert made.should_enable_plugin("b", epoch=2, step=0)


def test_what_cannot_be_worked_out_is_an_error() -> None:
    made = schedule(x={"start": 0, "end": 1, "by": "step"}, y={"start": 0, "end": 1}, enable_a_at_step=5)
    with pytest.raises(ValueError, match="steps_per_epoch"):
        made.get_param("x", step=1)
    for ask in (
        lambda: made.get_param("x", epoch=1),
        lambda: made.get_param("y", step=1),
        lambda: made.get_param("y"),
        lambda: made.should_enable_plugin("a", epoch=1),
    ):
        with pytest.raises(ValueError, match="goes by"):
            ask()
    assert made.should_enable_plugin("a", epoch=0, step=5)


finite = st.floats(-1e300, 1e300)


@given(
    st.sampled_from(["linear", "cosine", "exponential"]), finite, finite, st.integers(0, 20), st.integers(1, 60),
    st.integers(0, 5),
)  # fmt: skip
def test_values_stay_between_their_ends_and_meet_them(
    curve: str, start: float, end: float, begin: int, length: int, warmup: int
) -> None:
    if curve == "exponential":
        assume(start and end)
        end = math.copysign(end, start)
    to = begin + warmup + length
    config = {"start": start, "end": end, "curve": curve, "from_epoch": begin, "warmup_epochs": warmup, "to_epoch": to}
    found = values(schedule(x=config), range(to + 3))
    assert found[: begin + warmup + 1] == [start] * (begin + warmup + 1)
    assert found[to:] == [end] * 3
    assert all(min(start, end) <= value <= max(start, end) for value in found)
    slack = 1e-12 * max(abs(start), abs(end))
    assert all(b >= a - slack if end >= start else b <= a + slack for a, b in pairwise(found))


@given(st.permutations(range(12)))
def test_the_order_of_asking_does_not_matter(order: list[int]) -> None:
    made = schedule(x={"start": 0.3, "end": 0.1, "curve": "cosine"})
    assert {n: made.get_param("x", epoch=n) for n in order} == dict(enumerate(values(made, range(12))))


# What was read, what is out of reach


def test_unread() -> None:
    made = schedule(5, 10, a=1, b={"start": 0, "end": 1}, enable_x_at_epoch=1, enable_y_at_step=3)
    assert (made.params, made.plugins) == (("b", "a"), ("x", "y"))
    assert made.unread() == ["b", "a", "enable_x_at_epoch", "enable_y_at_step"]
    made.get_param("a")
    made.should_enable_plugin("y", 0)
    made.should_enable_plugin("another", 0)
    assert made.unread() == ["b", "enable_x_at_epoch"]
    made.get_param("b", epoch=0)
    made.should_enable_plugin("x", 0)
    assert made.unread() == []


def test_unreached() -> None:
    linear = {"start": 0, "end": 1}
    made = schedule(
        3, None, a=linear, b=linear | {"from_epoch": 3}, c=linear | {"by": "step", "from_step": 30},
        enable_x_at_epoch=3, enable_y_at_epoch=2, enable_z_at_step=30, constant=4,
    )  # fmt: skip
    assert made.unreached() == ["b", "enable_x_at_epoch"]
    made.steps_per_epoch = 10
    assert made.unreached() == ["b", "c", "enable_x_at_epoch", "enable_z_at_step"]
    made.steps_per_epoch = 11
    assert made.unreached() == ["b", "enable_x_at_epoch"]


# What is refused


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("enable_moe_at_epoch", -1, "schedules.enable_moe_at_epoch: expected a whole number, 0 or greater, got -1"),
        ("enable_moe_at_epoch", True, "got True"),
        ("enable_moe_at_epoch", 2.0, "got 2.0"),
        ("enable_moe_at_step", "2", "got '2'"),
        ("enabel_moe_at_epoch", 2, "did you mean 'enable_moe_at_epoch'?"),
        ("enable_moe_at_epcoh", 2, "did you mean 'enable_moe_at_epoch'?"),
        ("enable_moe_at_steps", 2, "did you mean 'enable_moe_at_step'?"),
        ("enable_moe_epoch", 2, "did you mean 'enable_moe_at_epoch'?"),
        ("enabled_my_moe_at_step", 2, "did you mean 'enable_my_moe_at_step'?"),
        ("disable_moe_at_epoch", 2, "did you mean 'enable_moe_at_epoch'?"),
        ("enable_moe", 2, "did you mean 'enable_moe_at_epoch'?"),
        ("enable_at_epoch", 2, "did you mean 'enable_NAME_at_epoch'?"),
        ("x", "fast", "expected a number, or a mapping with 'start' and 'end', got 'fast'"),
        ("x", None, "got None"),
        ("x", True, "got True"),
        ("x", [1, 2], "got [1, 2]"),
        ("x", math.nan, "got nan"),
        ("x", {"start": 1}, "schedules.x: 'end' is missing"),
        ("x", {"start": "a", "end": 1}, "schedules.x.start: expected a number, got 'a'"),
        ("x", {"start": 0, "end": math.inf}, "schedules.x.end: expected a number, got inf"),
        ("x", {"start": 0, "end": 1, "by": "day"}, "schedules.x.by: expected 'epoch' or 'step', got 'day'"),
        ("x", {"start": 0, "end": 1, "curve": "cosin"}, "did you mean 'cosine'?"),
        ("x", {"start": 0, "end": 1, "curve": 3}, "the curves are linear, cosine, exponential"),
        ("x", {"start": 0, "end": 1, "curv": "linear"}, "schedules.x.curv: unknown key; did you mean 'curve'?"),
        ("x", {"start": 0, "end": 1, "zzz": 3}, "schedules.x.zzz: unknown key"),
        ("x", {"start": 0, "end": 1, "from_step": 3}, "this schedule goes by epoch; write 'by: step'"),
        ("x", {"start": 0, "end": 1, "by": "step", "warmup_epochs": 3}, "goes by step; write 'by: epoch'"),
        ("x", {"start": 0, "end": 1, "to_epoch": 1.5}, "schedules.x.to_epoch: expected a whole number"),
        ("x", {"start": 0, "end": 1, "warmup_epochs": -1}, "expected a whole number"),
        ("x", {"start": 0, "end": 1, "from_epoch": 10**30}, "expected a whole number"),
        ("x", {"start": 0, "end": 1, "from_epoch": 2, "warmup_epochs": 1, "to_epoch": 3}, "does not lie after"),
        ("x", {"start": 0, "end": 1, "curve": "exponential"}, "same sign"),
        ("x", {"start": -1, "end": 1, "curve": "exponential"}, "same sign"),
    ],
)  # fmt: skip
def test_refused(key: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        schedule(**{key: value})
    assert words in str(caught.value)


@pytest.mark.parametrize("key", ["route_temp", "moe_capacity", "stable_weight", "table", "label_at_step", "enable"])
def test_names_that_are_no_slips(key: str) -> None:
    assert schedule(**{key: 1}).get_param(key) == 1


def test_every_fault_is_told() -> None:
    section = {"enable_a_at_epoch": -1, "enable_a_at_step": 1, "x": {"start": "a", "curve": "b"}, "y": "z"}
    assert [fault.path for fault in faults(section)] == [
        ("enable_a_at_epoch",), ("enable_a_at_step",), ("x", "start"), ("x",), ("x", "curve"), ("y",),
    ]  # fmt: skip
    assert [fault.message for fault in faults([1])] == ["expected a mapping, got [1]"]


def test_negative_exponential_and_tiny_ends() -> None:
    assert values(schedule(2, x={"start": -1, "end": -4, "curve": "exponential"}), range(3)) == pytest.approx(
        [-1, -2, -4]
    )
    assert schedule(2, x={"start": 1e-300, "end": 1e-200, "curve": "exponential"}).get_param("x", epoch=1) == (
        pytest.approx(1e-250)
    )


def test_the_length_of_the_run_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"training\.max_epochs is missing"):
        Schedule({"schedules": {}})


def test_importing_is_light() -> None:
    heavy = "{'torch', 'pydantic', 'ruamel.yaml'}"
    code = f"import sys, apt.core.schedules, apt.core.profiles; print({heavy} & {{*sys.modules}})"
    env = {**os.environ, "PYTHONPATH": str(Path(apt.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
