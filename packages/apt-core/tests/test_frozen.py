"""Locks of profiles and runs: what they hold, and what `--frozen` refuses."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixture_types import MakeDistribution, Result, RunApt

HEAD = "from apt.hookspecs import hookimpl\nAPI_VERSION = (1, 0)\n"
LISTENS = HEAD + "@hookimpl\ndef on_step_end(step): ...\n"
PROVIDES = HEAD + (
    "@hookimpl\ndef apt_register_providers(registry):\n"
    "    registry.register('ffn', 'doubled', 'doubled_ffn:Doubled', version='0.1')\n"
)
DOUBLED = """
from apt.modeling.layers.ffn import DefaultFFN

class Doubled(DefaultFFN):
    def get_name(self): return "doubled"
    def get_version(self): return "0.1"
"""
PROFILE = """\
name: small
model: {d_model: 16, num_heads: 2, num_layers: 1, max_seq_len: 16, ffn_name: doubled}
data: {train_path: text.txt, cache_dir: tokens}
training: {max_steps: 2, batch_size: 8, eval_batches: 1}
hardware: {device: cpu}
"""


@pytest.fixture
def install(make_distribution: MakeDistribution) -> Callable[..., Path]:
    """Install the listener and the provider, in versions and with sources of choice."""

    def install(version: str = "1.0", listens: str = LISTENS) -> Path:
        modules = {"listens_plugin": listens}
        make_distribution("apt-listens", version, plugins={"listens": "listens_plugin"}, modules=modules)
        return make_distribution(
            "apt-doubled",
            "0.1",
            plugins={"doubled": "doubled_plugin"},
            modules={"doubled_plugin": PROVIDES, "doubled_ffn": DOUBLED},
        )

    return install


@pytest.fixture
def train(run_apt: RunApt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Train the small profile, in the folder that holds it; nothing but its own plugins is selected."""
    (tmp_path / "small.yaml").write_text(PROFILE)
    (tmp_path / "text.txt").write_text("".join(f"{n} green bottles\n" for n in range(60)))
    monkeypatch.setenv("APT_PLUGINS", "listens doubled")

    def train(*arguments: str, source: tuple[str, ...] = ("-p", "small.yaml")) -> Result:
        return run_apt("train", *source, "--quiet", *arguments)

    return train


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_a_profiles_lock_is_what_the_runs_own_will_be(
    run_apt: RunApt, install: Callable[..., Path], train: Callable[..., Result], tmp_path: Path
) -> None:
    install()
    written = run_apt("plugin-lock", "-p", "small.yaml")
    assert (written.code, written.err) == (0, "")
    assert "Written to small.lock.json" in written.out and "apt train -p small.yaml --frozen" in written.out
    assert not (tmp_path / "runs").exists() and not (tmp_path / "tokens").exists(), "nothing is trained or read"
    lock = read(tmp_path / "small.lock.json")
    assert [plugin["name"] for plugin in lock["plugins"]] == ["builtin", "doubled", "listens"]
    ours = {plugin["name"]: plugin for plugin in lock["plugins"]}
    assert (ours["listens"]["distribution"], ours["listens"]["version"]) == ("apt-listens", "1.0")
    assert all(len(plugin["sha256"]) == 64 for plugin in lock["plugins"])
    assert "listens_plugin" not in sys.modules

    assert train("--frozen") == (0, "", "")
    assert read(tmp_path / "runs/small-1/plugins.lock.json") == lock
    own = str(tmp_path / "runs/small-1/plugins.lock.json")
    assert train("--frozen", own).code == 0, "a run's own lock serves as well"
    more = train("--frozen", "--training.max_steps", "3", source=("--resume", "runs/small-1"))
    assert more.code == 0, "and is the one that is meant where it goes on"


def refused(result: Result, *problems: str, fix: str) -> None:
    assert (result.code, result.out) == (2, "")
    *said, last = result.err.splitlines()
    assert len(said) == len(problems)
    for line, problem in zip(said, problems, strict=True):
        assert problem in line
    assert last.startswith("  fix: ") and fix in last


def test_what_a_lock_does_not_hold_is_refused_before_it_is_imported(
    run_apt: RunApt, install: Callable[..., Path], train: Callable[..., Result], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    site = install()
    assert run_apt("plugin-lock", "-p", "small.yaml").code == 0
    path = tmp_path / "small.lock.json"
    whole = path.read_text()

    lock = read(path)
    lock["plugins"] = [plugin for plugin in lock["plugins"] if plugin["name"] != "listens"]
    path.write_text(json.dumps(lock))
    refused(train("--frozen"), "plugin 'listens' (apt-listens 1.0) is not in small.lock.json", fix="apt plugin-lock")

    path.write_text(whole)
    install(listens=LISTENS + "# another word\n")
    refused(
        train("--frozen"),
        "plugin 'listens' (apt-listens 1.0) has files with SHA-256",
        fix='pip install --force-reinstall --no-deps "apt-listens==1.0"',
    )

    for info in site.glob("apt_listens-*.dist-info/*"):
        info.unlink()
    (site / "apt_listens-1.0.dist-info").rmdir()
    install("1.1")
    refused(
        train("--frozen"),
        "plugin 'listens' (apt-listens 1.1) is here, and small.lock.json holds plugin 'listens' (apt-listens 1.0)",
        fix='pip install "apt-listens==1.0"',
    )

    monkeypatch.setenv("APT_PLUGINS", "doubled")
    refused(
        train("--frozen"),
        "(apt-listens 1.0), which small.lock.json holds, cannot be used: disabled: not among APT_PLUGINS",
        fix='pip install "apt-listens==1.0"',
    )
    assert "listens_plugin" not in sys.modules
    assert not (tmp_path / "runs").exists()


def test_a_plugin_of_a_lock_that_is_not_installed_and_several_faults_at_once(
    run_apt: RunApt, install: Callable[..., Path], train: Callable[..., Result], tmp_path: Path
) -> None:
    install()
    assert run_apt("plugin-lock", "-p", "small.yaml").code == 0
    lock = read(tmp_path / "small.lock.json")
    gone = {"name": "gone", "distribution": "apt-gone", "version": "3", "sha256": None}
    lock["plugins"] = [plugin for plugin in lock["plugins"] if plugin["name"] == "builtin"] + [gone]
    (tmp_path / "other.json").write_text(json.dumps(lock))
    refused(
        train("--frozen", "other.json"),
        "plugin 'gone' (apt-gone 3), which other.json holds, is not installed",
        "plugin 'doubled' (apt-doubled 0.1) is not in other.json",
        "plugin 'listens' (apt-listens 1.0) is not in other.json",
        fix='pip install "apt-gone==3", or write the lock anew: apt plugin-lock -p PROFILE',
    )


def test_a_provider_that_a_lock_does_not_hold_is_refused(
    run_apt: RunApt, install: Callable[..., Path], train: Callable[..., Result], tmp_path: Path
) -> None:
    install()
    assert run_apt("plugin-lock", "-p", "small.yaml").code == 0
    refused(
        train("--frozen", "--model.attention_name", "mha"),
        "attention:mha 1.0.0 (apt-core",
        fix="apt plugin-lock",
    )
    lock = read(tmp_path / "small.lock.json")
    for slot in lock["slots"]:
        slot["version"] = "0.2" if slot["kind"] == "ffn" else slot["version"]
    (tmp_path / "small.lock.json").write_text(json.dumps(lock))
    refused(train("--frozen"), "ffn:doubled 0.1 (apt-doubled 0.1) is in effect", fix="apt plugin-lock")
    assert not (tmp_path / "runs").exists()


def test_where_a_lock_lies_and_what_is_said_where_there_is_none(
    run_apt: RunApt, train: Callable[..., Result], install: Callable[..., Path], tmp_path: Path
) -> None:
    install()
    result = train("--frozen")
    said = "apt train --frozen: there is no lock small.lock.json\n  fix: write one: apt plugin-lock -p small.yaml"
    assert result == (2, "", f"error: {said}\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/own.yml").write_text(PROFILE)
    assert run_apt("plugin-lock", "-p", "deep/own.yml").code == 0
    assert (tmp_path / "deep/own.lock.json").is_file(), "beside the profile"
    assert run_apt("plugin-lock", "-p", "tiny_debug").code == 0
    assert (tmp_path / "tiny_debug.lock.json").is_file(), "here, for one that ships"
    result = run_apt("plugin-lock", "-p", "small.yaml", "--output", "x/y.json", "--model.ffn_name", "default")
    assert "apt train -p small.yaml --model.ffn_name=default --frozen x/y.json" in result.out
    assert [slot["name"] for slot in read(tmp_path / "x/y.json")["slots"] if slot["kind"] == "ffn"] == ["default"]
    (tmp_path / "bad.json").write_text('{"format": 1, "slots": [], "plugins": [{"name": "x"}]}')
    assert train("--frozen", "bad.json").err.startswith("error: bad.json is damaged\n")
    (tmp_path / "file").write_text("")
    said = run_apt("plugin-lock", "-p", "small.yaml", "--output", "file/x.json").err
    assert said.startswith("error: cannot write file/x.json: ") and said.endswith(
        "fix: write it elsewhere: --output FILE\n"
    )
    assert run_apt("plugin-lock").err.startswith("error: apt plugin-lock: needs -p/--profile\n")


def test_the_command_that_comes_next_is_one_that_the_lock_lets_run(
    run_apt: RunApt, install: Callable[..., Path], train: Callable[..., Result]
) -> None:
    install()
    for options in (
        ("--output", "a b.json", "--model.ffn_name", "swiglu", "--model.dropout=0.1"),
        ("--plugins", "doubled", "listens", "--no-plugin", "listens", "--strict"),
        ("--no-plugins", "--model.ffn_name", "default", "--description", "it's small"),
    ):
        written = run_apt("plugin-lock", "-p", "small.yaml", *options)
        assert written.code == 0, written.err
        head, *command = shlex.split(written.out.splitlines()[-1].removeprefix("Next: "))
        assert head == "apt" and ("--strict" in command) == ("--strict" in options)
        assert run_apt(*command, "--quiet") == (0, "", "")


def test_a_fallback_is_part_of_a_lock(
    run_apt: RunApt, install: Callable[..., Path], train: Callable[..., Result], tmp_path: Path
) -> None:
    install()
    absent = ("--model.attention_name", "nobodys_own")
    written = run_apt("plugin-lock", "-p", "small.yaml", *absent)
    assert written.code == 0 and "nobodys_own is not installed; using attention:tva_default instead" in written.err
    slots = {slot["kind"]: slot for slot in read(tmp_path / "small.lock.json")["slots"]}
    assert (slots["attention"]["requested"], slots["attention"]["fallback"]) == ("nobodys_own", True)
    assert train("--frozen", *absent).code == 0
    strict = run_apt("plugin-lock", "-p", "small.yaml", "--strict", *absent)
    assert strict.code == 2 and "nobodys_own is not installed" in strict.err
