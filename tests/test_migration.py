"""docs/migration.md is true: each old name is there, warns once with the new place, and the new place exists."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name, walk_packages

import pytest
from checkout import ROOT

import apt.plugins
import apt_model
from apt.core.profiles import resolve

TEXT = (ROOT / "docs/migration.md").read_text(encoding="utf-8")

NAMES = re.findall(r"^\| `(apt_model\.[\w.]+)` \| `([\w.]+)` \|", TEXT, flags=re.MULTILINE)
PATHS = re.findall(r"^\| `(apt\.plugins\.[\w.]+)` \| `([\w.]+)` \| `([\w-]+)` \|$", TEXT, flags=re.MULTILINE)
COMMANDS = re.findall(r"^\| `(python -m apt_model .+?)` \| `(apt .+?)` \|$", TEXT, flags=re.MULTILINE)
OPTIONS = re.findall(r"^\| `(\w+)` \| `((?:model|training)\.[\w.]+)` \|$", TEXT, flags=re.MULTILINE)


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """As in a process in which no old name has been used."""
    before = {name: module for name, module in sys.modules.items() if name.startswith(("apt_model", "apt.plugins"))}
    for name in before:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.startswith(("apt_model", "apt.plugins"))]:
        del sys.modules[name]
    sys.modules.update(before)


def told_by(code: str) -> list[str]:
    """The deprecations of old names in running `code`, all of them on its own lines."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", DeprecationWarning)
        exec(compile(code, "user.py", "exec"), {})
    ours = [warning for warning in told if "will be removed in APT" in str(warning.message)]
    assert {warning.filename for warning in ours} <= {"user.py"}
    return [str(warning.message) for warning in ours]


@pytest.mark.parametrize(("old", "new"), NAMES)
def test_an_old_name_works_and_says_once_where_it_is(old: str, new: str) -> None:
    module, _, name = old.rpartition(".")
    assert told_by(f"from {module} import {name}\nfrom {module} import {name} as again\nassert {name} is again") == [
        f"{old} will be removed in APT 4.0: use {new} (docs/migration.md)"
    ]
    assert callable(resolve_name(new))


@pytest.mark.parametrize(("old", "new", "package"), PATHS)
def test_an_import_path_of_the_draft_works_and_says_once_where_it_is(old: str, new: str, package: str) -> None:
    # Where a name of the module is in the table, it is that which old code imports.
    module, _, name = old.rpartition(".") if old.rpartition(".")[2][0].isupper() else (old, "", "")
    (said,) = told_by(f"import {module}\n" + (f"from {module} import {name}" if name else ""))
    assert said.startswith(f"{module} will be removed in APT 4.0: use {new}")
    assert resolve_name(new) and resolve_name(old)
    assert new.startswith(package.replace("-", "_")) or (package, new[:4]) == ("apt-core", "apt.")


@pytest.mark.filterwarnings("ignore:apt.plugins:DeprecationWarning")
def test_every_old_name_is_in_the_table() -> None:
    modules = ["apt_model", *(module.name for module in walk_packages(apt_model.__path__, "apt_model."))]
    public = [name for name in modules if not re.search(r"\._", name)]
    listed = {f"{name}.{old}" for name in public for old in getattr(importlib.import_module(name), "__all__", ())}
    assert listed == {old for old, _ in NAMES}
    drafts = [module.name for module in walk_packages(apt.plugins.__path__, "apt.plugins.")]
    for name in drafts:
        if name not in ("apt.plugins.builtin", "apt.plugins.flash_attn"):
            assert any(old.startswith(name) for old, _, _ in PATHS), name


def test_a_command_line_becomes_the_one_that_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    translate = importlib.import_module("apt_model._command_line").translate
    monkeypatch.chdir(tmp_path)
    (tmp_path / "F.txt").write_text("a line of text\n" * 20)
    assert len(COMMANDS) == 4
    for old, new in COMMANDS:
        arguments = shlex.split(old.replace(" F ", " F.txt "))[3:]
        assert [shlex.join(["apt", *command]) for command in translate(arguments)] == [new]


def test_an_option_becomes_the_key_that_is_shown() -> None:
    config = importlib.import_module("apt_model.config._options").APTConfig
    before = config().to_profile()
    changed = {
        "d_model": 384, "num_heads": 6, "sr_ratio": 4, "use_autopoietic": False, "dropout": 0.3, "vocab_size": 99,
    }  # fmt: skip
    for option, key in OPTIONS:
        value = getattr(config, option)
        after = config(**{option: changed.get(option, value * 2)}).to_profile()
        *sections, last = key.split(".")
        old, new = (functools.reduce(dict.__getitem__, sections, profile) for profile in (before, after))
        assert old[last] != new[last], option
    reached = {key.partition(".")[2].partition(".")[0] for _, key in OPTIONS}
    assert reached | {"backbone"} == {*before["model"], *before["training"]}
    resolve({"name": "x", **before})
