"""A hundred plugins, ten of them broken in ten ways: each is listed with its reason, and training goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from fixture_types import MakeDistribution, RunApt

HEAD = "from apt.hookspecs import hookimpl\nAPI_VERSION = (1, 0)\n"
REGISTERS = "@hookimpl\ndef apt_register_providers(registry):\n    registry.register"
LISTENS = "@hookimpl\ndef on_step_end(step): ...\n"

BROKEN: dict[str, tuple[str | None, str, str]] = {
    "import_error": ("raise ImportError('half an install')", "import-error", "ImportError: half an install"),
    "syntax_error": ("def", "import-error", "SyntaxError"),
    "system_exit": ("raise SystemExit(3)", "import-error", "SystemExit: 3"),
    "endless": ("while True: pass", "import-error", "its import had not ended after 1 s"),
    "wrong_type": (f"{HEAD}{REGISTERS}('ffn', 'odd', 42)", "import-error", "42 is neither a class nor an"),
    "wrong_api": ("API_VERSION = (2, 0)", "api-mismatch", "API_VERSION = (2, 0)"),
    "duplicate": (
        f"{HEAD}{REGISTERS}('ffn', 'good_0', 'own:FFN')", "conflict",
        "ffn:good_0 is claimed by plugin 'good_0' (apt-good-0) too",
    ),
    "argument": (f"{HEAD}@hookimpl\ndef on_step_end(stp): ...", "import-error", "stp"),
    "dependency": ("import not_there_at_all", "missing-dependency", "it needs 'not_there_at_all'"),
    "stale": (None, "import-error", "its module 'stale_plugin' does not exist"),
}  # fmt: skip
GOOD = 90


@pytest.fixture
def hundred(make_distribution: MakeDistribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("APT_IMPORT_SECONDS", "1")
    for name, (source, _, _) in BROKEN.items():
        modules = {} if source is None else {f"{name}_plugin": source}
        make_distribution(f"apt-{name}", plugins={name: f"{name}_plugin"}, modules=modules)
    for number in range(GOOD):
        name = f"good_{number}"
        source = f"{HEAD}{REGISTERS}('ffn', '{name}', '{name}_ffn:FFN')\n" + (LISTENS if number % 30 == 1 else "")
        make_distribution(f"apt-good-{number}", plugins={name: f"{name}_plugin"}, modules={f"{name}_plugin": source})


SMALL = [
    "--model.d_model", "16", "--model.num_layers", "1", "--model.num_heads", "2", "--model.max_seq_len", "16",
    "--training.max_steps", "2", "--training.eval_batches", "1", "--data.cache_dir", "tokens",
    "--hardware.device", "cpu",
]  # fmt: skip


def test_all_are_listed_with_their_reasons_and_training_works(run_apt: RunApt, hundred: None, tmp_path: Path) -> None:
    result = run_apt("plugin-list", "--json")
    assert (result.code, result.err) == (0, "")
    listed = {plugin["name"]: plugin for plugin in json.loads(result.out)["plugins"]}
    ours = {name for name in listed if f"{name}_plugin" in _modules(tmp_path) or name == "stale"}
    assert len(ours) == 100
    for name, (_, status, reason) in BROKEN.items():
        assert listed[name]["status"] == status, name
        assert reason in listed[name]["reason"], name
        assert listed[name]["fix"], name
    assert listed["good_0"]["status"] == "conflict"
    for number in range(1, GOOD):
        plugin = listed[f"good_{number}"]
        assert (plugin["status"], plugin["reason"]) == ("ok", None)
        assert plugin["providers"] == [f"ffn:good_{number}"] and plugin["import_ms"] > 0
    shown = run_apt("plugin-list").out.splitlines()
    for name, (_, status, reason) in BROKEN.items():
        at = next(n for n, line in enumerate(shown) if line.split()[:2] == [name, status])
        assert reason in shown[at + 1] and shown[at + 2].startswith("    fix: ")

    (tmp_path / "text.txt").write_text("".join(f"{n} green bottles\n" for n in range(60)))
    result = run_apt("train", "-p", "tiny_debug", "--data.train_path", "text.txt", "--quiet", *SMALL)
    assert result.code == 0
    unused = [line for line in result.err.splitlines() if "is not used" in line]
    assert len(unused) == 9, "the one whose provider is claimed twice is used for the rest of what it brings"
    run = next((tmp_path / "runs").iterdir())
    lock = json.loads((run / "plugins.lock.json").read_text())
    listening = ["good_1", "good_31", "good_61"]
    assert [plugin["name"] for plugin in lock["plugins"] if plugin["name"] in ours] == listening
    imported = _modules(tmp_path) & set(sys.modules)
    assert imported == {f"{name}_plugin" for name in listening}, "and no other"


def _modules(tmp_path: Path) -> set[str]:
    return {path.stem for path in (tmp_path / "site-packages").glob("*_plugin.py")}
