"""Finding, selecting and loading plugins: selection comes before any import, and a plugin that fails to load disables
itself alone."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from fixture_types import MakeDistribution

from apt.core.catalogue import how_to_install
from apt.core.discovery import BUILTIN, Plugin, Selection, choose, discover, find_plugins, select
from apt.core.errors import AptWarning, ConflictError, PluginError
from apt.core.registry import Registry

GOOD = """
from apt.hookspecs import hookimpl
API_VERSION = (1, 0)

@hookimpl
def apt_register_providers(registry):
    registry.register("ffn", "NAME_ffn", "nowhere:Thing", version="9.9")
"""


def good(name: str) -> str:
    return GOOD.replace("NAME", name)


def plugin(found: list[Plugin], name: str) -> Plugin:
    return next(entry for entry in found if entry.name == name)


# Selection


def test_the_command_line_is_over_the_environment_and_that_over_the_profile() -> None:
    environ = {"APT_PLUGINS": "a, b c", "APT_DISABLE_PLUGINS": "d"}
    assert choose(environ={}) == Selection(None, (), "default")
    assert choose(profile=["p"], environ={}) == Selection(("p",), (), "the profile's plugins")
    assert choose(profile=["p"], environ=environ) == Selection(("a", "b", "c"), ("d",), "APT_PLUGINS")
    assert choose(plugins=["x"], profile=["p"], environ=environ) == Selection(("x",), (), "--plugins")
    assert choose(no_plugins=True, plugins=["x"], environ=environ).names == ()
    assert choose(no_plugin=["q"], environ=environ).excluded == ("q", "d")
    assert choose(profile=[], environ={}).names == ()


def found() -> list[Plugin]:
    names = {BUILTIN: "apt-core", "one": "dist-one", "moe": "apt-plugin-moe"}
    return [Plugin(name, f"module_of_{name}", distribution) for name, distribution in names.items()]


def test_what_is_not_selected_is_disabled_and_the_builtin_never_is() -> None:
    for selection, expected in [
        (Selection(), ["ok", "ok", "ok"]),
        (Selection(()), ["ok", "disabled", "disabled"]),
        (Selection(("one",)), ["ok", "ok", "disabled"]),
        (Selection(None, ("moe",)), ["ok", "ok", "disabled"]),
        (Selection(None, ("routing",)), ["ok", "ok", "disabled"]),
        (Selection(("routing",)), ["ok", "disabled", "ok"]),
    ]:
        plugins = found()
        select(plugins, selection)
        assert [entry.status for entry in plugins] == expected, selection
        assert all(bool(entry.reason) == bool(entry.fix) == (entry.status != "ok") for entry in plugins)


@pytest.mark.parametrize(
    ("choice", "reason", "fix"),
    [
        ({"no_plugins": True}, "left out by --no-plugins", "leave --no-plugins out"),
        ({"plugins": ["one"]}, "not among --plugins", "add it to --plugins"),
        ({"environ": {"APT_PLUGINS": "one"}}, "not among APT_PLUGINS", "add it to APT_PLUGINS"),
        ({"profile": []}, "not among the profile's plugins", "add it to the profile's plugins"),
        ({"no_plugin": ["moe"]}, "left out by --no-plugin or APT_DISABLE_PLUGINS", "take its name out of there"),
    ],
)
def test_what_is_disabled_says_by_what_and_how_to_change_that(choice: dict[str, Any], reason: str, fix: str) -> None:
    plugins = found()
    select(plugins, choose(**{"environ": {}, **choice}))
    assert (plugins[2].status, plugins[2].reason, plugins[2].fix) == ("disabled", reason, fix)


def test_a_name_of_the_catalogue_that_is_absent_warns_and_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt.core.discovery.how_to_install", lambda package: f"pip install {package}")
    with pytest.warns(AptWarning, match=r"'align' is not installed.*pip install apt-plugin-align"):
        select(found(), Selection(("align",), source="--plugins"))
    with pytest.raises(PluginError, match="--plugins: plugin 'align' is not installed; pip install apt-plugin-align"):
        select(found(), Selection(("align",), source="--plugins"), strict=True)


def test_two_names_of_one_absent_package_are_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt.core.discovery.how_to_install", lambda package: f"pip install {package}")
    without_moe = [entry for entry in found() if entry.name != "moe"]
    selection = Selection(("moe", "one", "align", "routing", "voter"), source="--plugins")
    with pytest.warns(AptWarning) as warned:
        assert select(without_moe, selection) == ("apt-plugin-moe", "apt-plugin-align")
    assert [str(warning.message) for warning in warned] == [
        "--plugins: plugins 'moe' and 'routing' are not installed; going on without them "
        "(to get them: pip install apt-plugin-moe)",
        "--plugins: plugin 'align' is not installed; going on without it (to get it: pip install apt-plugin-align)",
    ]
    assert select(found(), Selection(("moe", "routing"), ("align",))) == (), "what is left out is not missed"


def test_a_package_that_is_installed_and_brings_too_little_is_to_be_upgraded() -> None:
    assert how_to_install("no-such-package[cuda]") == 'pip install "no-such-package[cuda]"'
    wanted = r'pip install --upgrade "pluggy", for the installed 1\.\S+ does not bring it'
    assert re.fullmatch(wanted, how_to_install("pluggy"))


def test_cores_own_plugin_cannot_be_left_out() -> None:
    for name in (BUILTIN, "voter"):
        plugins = found()
        with pytest.warns(AptWarning, match="cannot be left out"):
            select(plugins, Selection(None, (name,)))
        assert [entry.status for entry in plugins] == ["ok", "ok", "ok"]
        with pytest.raises(PluginError):
            select(found(), Selection(None, (name,)), strict=True)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("aling", "did you mean 'align'"), ("meo", "did you mean 'moe'"), ("zzz", "installed: moe, one")],
)
def test_any_other_name_is_an_error(name: str, hint: str) -> None:
    with pytest.raises(PluginError, match=hint):
        select(found(), Selection((name,)))
    with pytest.raises(PluginError, match=hint):
        select(found(), Selection(None, (name,)))


# Finding and loading


def test_an_installed_plugin_is_found_described_and_loaded(make_distribution: MakeDistribution) -> None:
    make_distribution("apt-good", "2.5", plugins={"good": "good_plugin"}, modules={"good_plugin": good("good")})
    entry = plugin(find_plugins(), "good")
    assert (entry.distribution, entry.version, entry.source) == ("apt-good", "2.5", "installed")
    assert "good_plugin" not in sys.modules, "finding imports nothing"
    plugins = discover(Selection())
    claim = plugins.registry.find("ffn", "good_ffn")
    assert (claim.plugin, claim.distribution, claim.distribution_version) == ("good", "apt-good", "2.5")
    assert plugins.registry.default_of("attention") == "tva_default"
    assert {BUILTIN, "good"} <= {entry.name for entry in plugins.found if entry.loaded}
    assert "good_plugin" not in sys.modules, "nor does loading, where nothing calls on it"


def test_what_is_not_selected_is_not_imported(make_distribution: MakeDistribution) -> None:
    make_distribution("apt-loud", plugins={"loud": "loud_plugin"}, modules={"loud_plugin": "raise SystemExit(1)"})
    plugins = discover(Selection(()))
    assert plugin(plugins.found, "loud").status == "disabled"
    assert "loud_plugin" not in sys.modules


def test_an_editable_install_is_told(make_distribution: MakeDistribution) -> None:
    direct_url = '{"url": "file:///src/apt-dev", "dir_info": {"editable": true}}'
    make_distribution("apt-dev", plugins={"dev": "dev_plugin"}, direct_url=direct_url)
    assert plugin(find_plugins(), "dev").source == "editable: /src/apt-dev"


BROKEN: dict[str, tuple[str | None, str, str]] = {
    "ImportError": ("raise ImportError('half an install')", "import-error", "half an install"),
    "SyntaxError": ("def", "import-error", "SyntaxError"),
    "SystemExit": ("raise SystemExit(3)", "import-error", "SystemExit: 3"),
    "no module": (None, "import-error", "does not exist"),
    "a missing dependency": ("import not_there_at_all", "missing-dependency", "it needs 'not_there_at_all'"),
    "no API_VERSION": ("x = 1", "api-mismatch", "declares no API_VERSION"),
    "another major": ("API_VERSION = (2, 0)", "api-mismatch", "API_VERSION = \\(2, 0\\)"),
    "a newer minor": ("API_VERSION = (1, 99)", "api-mismatch", "API_VERSION = \\(1, 99\\)"),
    "a wrong type": ("API_VERSION = 'one'", "api-mismatch", "one"),
    "an unknown hook argument": (
        "from apt.hookspecs import hookimpl\nAPI_VERSION = (1, 0)\n@hookimpl\ndef on_step_end(stp): ...",
        "import-error", "stp",
    ),
    "a registration that fails half-way": (
        good("half") + "    registry.register('no_such_kind', 'x', 'a:B')\n", "import-error", "no provider kind",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_plugin_that_fails_to_load_disables_itself_alone(make_distribution: MakeDistribution, case: str) -> None:
    source, status, reason = BROKEN[case]
    modules = {} if source is None else {"broken_plugin": source}
    make_distribution("apt-broken", plugins={"broken": "broken_plugin"}, modules=modules)
    make_distribution("apt-good", plugins={"good": "good_plugin"}, modules={"good_plugin": good("good")})
    with pytest.warns(AptWarning, match=f"'broken'.*is not used: {status}: .*{reason}"):
        plugins = discover(Selection())
    entry = plugin(plugins.found, "broken")
    assert (entry.status, entry.module) == (status, None)
    assert entry.fix
    assert plugin(plugins.found, "good").status == "ok"
    assert plugins.registry.list_providers()["ffn"] == ["default", "good_ffn", "swiglu"], "nothing half-registered"
    with pytest.raises(PluginError, match="'broken'"):
        discover(Selection(), strict=True)


def test_an_entry_point_that_names_an_object_says_so_and_imports_nothing(make_distribution: MakeDistribution) -> None:
    make_distribution("apt-odd", plugins={"odd": "odd_plugin:plugin"}, modules={"odd_plugin": "raise SystemExit(1)"})
    entry = plugin(find_plugins(), "odd")
    assert entry.status == "import-error"
    assert entry.reason == "its entry point names 'odd_plugin:plugin', and a plugin is a module"
    assert entry.fix == 'its authors write: odd = "odd_plugin"'


def test_two_plugins_of_one_name_are_both_shown_and_neither_is_loaded(make_distribution: MakeDistribution) -> None:
    for letter in "ab":
        modules = {f"plugin_{letter}": good("x")}
        make_distribution(f"apt-{letter}", plugins={"same": f"plugin_{letter}"}, modules=modules)
    with pytest.warns(AptWarning, match="apt-a and apt-b both bring"):
        plugins = discover(Selection())
    assert [entry.status for entry in plugins.found if entry.name == "same"] == ["conflict", "conflict"]


def test_two_plugins_that_claim_one_provider_are_both_shown(make_distribution: MakeDistribution) -> None:
    for letter in "ab":
        source = good("same").replace("nowhere:Thing", f"nowhere:{letter}")
        make_distribution(f"apt-{letter}", plugins={letter: f"plugin_{letter}"}, modules={f"plugin_{letter}": source})
    plugins = discover(Selection())
    registry = plugins.registry
    assert [claim.plugin for claim in registry.claims() if claim.name == "same_ffn"] == ["a", "b"]
    for name, other in (("a", "b"), ("b", "a")):
        entry = plugin(plugins.found, name)
        assert (entry.status, entry.loaded, entry.fix) == ("conflict", True, f"--no-plugin {name}")
        assert entry.reason == f"ffn:same_ffn is claimed by plugin {other!r} (apt-{other}) too, so nobody gets it"
    with pytest.raises(ConflictError, match="--no-plugin b"):
        registry.get("ffn", "same_ffn")


def test_the_global_registry_knows_the_installed_plugins_at_first_use(make_distribution: MakeDistribution) -> None:
    from apt.core.registry import _load_installed

    make_distribution("apt-good", plugins={"good": "good_plugin"}, modules={"good_plugin": good("good")})
    registry: Any = Registry(load=_load_installed)
    assert "good_plugin" not in sys.modules
    assert "good_ffn" in registry.list_providers("ffn")["ffn"]
