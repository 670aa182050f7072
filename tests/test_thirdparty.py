"""A third party's distribution, installed beside core: its attention, FFN, loss and command work, and no file of core
knows of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT, Apt


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip installed the toy distribution into."""
    folder = tmp_path_factory.mktemp("site")
    install = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *install, str(ROOT / "tests/thirdparty/apt-toy")], check=True)
    return folder


PARTS = ["--model.attention_name", "toy_linear", "--model.ffn_name", "toy_relu2", "--model.align_name", "toy_zloss"]


def test_it_is_listed_and_its_command_runs(apt: Apt, toy: Path) -> None:
    listing = json.loads(apt("plugin-list", "--json", path=[toy]).stdout)
    plugin = next(entry for entry in listing["plugins"] if entry["name"] == "toy")
    assert (plugin["distribution"], plugin["version"], plugin["status"]) == ("apt-toy", "0.1.0", "ok")
    listed = {f"{kind}:{entry['name']}" for kind, entries in listing["providers"].items() for entry in entries}
    assert {"attention:toy_linear", "ffn:toy_relu2", "align:toy_zloss"} <= listed
    assert "toy-hello" in apt("--help", path=[toy]).stdout
    assert apt("toy-hello", "you", path=[toy]).stdout == "hello you\n"
    assert "toy_linear" not in apt("plugin-list").stdout


def test_its_parts_train_generate_and_are_missed_when_they_are_gone(apt: Apt, toy: Path, small: Path) -> None:
    said = apt("train", "-p", str(small), *PARTS, "--model.toy_linear.eps", "1e-5", path=[toy])
    assert "toy_linear 0.1.0 (apt-toy 0.1.0)" in said.stdout
    run = small.parent / "runs/small-1"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(record["toy_zloss"] > 0 for record in records if record["event"] == "train")
    whole = json.loads((run / "plugins.lock.json").read_text())
    owners = {plugin["name"]: plugin for plugin in whole["plugins"]}
    assert (owners["toy"]["distribution"], owners["toy"]["version"]) == ("apt-toy", "0.1.0")
    assert len(owners["toy"]["sha256"]) == 64, "what pip writes down gives it"
    lock = {slot["kind"]: slot for slot in whole["slots"]}
    assert lock["attention"]["config"] == {"eps": 1e-05}
    assert lock["attention"]["distribution_version"] == "0.1.0"

    text = apt("generate", str(run), "--prompt", "12 green", "--max-tokens", "30", "--seed", "0", path=[toy]).stdout
    assert text.startswith("12 green")

    for gone in ({"path": []}, {"path": [toy], "env": {"APT_DISABLE_PLUGINS": "toy"}}):
        refused = apt("train", "--resume", str(run), "--epochs", "3", expect=2, **gone)
        assert "toy_linear" in refused.stderr
        assert "Traceback" not in refused.stderr
    again = apt("train", "--resume", str(run), "--epochs", "3", path=[toy])
    assert "Epoch 3/3" in again.stdout


def test_without_it_the_defaults_serve_loudly_and_strict_refuses(apt: Apt, small: Path) -> None:
    said = apt("train", "-p", str(small), *PARTS, "--training.max_steps", "2")
    assert "toy_linear is not installed; using attention:tva_default instead" in said.stderr
    assert "toy_zloss is not installed; using no align instead" in said.stderr
    refused = apt("train", "-p", str(small), *PARTS, "--strict", expect=2)
    assert "toy_linear is not installed" in refused.stderr


def test_its_section_is_checked_with_its_own_model(apt: Apt, toy: Path, small: Path) -> None:
    refused = apt("train", "-p", str(small), *PARTS, "--model.toy_linear.epz", "1", path=[toy], expect=2)
    assert "did you mean 'eps'" in refused.stderr
    schema = json.loads(apt("profile", "schema", path=[toy]).stdout)
    assert "toy_linear" in json.dumps(schema)
