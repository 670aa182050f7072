"""Old names lead to new places: each warns once, on the line that uses it, and names the package that is missing."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import apt_model
from apt.core.errors import AptError
from apt_model._moved import Place, moved

DRAFT = {
    "apt.plugins.builtin.moe": ("apt-plugin-moe", "MoERouter", "apt_plugin_moe.router.MoERouter"),
    "apt.plugins.builtin.align": ("apt-plugin-align", "BistateAlign", "apt_plugin_align.align.BistateAlign"),
    "apt.plugins.builtin.retriever": ("apt-plugin-rag", "BM25Retriever", "apt_plugin_rag.retrievers.BM25Retriever"),
    "apt.plugins.builtin.voter": ("apt-core", "EntropyVoter", "apt.builtin.voter.EntropyVoter"),
    "apt.plugins.flash_attn.flash_v2": (
        "apt-plugin-flash",
        "FlashAttentionV2",
        "apt_plugin_flash.flash.FlashAttention",
    ),
    "apt.plugins.quant": ("apt-plugin-quant", "Int8Weights", "apt_plugin_quant.providers.Int8Weights"),
}
"""Import path of the draft -> the package that brings it, one of its names, and where that is now."""


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has imported no module of old names."""
    for name in list(sys.modules):
        if name.startswith(("apt_model.", "apt.plugins.")) and name != "apt_model._moved":
            monkeypatch.delitem(sys.modules, name)
    # What is imported in the test goes with it.
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("apt_model.", "apt.plugins.")):
            del sys.modules[name]


def old_module(monkeypatch: pytest.MonkeyPatch, places: dict[str, Place]) -> ModuleType:
    """A module `old_names` that forwards `places`."""
    module = ModuleType("old_names")
    monkeypatch.setitem(sys.modules, "old_names", module)
    module.__dict__["__getattr__"], module.__dict__["__dir__"] = moved("old_names", places)
    return module


def deprecations(code: str) -> list[tuple[str, int, str]]:
    """(file, line, text) of what running `code`, as the file user.py, warns about."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", DeprecationWarning)
        exec(compile(code, "user.py", "exec"), {})
    return [
        (Path(warning.filename).name, warning.lineno, str(warning.message))
        for warning in told
        if "will be removed in APT" in str(warning.message)
    ]


def test_a_name_warns_once_on_the_line_that_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    old_module(monkeypatch, {"Path": "pathlib:Path", "JSONDecoder": ("json:loads", "json:JSONDecoder")})
    told = deprecations(
        "import old_names\n"
        "from old_names import Path\n"
        "from old_names import Path as again\n"
        "made = old_names.JSONDecoder()\n"
        "made = old_names.JSONDecoder()\n"
        "import json, pathlib\n"
        "assert Path is again is pathlib.Path and isinstance(made, json.JSONDecoder)\n"
    )
    assert told == [
        ("user.py", 2, "old_names.Path will be removed in APT 4.0: use pathlib.Path (docs/migration.md)"),
        ("user.py", 4, "old_names.JSONDecoder will be removed in APT 4.0: use json.loads (docs/migration.md)"),
    ]


def test_nothing_is_imported_before_a_name_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module = old_module(monkeypatch, {"gone": "no_such_module:gone"})
    assert "gone" in dir(module)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        _ = module.gone


def test_what_was_never_there_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    module = old_module(monkeypatch, {"Path": "pathlib:Path"})
    assert deprecations("import old_names\nassert not hasattr(old_names, 'Pth')") == []
    with pytest.raises(AttributeError, match="module 'old_names' has no attribute 'Pth'"):
        _ = module.Pth


def test_a_star_takes_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    old_module(monkeypatch, {"Path": "pathlib:Path", "loads": "json:loads"})
    told = deprecations("from old_names import *\nassert Path('a') and loads('1') == 1")
    assert [line for _, line, _ in told] == [1, 1]


def test_where_the_warning_is_an_error_it_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    module = old_module(monkeypatch, {"Path": "pathlib:Path"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        for _ in range(2):
            with pytest.raises(DeprecationWarning, match=r"old_names\.Path"):
                _ = module.Path


@pytest.mark.parametrize("path", DRAFT)
def test_an_import_path_of_the_draft_leads_to_the_package(path: str, afresh: None) -> None:
    _, name, new = DRAFT[path]
    told = deprecations(f"\nfrom {path} import {name}\nimport {path} as again\nassert again.{name} is {name}\n")
    assert [(file, line) for file, line, _ in told] == [("user.py", 2)]
    assert told[0][2].startswith(f"{path} will be removed in APT 4.0: use ") and new in told[0][2]
    module, _, attribute = new.rpartition(".")
    assert getattr(importlib.import_module(path), name) is getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("path", [path for path, (package, _, _) in DRAFT.items() if package != "apt-core"])
def test_the_package_that_is_missing_is_named(path: str, afresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    package, name, _ = DRAFT[path]
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)  # as if it were not installed
    with pytest.raises(ImportError, match=f"{path} is a package of its own now: {package}; pip install {package}"):
        exec(f"from {path} import {name}")
    with pytest.raises(AptError, match=package):
        importlib.import_module(path)


def test_what_the_package_itself_lacks_is_said_as_it_is(afresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = importlib.import_module("apt.plugins.builtin.moe")
    monkeypatch.setitem(sys.modules, "apt_plugin_moe.router", None)
    with pytest.raises(ModuleNotFoundError, match=r"apt_plugin_moe\.router"):
        _ = module.MoERouter


def test_the_old_package_imports_nothing_that_takes_time() -> None:
    assert apt_model.__doc__
    code = "import sys, apt_model; assert not {'torch', 'pydantic', 'apt.api'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
