"""A profile whose plugins are not installed: each missing package is named; the run goes on dense, or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fixture_types import Result, RunApt

from apt.core import discovery
from apt.core.discovery import BUILTIN, find_plugins


@pytest.fixture
def without_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the kernel is installed, whatever this environment holds."""
    alone = [plugin for plugin in find_plugins() if plugin.name == BUILTIN]
    monkeypatch.setattr(discovery, "find_plugins", lambda: alone)


def train(run_apt: RunApt, *arguments: str) -> Result:
    """The small profile of experts and alignment, cut down to an instant."""
    return run_apt(
        "train", "-p", "moe_reasoning_small", "--quiet", "--training.max_steps", "2", "--training.eval_batches", "1",
        "--model.num_layers", "1", "--data.stdlib.max_bytes", "60000", "--data.cache_dir", "cache", *arguments,
    )  # fmt: skip


def test_each_missing_package_is_named_and_the_run_is_dense(
    run_apt: RunApt, without_plugins: None, tmp_path: Path
) -> None:
    result = train(run_apt)
    assert (result.code, result.out) == (0, "")
    lines = result.err.splitlines()
    assert all(line.startswith("warning: ") for line in lines)
    absent = [line for line in lines if "the profile's plugins" in line]
    assert len(absent) == 2
    assert "'moe' and 'routing' are not installed" in absent[0] and '"apt-plugin-moe"' in absent[0]
    assert "'align' is not installed" in absent[1] and '"apt-plugin-align"' in absent[1]
    instead = [line for line in lines if "instead" in line]
    assert ["using no router" in line for line in instead] == [True, False], "what it means for the model, once each"
    assert "using no align" in instead[1]
    schedules = [line for line in lines if "has asked for" in line]
    assert len(schedules) == 1 and lines[-1] == schedules[0]
    for key in ("enable_moe_at_epoch", "enable_align_at_epoch", "route_temp", "moe_capacity"):
        assert key in schedules[0]
    beyond = [line for line in lines if "the run ends before it begins" in line]
    assert len(lines) == 5 + len(beyond)
    lock = json.loads((tmp_path / "runs/moe_reasoning_small-1/plugins.lock.json").read_text())
    fallbacks = {slot["requested"] for slot in lock["slots"] if slot["fallback"]}
    assert fallbacks == {"topk_moe", "bistate_default"}


def test_strict_refuses_and_names_the_package(run_apt: RunApt, without_plugins: None, tmp_path: Path) -> None:
    result = train(run_apt, "--strict")
    assert (result.code, result.out) == (2, "")
    assert "plugins 'moe' and 'routing' are not installed" in result.err
    assert "fix: pip install" in result.err and '"apt-plugin-moe"' in result.err
    assert not (tmp_path / "runs").exists()


def test_without_a_choice_of_plugins_the_sections_name_the_package(run_apt: RunApt, without_plugins: None) -> None:
    result = train(run_apt, "--plugins", "builtin")
    assert result.code == 0
    assert "model.moe: kept, but no plugin in use reads it" in result.err
    assert "the profile's plugins" not in result.err


@pytest.mark.parametrize("call", [["rag", "query", "x"], ["generate", "--retrieve", "x"], ["quantize", "run"]])
def test_a_command_or_option_of_an_absent_plugin_names_its_package(
    run_apt: RunApt, without_plugins: None, monkeypatch: pytest.MonkeyPatch, call: list[str]
) -> None:
    import importlib_metadata

    package = "apt-plugin-quant" if call[0] == "quantize" else "apt-plugin-rag"

    def absent(name: str) -> str:
        raise importlib_metadata.PackageNotFoundError(name)

    def present(name: str) -> str:
        return "2.0.0"

    for version, fix in (
        (absent, f'pip install "{package}"'),
        (present, f"{package} brings it, and its plugin is left"),
    ):
        monkeypatch.setattr(importlib_metadata, "version", version)
        result = run_apt(*call)
        assert result.code == 2
        assert f"  fix: {fix}" in result.err
