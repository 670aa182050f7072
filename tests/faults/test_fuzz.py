"""A few changes of each kind of file; `suite.py fuzz` makes thousands."""

from __future__ import annotations

import json
import random
from pathlib import Path

import fuzz
import pytest

TIMES = 40


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APT_CACHE_DIR", str(tmp_path / "own-cache"))
    for variable in ("APT_PLUGINS", "APT_DISABLE_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("name", fuzz.PARSERS)
def test_what_is_nearly_right(tmp_path: Path, name: str) -> None:
    if not fuzz.can_be_read(name):
        pytest.skip(f"{fuzz.NEEDS[name]} is not installed")
    times = TIMES // 10 if name in fuzz.SLOW else TIMES
    wrong = [problem for problem in fuzz.problems(fuzz.PARSERS[name], tmp_path / "files", times) if problem]
    assert not wrong, "\n".join(wrong)


def test_a_parser_that_lets_something_else_out_is_noticed(tmp_path: Path) -> None:
    make = fuzz.written("a.json", '{"a": [1, 2]}')
    careless = fuzz.Parser(make, lambda folder: json.loads((folder / "a.json").read_bytes()))
    found = list(fuzz.problems(careless, tmp_path / "files", 40))
    assert 10 < sum(map(bool, found)) < 40
    assert any("JSONDecodeError" in problem for problem in found)


def test_every_change_is_one() -> None:
    rng = random.Random(0)
    whole = b'{"a": [1, 2.5, {"b": null}]}\n' * 3
    assert sum(fuzz.changed(whole, rng) == whole for _ in range(200)) < 10
