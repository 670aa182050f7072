"""Finding out what plugins register: apart, within a time limit, once."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixture_types import MakeDistribution

from apt.core import scan
from apt.core.discovery import Plugin, Plugins, Selection, discover, find_plugins, load
from apt.core.errors import AptWarning, PluginError, UsageError
from apt.core.examine import Contents

HEAD = "from apt.hookspecs import hookimpl\nAPI_VERSION = (1, 0)\n"
REGISTERS = "@hookimpl\ndef apt_register_providers(registry):\n    registry.register('ffn', 'NAME', 'NAME_ffn:FFN')\n"
LISTENS = HEAD + "@hookimpl\ndef on_step_end(step): ...\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that is empty."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("APT_CACHE_DIR", str(folder))
    return folder / "plugins"


@pytest.fixture
def examined(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the plugins that were looked into, in order, one entry for each time."""
    names: list[str] = []
    apart = scan._examine_apart

    def note(plugins: list[Plugin], seconds: float) -> Iterator[Contents]:
        names.extend(plugin.name for plugin in plugins)
        return apart(plugins, seconds)

    monkeypatch.setattr(scan, "_examine_apart", note)
    return names


def provides(name: str) -> str:
    return (HEAD + REGISTERS).replace("NAME", name)


def looked_at(*names: str) -> dict[str, Plugin]:
    """These plugins, once they have been loaded."""
    found = load([plugin for plugin in find_plugins() if plugin.name in ("builtin", *names)]).found
    return {plugin.name: plugin for plugin in found if plugin.name in names}


# Apart


ENDLESS = {
    "spins": "while True:\n    pass\n",
    "waits_for_itself": "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()\n",
    "waits_for_a_thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"
    "time.sleep(60)\n",
    "swallows_all": "while True:\n    try:\n        raise SystemExit\n    except BaseException:\n        pass\n",
    "registers_for_ever": HEAD + "@hookimpl\ndef apt_register_providers(registry):\n    while True:\n        pass\n",
}


def test_imports_that_never_end_are_stopped_and_the_others_are_looked_into(
    make_distribution: MakeDistribution, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APT_IMPORT_SECONDS", "0.5")
    for name in ("a", "z"):
        make_distribution(f"apt-{name}", plugins={name: f"{name}_plugin"}, modules={f"{name}_plugin": provides(name)})
    for name, source in ENDLESS.items():
        site = make_distribution(f"apt-{name}", plugins={name: f"{name}_plugin"}, modules={f"{name}_plugin": source})
    started = time.monotonic()
    plugins = looked_at("a", *ENDLESS, "z")
    assert time.monotonic() - started < 50, "less than those that sleep would take"
    assert (plugins.pop("a").status, plugins.pop("z").status) == ("ok", "ok")
    for name, plugin in plugins.items():
        assert plugin.status == "import-error"
        reason = f"its import had not ended after 0.5 s, at {site}/{name}_plugin.py:"
        assert plugin.reason and plugin.reason.startswith(reason), "and where"
        assert plugin.fix == f"uninstall apt-{name}, or give it more time: APT_IMPORT_SECONDS=3 apt plugin-list"


ENDING = {
    "exit": ("import os\nos._exit(7)\n", "with exit code 7"),
    "fault": ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", "by SIGSEGV"),
    "interrupt": ("raise KeyboardInterrupt\n", "by SIGINT"),
}


def test_imports_that_end_the_process_end_another_process(make_distribution: MakeDistribution, cache: Path) -> None:
    for name, (source, _) in ENDING.items():
        make_distribution(f"apt-{name}", plugins={name: f"{name}_plugin"}, modules={f"{name}_plugin": source})
    make_distribution("apt-good", plugins={"good": "good_plugin"}, modules={"good_plugin": provides("good")})
    plugins = looked_at("good", *ENDING)
    assert plugins.pop("good").status == "ok"
    for name, (_, how) in ENDING.items():
        told = (plugins[name].status, plugins[name].reason, plugins[name].fix)
        assert told == (
            "import-error",
            f"its import ended the whole process, {how}",
            f"upgrade or uninstall apt-{name}",
        )


def test_what_an_import_says_and_asks_for_reaches_nobody(
    make_distribution: MakeDistribution, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = "import sys\nprint('loud')\nprint('loud', file=sys.stderr)\nassert sys.stdin.read() == ''\n" + provides(
        "a"
    )
    make_distribution("apt-a", plugins={"a": "a_plugin"}, modules={"a_plugin": source})
    assert looked_at("a")["a"].status == "ok"
    assert capfd.readouterr() == ("", "")


def test_nothing_is_imported_here_and_nothing_at_all_that_is_not_selected(
    make_distribution: MakeDistribution, cache: Path, tmp_path: Path
) -> None:
    for name in "ab":
        leaves_a_trace = f"open({str(tmp_path / name)!r}, 'w').close()\n"
        make_distribution(
            f"apt-{name}", plugins={name: f"{name}_plugin"}, modules={f"{name}_plugin": leaves_a_trace + provides(name)}
        )
    plugins = discover(Selection(("a",)))
    assert plugins.registry.find("ffn", "a").target == "a_ffn:FFN"
    assert not {"a_plugin", "b_plugin"} & set(sys.modules)
    assert (tmp_path / "a").exists() and not (tmp_path / "b").exists()


HERE = {
    "fine": (None, "ok", ""),
    "ends": ("raise SystemExit(3)", "import-error", "SystemExit: 3"),
    "needs": ("import not_there.at_all", "missing-dependency", "it needs 'not_there', which is not installed"),
    "old": ("API_VERSION = (0, 9)", "api-mismatch", "it declares API_VERSION = (0, 9), this apt-core has"),
    "slips": (HEAD + "@hookimpl\ndef on_step_end(stp): ...", "import-error", "does not keep the contract"),
}


def test_where_no_process_can_be_started_plugins_are_looked_into_here(
    make_distribution: MakeDistribution, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, (source, _, _) in HERE.items():
        modules = {f"{name}_plugin": source or provides(name)}
        make_distribution(f"apt-{name}", plugins={name: f"{name}_plugin"}, modules=modules)
    make_distribution("apt-stale", plugins={"stale": "stale_plugin"})
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    plugins = looked_at(*HERE, "stale")
    assert plugins.pop("stale").reason == "its module 'stale_plugin' does not exist"
    for name, (_, status, reason) in HERE.items():
        assert plugins[name].status == status
        assert reason in (plugins[name].reason or "")
        assert (plugins[name].fix is None) == (status == "ok")
    assert "fine_plugin" in sys.modules


def test_the_other_process_writes_down_what_it_finds_as_it_goes(
    make_distribution: MakeDistribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_distribution("apt-a", plugins={"a": "a_plugin"}, modules={"a_plugin": CLASSES})
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    before = signal.getsignal(signal.SIGINT)
    try:
        scan.child(sys.path, str(tmp_path), 60.0, [("a", "a_plugin", "apt-a"), ("gone", "gone_plugin", None)])
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, "Ctrl-C ends it"
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == [0]
    ready, *found = (tmp_path / "results").read_text().splitlines()
    assert ready == "ready" and (tmp_path / "stuck").read_text() == ""
    first, second = map(json.loads, found)
    assert [provider["target"] for provider in first["providers"]] == ["a_plugin:FFN.Inner", "a_plugin:FFN"]
    assert (first["status"], second["status"]) == ("ok", "import-error")


CLASSES = (
    HEAD
    + """
from apt.core.registry import Provider

class FFN(Provider):
    class Config:
        @classmethod
        def model_validate(cls, given): return given

    def get_name(self): return "own"
    def get_version(self): return "1"

    class Inner(Provider):
        def get_name(self): return "inner"
        def get_version(self): return "1"

def hidden():
    return type("Hidden", (FFN,), {})

@hookimpl
def apt_register_providers(registry):
    registry.register("ffn", "own", FFN, config=FFN.Config)
    registry.register("ffn", "inner", FFN.Inner)
"""
)


def test_classes_are_written_down_as_import_strings_where_they_have_one(
    make_distribution: MakeDistribution, cache: Path
) -> None:
    more = "    registry.register('ffn', 'hidden', hidden())\n"
    make_distribution("apt-a", plugins={"a": "a_plugin"}, modules={"a_plugin": CLASSES})
    make_distribution(
        "apt-b", plugins={"b": "b_plugin"}, modules={"b_plugin": CLASSES.replace('"own"', '"mine"') + more}
    )
    registry = discover(Selection(("a",))).registry
    assert "a_plugin" not in sys.modules
    assert registry.find("ffn", "own").config == "a_plugin:FFN.Config"
    assert [registry.get("ffn", name).get_name() for name in ("own", "inner")] == ["own", "inner"]
    for _ in range(2):  # the second time it is known that nothing could be written down
        registry = discover(Selection(("b",))).registry
        assert "b_plugin" in sys.modules
        assert registry.get("ffn", "hidden").get_name() == "mine"


def test_a_slip_in_the_name_of_a_hook_is_told_every_time(make_distribution: MakeDistribution, cache: Path) -> None:
    slip = HEAD + "def on_step_ned(step): ...\n"
    make_distribution("apt-a", plugins={"a": "a_plugin"}, modules={"a_plugin": slip})
    for _ in range(2):
        with pytest.warns(AptWarning, match=r"a\.on_step_ned is no hook.*did you mean on_step_end"):
            looked_at("a")


# Listeners


def test_those_alone_are_imported_whose_hooks_are_called(make_distribution: MakeDistribution, cache: Path) -> None:
    make_distribution("apt-a", plugins={"a": "a_plugin"}, modules={"a_plugin": LISTENS})
    make_distribution("apt-b", plugins={"b": "b_plugin"}, modules={"b_plugin": provides("b")})
    plugins = discover(Selection(("a", "b")))
    assert plugins.listeners({"on_epoch_end"}) == []
    assert not {"a_plugin", "b_plugin"} & set(sys.modules)
    listening = plugins.listeners({"on_step_end", "on_epoch_end"})
    assert [(plugin.name, plugin.module) for plugin in listening] == [("a", sys.modules["a_plugin"])]
    assert "b_plugin" not in sys.modules


def test_one_that_could_be_imported_there_and_cannot_here_is_passed_over(
    make_distribution: MakeDistribution, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"import sys\nif {os.getpid()} == __import__('os').getpid():\n    raise OSError('not here')\n" + LISTENS
    make_distribution("apt-a", plugins={"a": "a_plugin"}, modules={"a_plugin": source})

    def plugins(strict: bool) -> Plugins:
        return discover(Selection(("a",)), strict=strict)

    with pytest.warns(AptWarning, match=r"plugin 'a' \(apt-a\) is not used: import-error: OSError: not here"):
        assert plugins(strict=False).listeners({"on_step_end"}) == []
    with pytest.raises(PluginError, match="not here"):
        plugins(strict=True).listeners({"on_step_end"})


# Once


def test_what_is_known_is_not_looked_into_again(make_distribution: MakeDistribution, examined: list[str]) -> None:
    make_distribution("apt-a", plugins={"a": "a_plugin"}, modules={"a_plugin": provides("a")})
    make_distribution("apt-b", plugins={"b": "b_plugin"}, modules={"b_plugin": "raise SystemExit(3)"})
    first = looked_at("a", "b")
    assert examined == ["a", "b"]
    again = looked_at("a", "b")
    assert examined == ["a", "b"]
    assert again == first
    assert looked_at("b")["b"].reason == "SystemExit: 3"
    load([plugin for plugin in find_plugins() if plugin.name == "a"], refresh=True)
    assert examined == ["a", "b", "a"]
    looked_at("a", "b")
    assert examined == ["a", "b", "a"], "and what was known of the other one was kept"


def test_a_dependency_that_comes_is_noticed(make_distribution: MakeDistribution, examined: list[str]) -> None:
    needs = "import wanted_module\n" + provides("a")
    make_distribution(
        "apt-a",
        plugins={"a": "a_plugin"},
        modules={"a_plugin": needs},
        requires=["apt-core>=2", "wanted-distribution[all]>=3", "never; python_version < '3'", "pluggy"],
    )
    plugin = looked_at("a")["a"]
    assert (plugin.status, plugin.reason) == ("missing-dependency", "it needs 'wanted_module', which is not installed")
    assert plugin.fix == 'pip install "wanted-distribution[all]>=3"', "what its metadata calls it"
    make_distribution("wanted-distribution", "3.1", modules={"wanted_module": ""})
    assert looked_at("a")["a"].status == "ok"
    assert examined == ["a", "a"]


def test_another_version_and_other_files_are_looked_into(
    make_distribution: MakeDistribution, examined: list[str]
) -> None:
    site = make_distribution("apt-a", plugins={"a": "a_plugin"}, modules={"a_plugin": "raise SystemExit(1)"})
    assert looked_at("a")["a"].status == "import-error"
    make_distribution("apt-a", plugins={"a": "a_plugin"}, modules={"a_plugin": provides("other")})
    assert looked_at("a")["a"].status == "ok", "the same version, with another RECORD"
    metadata = site / "apt_a-1.0.dist-info/METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
    looked_at("a")
    assert examined == ["a", "a", "a"]


def test_the_sources_of_an_editable_install_are_watched(
    make_distribution: MakeDistribution, examined: list[str]
) -> None:
    direct_url = '{"url": "file:///src/apt-dev", "dir_info": {"editable": true}}'
    site = make_distribution(
        "apt-dev",
        plugins={"dev": "dev.plugin"},
        modules={"dev.__init__": "", "dev.plugin": "raise SystemExit(1)", "dev.other": ""},
        direct_url=direct_url,
    )
    assert looked_at("dev")["dev"].status == "import-error"
    looked_at("dev")
    assert examined == ["dev"]
    (site / "dev/plugin.py").write_text(provides("dev"))
    assert looked_at("dev")["dev"].status == "ok"
    (site / "dev/other.py").write_text("# another word\n")
    looked_at("dev")
    (site / "dev/notes.txt").write_text("not a source")
    looked_at("dev")
    assert examined == ["dev", "dev", "dev"]


def test_an_import_that_took_too_long_gets_another_chance_with_more_time(
    make_distribution: MakeDistribution, examined: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = "import time\ntime.sleep(1.5)\n" + provides("a")
    make_distribution("apt-a", plugins={"a": "a_plugin"}, modules={"a_plugin": slow})
    for seconds, status in (("0.5", "import-error"), ("0.4", "import-error"), ("30", "ok"), ("0.5", "ok")):
        monkeypatch.setenv("APT_IMPORT_SECONDS", seconds)
        assert looked_at("a")["a"].status == status, seconds
    assert examined == ["a", "a"]


@pytest.mark.parametrize("text", ["", "0", "-1", "soon", "nan", "inf", "1e9"])
def test_a_time_limit_that_is_none_is_refused(
    make_distribution: MakeDistribution, cache: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    make_distribution("apt-a", plugins={"a": "a_plugin"}, modules={"a_plugin": provides("a")})
    monkeypatch.setenv("APT_IMPORT_SECONDS", text)
    with pytest.raises(UsageError, match="APT_IMPORT_SECONDS: expected a number of seconds"):
        looked_at("a")


@pytest.fixture
def pretended(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As `examined`, and no plugin is looked into: all are well."""
    names: list[str] = []

    def examine(plugins: list[Plugin], seconds: float) -> Iterator[Contents]:
        names.extend(plugin.name for plugin in plugins)
        return iter([Contents()] * len(plugins))

    monkeypatch.setattr(scan, "_examine_apart", examine)
    return names


@pytest.mark.parametrize(
    "content", [b"", b"[", b"{}", b"7", b"\xff", b'[["a", "b"]]', b'[["a", "b", {"no": 1}]]', b'[["a", "b", 1]]']
)
def test_a_damaged_cache_is_made_again(
    make_distribution: MakeDistribution, pretended: list[str], cache: Path, content: bytes
) -> None:
    make_distribution("apt-a", plugins={"a": "a_plugin"}, modules={"a_plugin": provides("a")})
    looked_at("a")
    (file,) = cache.glob("*.json")
    whole = file.read_bytes()
    file.write_bytes(content)
    looked_at("a")
    looked_at("a")
    assert pretended == ["a", "a"]
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(
    make_distribution: MakeDistribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("APT_CACHE_DIR", str(tmp_path / "file/cache"))
    make_distribution("apt-a", plugins={"a": "a_plugin"}, modules={"a_plugin": provides("a")})
    with pytest.warns(AptWarning, match="cannot be written"):
        assert looked_at("a")["a"].status == "ok"


def test_a_few_environments_are_remembered(
    make_distribution: MakeDistribution, pretended: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "KEPT", 2)
    make_distribution("apt-a", plugins={"a": "a_plugin"}, modules={"a_plugin": provides("a")})
    for number in range(4):
        make_distribution(f"other-{number}")
        looked_at("a")
    assert len(pretended) == 4
    assert len(list(cache.glob("*.json"))) == 2


def test_with_no_plugin_but_cores_own_nothing_is_started_or_written(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise AssertionError("started")

    monkeypatch.setattr(scan, "_examine_apart", fail)
    assert discover(Selection(())).registry.list_providers("ffn")
    assert not cache.exists()
