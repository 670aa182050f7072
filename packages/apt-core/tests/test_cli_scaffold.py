"""`apt plugin-new`: what it is told, what it refuses, and what it writes; that it works is a test across packages."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from fixture_types import MakeDistribution, RunApt
from hypothesis import given
from hypothesis import strategies as st

from apt.cli.scaffold import ENDING, LONGEST, STARTERS, TEMPLATES, Names, names_of, write_plugin
from apt.core.catalogue import KINDS
from apt.core.errors import UsageError

SHORTEST_AND_LONGEST = ("a", "it-is-28-letters-long-indeed")


def test_every_kind_has_a_starter_and_templates() -> None:
    assert list(STARTERS) == list(KINDS)
    assert {path.name for path in TEMPLATES.iterdir()} == {*KINDS, "all"}
    for path in TEMPLATES.rglob("*"):
        assert path.is_dir() or path.name.endswith(ENDING), path


@pytest.mark.parametrize(
    ("name", "plugin", "distribution", "stem"),
    [
        ("window", "window", "apt-window", "Window"),
        ("apt-window", "window", "apt-window", "Window"),
        ("sliding_window", "sliding_window", "apt-sliding-window", "SlidingWindow"),
        ("apt-plugin-top-2", "top_2", "apt-plugin-top-2", "Top2"),
    ],
)
def test_one_name_makes_all_others(name: str, plugin: str, distribution: str, stem: str) -> None:
    assert names_of(name) == Names(plugin, distribution, distribution.replace("-", "_"), stem)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("SlidingWindow", "sliding-window"),
        ("sliding--window", "sliding-window"),
        ("../window", "window"),
        ("window.", "window"),
        ("2-windows", "windows"),
        ("a" * 40, "a" * LONGEST),
        ("", None),
        ("-", None),
        ("fenêtre", None),
        ("x y", "x-y"),
        ("apt", None),
        ("apt-plugin", None),
        ("apt-2", None),
    ],
)
def test_what_is_no_name_is_refused_with_one_that_is(name: str, suggestion: str | None) -> None:
    with pytest.raises(UsageError) as raised:
        names_of(name)
    assert raised.value.hint
    assert (f"did you mean {suggestion}?" in raised.value.hint) == (suggestion is not None)
    if suggestion:
        names_of(suggestion)


@given(st.text(max_size=40))
def test_a_name_is_refused_or_good_for_python_and_pip(name: str) -> None:
    try:
        names = names_of(name)
    except UsageError:
        return
    assert names.package.isidentifier()
    assert names.plugin.isidentifier()
    assert names.stem.isidentifier()
    assert names.package == names.distribution.replace("-", "_") == names.package.lower()


@pytest.mark.parametrize("kind", STARTERS)
@pytest.mark.parametrize("name", SHORTEST_AND_LONGEST)
def test_what_is_written_is_whole_and_clean(kind: str, name: str, tmp_path: Path) -> None:
    names, folder = names_of(name), tmp_path / "new"
    written = write_plugin(names, kind, folder)
    assert {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} == set(written)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == names.distribution
    assert project["entry-points"]["apt.providers"] == {names.plugin: f"{names.package}.plugin"}
    for path in (folder / path for path in written):
        text = path.read_text()
        assert "$" not in text.replace("${{ matrix.python }}", "").replace("+$", ""), path
        if path.suffix == ".py":
            ast.parse(text)
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed")
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        found = subprocess.run([ruff, *command], cwd=folder, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


def test_a_word_more_is_another_name(run_apt: RunApt) -> None:
    assert run_apt("plugin-new", "my-align", "--kind", "align").code == 0


def test_it_says_what_it_has_written_and_what_comes_next(run_apt: RunApt, tmp_path: Path) -> None:
    code, out, err = run_apt("plugin-new", "sliding-window", "--kind", "attention")
    assert (code, err) == (0, "")
    assert "registers it as attention:sliding_window" in out
    *_, first, second, third = out.splitlines()
    assert first == "  pip install -e './apt-sliding-window[test]'"
    assert second == "  pytest apt-sliding-window"
    assert third == "  apt train --profile tiny_debug --model.attention_name sliding_window"
    folder = tmp_path / "apt-sliding-window"
    assert "class SlidingWindowAttention(" in (folder / "src/apt_sliding_window/attention.py").read_text()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    (tmp_path / "made as usual").mkdir()
    assert folder.stat().st_mode == (tmp_path / "made as usual").stat().st_mode

    code, out, _ = run_apt("plugin-new", "my-attention", "--kind", "attention", "--dir", str(tmp_path / "deep/er"))
    assert code == 0
    assert "class MyAttention(" in (tmp_path / "deep/er/src/apt_my_attention/attention.py").read_text()


def test_nothing_is_ever_overwritten(run_apt: RunApt, tmp_path: Path) -> None:
    (tmp_path / "apt-window").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for folder in ("apt-window", "file", "link"):
        code, out, err = run_apt("plugin-new", "window", "--kind", "ffn", "--dir", folder)
        assert (code, out) == (2, "")
        assert f"{folder} exists already" in err
    assert (tmp_path / "file").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


def test_what_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_plugin(names_of("window"), "ffn", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("moe", "router", "the plugin moe exists already"),
        ("mooe", "router", "mooe is so near the plugin moe that"),
        ("core", "ffn", "apt-core exists already"),
        ("plugin-moe", "ffn", "apt-plugin-moe exists already"),
        ("mha", "attention", "attention:mha exists already"),
        ("flash-v22", "attention", "flash_v22 is so near attention:flash_v2 that"),
        ("dropout", "ffn", "model.dropout, its section of a profile, is taken"),
        ("tva", "ffn", "model.tva, its section of a profile, is taken"),
        ("window", "atention", "did you mean attention?"),
        ("window", "loss", "the kinds are attention, ffn"),
    ],
)
def test_names_that_are_taken_are_refused(name: str, kind: str, said: str, run_apt: RunApt, tmp_path: Path) -> None:
    code, out, err = run_apt("plugin-new", name, "--kind", kind)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 2
    assert list(tmp_path.iterdir()) == []


def test_so_are_those_of_installed_plugins(make_distribution: MakeDistribution, run_apt: RunApt) -> None:
    source = """
API_VERSION = (1, 0)
from apt.hookspecs import hookimpl
@hookimpl
def apt_register_providers(registry):
    registry.register("ffn", "theirs", "strangers:FFN")
"""
    make_distribution("apt-strange", plugins={"strangers": "strangers"}, modules={"strangers": source, "apt_mine": ""})
    for name, said in {"strange": "apt-strange", "stranger": "the plugin strangers", "theirs": "ffn:theirs"}.items():
        code, _, err = run_apt("plugin-new", name, "--kind", "ffn")
        assert code == 2
        assert said in err
    code, _, err = run_apt("plugin-new", "mine", "--kind", "ffn")
    assert code == 2
    assert "apt-mine exists already" in err
