"""A profile cannot be changed, down to what its sections hold: a plugin that tries is told so, and the run is as it
would have been."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from small_run import register_for_one_test, small_config, train

from apt.core.config import RunConfig
from apt.core.errors import AptWarning
from apt.core.frozen import frozen
from apt.core.hooks import MAX_OBSERVER_FAILURES
from apt.core.registry import registry
from apt.modeling.layers.ffn import DefaultFFN

PLAIN = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
CHANGES: dict[type, list[Callable[[Any], Any]]] = {
    dict: [
        lambda d: d.update(a=1), lambda d: d.__setitem__("a", 1), lambda d: d.__delitem__("a"), lambda d: d.clear(),
        lambda d: d.pop("a", None), lambda d: d.popitem(), lambda d: d.setdefault("a", 1), lambda d: d.__ior__({}),
    ],
    list: [
        lambda x: x.append(1), lambda x: x.__setitem__(0, 1), lambda x: x.__delitem__(0), lambda x: x.clear(),
        lambda x: x.extend([1]), lambda x: x.insert(0, 1), lambda x: x.pop(), lambda x: x.remove(1),
        lambda x: x.reverse(), lambda x: x.sort(), lambda x: x.__iadd__([1]), lambda x: x.__imul__(2),
    ],
}  # fmt: skip


def within(value: Any) -> list[Any]:
    """A value and all that lies in it."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value, *(found for item in inner for found in within(item))]


@given(value=PLAIN)
def test_what_is_frozen_reads_as_before_and_cannot_be_changed(value: Any) -> None:
    ours = frozen(value)
    assert ours == value and json.dumps(ours) == json.dumps(value)
    for part in within(ours):
        for kind, changes in CHANGES.items():
            for change in changes if isinstance(part, kind) else ():
                with pytest.raises(TypeError, match=r"cannot be changed; copy\.deepcopy"):
                    change(part)
    assert ours == value
    plain = copy.deepcopy(ours)
    assert plain == value and all(type(part) not in (type(frozen({})), type(frozen([]))) for part in within(plain))
    assert copy.copy(ours) == value


def test_every_mutator_of_dict_and_list_is_refused() -> None:
    """A new Python may bring a new one."""
    for kind in (dict, list):
        ours = type(frozen(kind()))
        more = set(dir(kind)) - set(dir(tuple)) | {"__iadd__", "__ior__"} & set(dir(kind))
        reading = {"keys", "values", "items", "get", "fromkeys", "copy", "__reversed__", "__or__", "__ror__"}
        for name in more - reading:
            assert getattr(ours, name) is not getattr(kind, name), name


def test_a_profile_is_frozen_to_its_bottom_and_holds_nothing_of_what_it_was_made_of() -> None:
    given_sections = {"moe": {"experts": 4, "list": [1, {"deep": 2}]}}
    schedules = {"route_temp": {"start": 1.0, "end": 2.0}}
    config = RunConfig.model_validate({"model": given_sections, "schedules": schedules})
    before = config.model_dump(mode="json")
    changes: list[Callable[[], Any]] = [
        lambda: config.schedules.pop("route_temp"),
        lambda: config.schedules["route_temp"].update(start=0),
        lambda: config.model.moe["list"].append(3),  # type: ignore[attr-defined]
        lambda: config.model.moe["list"][1].clear(),  # type: ignore[attr-defined]
        lambda: config.sections["model"]["moe"].update(experts=8),
        lambda: RunConfig().schedules.update(a=1),
    ]
    for change in changes:
        with pytest.raises(TypeError, match="a profile cannot be changed"):
            change()
    with pytest.raises(ValidationError):
        config.training.seed = 3  # type: ignore[misc]
    given_sections["moe"]["list"].append(9)  # type: ignore[attr-defined]
    schedules["route_temp"]["start"] = 9.0
    assert config.model_dump(mode="json") == before
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


class Meddler:
    """Tries to change the profile wherever it is given one."""

    def on_config_resolved(self, config: Any) -> None:
        config.schedules["route_temp"] = 7.0

    def on_training_start(self, trainer: Any) -> None:
        trainer.config.training.learning_rate = 9.0

    def on_step_start(self, trainer: Any) -> None:
        trainer.config.model.moe.update(experts=99)


def test_a_plugin_that_changes_it_is_told_so_and_changes_nothing(tmp_path: Path) -> None:
    config = small_config(tmp_path, model={"moe": {"enabled": False}}, training={"max_steps": 4}, plugins=[])
    runs = []
    for hooks in ((), (Meddler(),)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AptWarning)
            trainer = train(config, *hooks)
        run = trainer.run_dir
        checkpoint = max((run / "checkpoints").iterdir())
        runs.append([(run / "profile.yaml").read_text(), (checkpoint / "model.safetensors").read_bytes()])
    assert runs[0] == runs[1]
    hooks_that_failed = [failure.hook for failure in trainer.hooks.failures]
    assert hooks_that_failed == ["on_config_resolved", "on_training_start", *["on_step_start"] * MAX_OBSERVER_FAILURES]


class Untidy(DefaultFFN):
    """Changes the section that it is given, which it need not copy."""

    Config = None

    def __init__(self, config: Any = None) -> None:
        config["list"].append(3)
        config["inner"].pop("a")
        super().__init__()
        self.config, self.seen = DefaultFFN.Config(), config

    def get_name(self) -> str:
        return "untidy"


def test_a_providers_section_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_for_one_test(monkeypatch)
    registry.register("ffn", "untidy", Untidy)
    model = {"ffn_name": "untidy", "untidy": {"list": [1], "inner": {"a": 1}}}
    trainer = train(small_config(tmp_path, model=model, training={"max_steps": 1}), strict=True)
    assert trainer.providers["ffn", "untidy"].seen == {"list": [1, 3], "inner": {}}  # type: ignore[attr-defined]
    assert trainer.config.sections["model"]["untidy"] == {"list": [1], "inner": {"a": 1}}
