"""`apt profile`, `apt doctor`, `apt cache`, and what scripts may call."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import yaml
from fixture_types import MakeDistribution, RunApt

from apt.cli import doctor
from apt.cli.commands import load_profile
from apt.core.cache import cache_dir
from apt.core.catalogue import PROVIDERS
from apt.core.config import RunConfig
from apt.core.errors import ConfigError
from apt.core.profiles import list_profiles
from apt.core.requirements import missing_requirements

# profile


def test_profile_list_shows_each_with_its_line(run_apt: RunApt) -> None:
    result = run_apt("profile", "list")
    assert (result.code, result.err) == (0, "")
    assert [line.split(None, 1) for line in result.out.splitlines()] == [list(row) for row in list_profiles()]
    assert "tiny_debug" in result.out


def test_profile_show_prints_every_key(run_apt: RunApt) -> None:
    result = run_apt("profile", "show", "tiny_debug", "--training.learning_rate", "3e-5", "--model.num_heads=2")
    assert (result.code, result.err) == (0, "")
    shown = yaml.safe_load(result.out)
    assert shown.keys() == RunConfig.model_fields.keys()
    assert (shown["training"]["learning_rate"], shown["model"]["num_heads"]) == (3e-5, 2)
    assert shown["training"].keys() >= set(type(RunConfig().training).model_fields)
    assert RunConfig.model_validate(shown).name == "tiny_debug"


def test_profile_show_tells_what_is_wrong(run_apt: RunApt, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model:\n  tva: {tua: 0.2}\n")
    result = run_apt("profile", "show", "mine.yaml")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: mine.yaml:2: model.tva.tua: unknown key")
    result = run_apt("profile", "show", "tiny_debug", "--model.atention_name", "mha")
    assert result.err.startswith("error: command line: --model.atention_name: unknown key")
    assert run_apt("profile", "show", "tiny_dbug").code == 2


def test_profile_schema_is_json(run_apt: RunApt) -> None:
    schema = json.loads(run_apt("profile", "schema").out)
    assert schema["properties"].keys() >= RunConfig.model_fields.keys()


def test_load_profile_takes_a_path_or_a_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: tiny_debug\ntraining: {max_epochs: 7}\n")
    mine, shipped = load_profile(tmp_path / "mine.yaml"), load_profile("tiny_debug")
    assert mine["training"]["max_epochs"] == 7
    assert mine["model"] == shipped["model"]
    with pytest.raises(ConfigError, match="there is no profile"):
        load_profile(tmp_path / "none.yaml")


# doctor


@pytest.fixture
def small_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("APT_CACHE_DIR", str(folder))
    return folder


def section(text: str, title: str) -> list[str]:
    lines = text.splitlines()
    start = lines.index(title) + 1
    end = next((n for n in range(start, len(lines)) if not lines[n].startswith("  ")), len(lines))
    return lines[start:end]


def test_doctor_shows_what_there_is(run_apt: RunApt, small_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_system_apt", lambda: "/somewhere/apt")
    result = run_apt("doctor")
    assert (result.code, result.err) == (0, "")
    facts = dict(line.strip().split("  ", 1) for line in section(result.out, "System"))
    assert sys.executable in facts["python"]
    assert facts["cache"].strip().startswith(f"{small_home} (")
    assert facts["system's apt"].strip() == "/somewhere/apt"
    versions = dict(line.split() for line in section(result.out, "Versions") if "not installed" not in line)
    assert versions.keys() >= {"apt-core", "torch", "pydantic"}
    hardware = dict(line.strip().split("  ", 1) for line in section(result.out, "Hardware"))
    assert hardware["cpu"] and re.search(r"[\d.]+ GiB, [\d.]+ GiB of them free", hardware["memory"])
    assert re.search(r"[\d.]+ B parameters in training \(16 bytes each\)", hardware["room for"])
    assert any(line.split()[:2] == ["builtin", "ok"] for line in section(result.out, "Plugins"))
    absent = "\n".join(section(result.out, "Not here, and how to get it"))
    present = run_apt("plugin-list").out
    for kind, name in PROVIDERS:
        assert (f"{kind}:{name}" in absent) != (name in present.split())


def test_doctor_names_what_would_fall_back_and_why(
    run_apt: RunApt, small_home: Path, make_distribution: MakeDistribution
) -> None:
    plugin = (
        "from apt.hookspecs import hookimpl\nAPI_VERSION = (1, 0)\n@hookimpl\n"
        "def apt_register_providers(registry):\n"
        "    registry.register('attention', 'toy_fast', 'toy_parts:Fast')\n"
        "    registry.register('router', 'toy_router', 'toy_not_there:Router')\n"
        "    registry.register('dataset', 'toy_data', 'toy_parts:Fast')\n"
        "    registry.register('ffn', 'toy_fine', 'toy_parts:Fine')\n"
    )
    parts = (
        "class Fast:\n    def get_dependencies(self): return ['toy-kernel[cuda]>=2', 'torch>=1', 'torch<0.1']\n"
        "class Fine:\n    def get_dependencies(self): return ['torch>=1', 'not-here; python_version < \"3\"']\n"
    )
    make_distribution("apt-toy", plugins={"toy": "toy_plugin"}, modules={"toy_plugin": plugin, "toy_parts": parts})
    lines = section(run_apt("doctor").out, "Providers")
    assert lines[0].endswith("can be used here, these cannot:")
    at = lines.index("  attention:toy_fast: gives way to attention:tva_default")
    assert lines[at + 1].startswith("    toy-kernel[cuda]>=2 is not installed; torch<0.1 is not met by the installed ")
    assert lines[at + 2] == '    fix: pip install "toy-kernel[cuda]>=2" "torch>=1" "torch<0.1"'
    at = lines.index("  router:toy_router: left out of a run that names it")
    assert "No module named 'toy_not_there'" in lines[at + 1]
    assert lines[at + 2] == "    fix: mend or reinstall apt-toy"
    assert "  dataset:toy_data: stops a run that names it" in lines
    assert "toy_fine" not in "".join(lines)


def test_requirements_that_are_none_are_told() -> None:
    assert missing_requirements(["not a requirement!"]) == [
        ("not a requirement!", "'not a requirement!' is no requirement that pip understands")
    ]


def test_doctor_warns_of_the_systems_own_python(
    run_apt: RunApt, small_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not doctor.is_system_python() or sys.prefix == "/usr"
    monkeypatch.setattr(doctor, "is_system_python", lambda: True)
    result = run_apt("doctor")
    assert result.code == 0
    assert result.err.startswith(f"warning: {sys.executable} is the system's own Python")
    monkeypatch.undo()
    monkeypatch.setattr(sys, "prefix", "/usr")
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    assert doctor.is_system_python()
    monkeypatch.setattr(sys, "prefix", "/home/me/.venv")
    assert not doctor.is_system_python()


# cache


def test_cache_shows_and_cleans_what_there_is(run_apt: RunApt, small_home: Path) -> None:
    assert run_apt("cache").out == f"{small_home}: 0 bytes\n"
    old, new = cache_dir("tokens") / "old", cache_dir("tokenizers") / "new"
    old.write_bytes(bytes(3000))
    new.write_bytes(bytes(20))
    os.utime(old, (time.time() - 3 * 86400,) * 2)
    assert run_apt("cache").out == f"{small_home}: 3.0 kB\n  tokenizers  20 bytes\n  tokens      3.0 kB\n"
    done = run_apt("cache", "--clean", "--older-than", "2.5")
    assert done.out == f"Removed 3.0 kB from {small_home}; 20 bytes are left\n" and new.exists()
    assert run_apt("cache", "--clean", "--at-most", "0.1").out.startswith("Removed 0 bytes")
    assert run_apt("cache", "--clean").out.endswith("; 0 bytes are left\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--older-than", "3"], "--older-than goes with --clean\n  fix: apt cache --clean --older-than 3"),
        (["--clean", "--at-most", "-1"], "--at-most is a number from 0 on, got -1"),
        (["--clean", "--at-most", "nan"], "--at-most is a number from 0 on, got nan"),
        (["--clean", "--at-most", "1GB"], "--at-most: expected a number, got '1GB'\n  fix: see apt cache --help"),
        (["clean"], "one argument too many: 'clean'\n  fix: see apt cache --help"),
    ],
)
def test_cache_is_told_what_to_remove(run_apt: RunApt, arguments: list[str], said: str) -> None:
    result = run_apt("cache", *arguments)
    assert (result.code, result.out, result.err) == (2, "", f"error: apt cache: {said}\n")
