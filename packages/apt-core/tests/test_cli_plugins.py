"""Plugins on the command line: listed, shown, and adding commands and options of their own."""

from __future__ import annotations

import argparse
import json
import pathlib
import re
from argparse import Namespace

import pytest
from fixture_types import MakeDistribution, RunApt

from apt.cli.commands import run_plugin_info_command, run_plugin_list_command
from apt.cli.parser import parse_arguments
from apt.core.catalogue import KINDS
from apt.core.errors import AptWarning
from apt.core.providers.router import RouterProvider
from apt.core.registry import Registry, registry

HEAD = "from apt.hookspecs import hookimpl\nAPI_VERSION = (1, 0)\n"

PROVIDES = """
@hookimpl
def apt_register_providers(registry):
    registry.register("router", "{name}", "{module}_router:Router", version="0.3", excludes=["quant:int8"])
"""

ROUTER = '''
from apt.core.providers.router import RouterProvider

class Router(RouterProvider):
    """Sends every token everywhere.

    And more.
    """

    def get_name(self): return "everywhere"
    def get_version(self): return "0.3"
    def get_dependencies(self): return ["nothing-like-it>=2"]
    def wrap_ffn(self, base_ffn, config): return base_ffn
'''

COMMANDS = """
@hookimpl
def apt_register_commands(commands):
    def configure(parser):
        parser.add_argument("who")
        parser.add_argument("--run", default="slowly")

    def run(args):
        print(f"hello {args.who}, {args.run}")
        return 5 if args.who == "five" else None

    commands.add("toy-hello", "greet somebody", configure, run)
"""


@pytest.fixture
def toy(make_distribution: MakeDistribution) -> None:
    make_distribution(
        "apt-toy",
        "0.9",
        plugins={"toy": "toy_plugin"},
        modules={
            "toy_plugin": HEAD + PROVIDES.format(name="everywhere", module="toy") + COMMANDS,
            "toy_router": ROUTER,
        },
    )


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


# plugin-list


def test_list_shows_plugins_and_providers(run_apt: RunApt, toy: None) -> None:
    result = run_apt("plugin-list")
    assert (result.code, result.err) == (0, "")
    lines = words(result.out)
    assert ["toy", "ok", "apt-toy", "0.9"] in [line[:4] for line in lines]
    assert ["everywhere", "0.3", "apt-toy"] in lines
    assert ["tva_default", "1.0.0", "apt-core", "default"] in lines
    assert ["mha", "1.0.0", "apt-core"] in lines


def test_list_of_one_kind_shows_that_kind_alone(run_apt: RunApt, toy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APT_PLUGINS", "toy")  # another router may be installed here
    assert run_apt("plugin-list", "--kind", "router").out == "  router\n    everywhere  0.3  apt-toy\n"
    assert run_apt("plugin-list", "--kind", "quant").out == "  no provider of kind quant is installed\n"
    result = run_apt("plugin-list", "--kind", "atention")
    assert result == (2, "", "error: there is no provider kind 'atention'\n  fix: did you mean attention?\n")
    assert run_apt("plugin-list", "--kind", "x").err.endswith(f"  fix: the kinds are {', '.join(KINDS)}\n")


def test_list_as_json(run_apt: RunApt, toy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APT_PLUGINS", "toy")  # another router may be installed here
    listing = json.loads(run_apt("plugin-list", "--json").out)
    plugin = next(plugin for plugin in listing["plugins"] if plugin["name"] == "toy")
    import_ms = plugin["import_ms"]
    assert 0 < import_ms < 10_000
    assert plugin == {
        "name": "toy", "status": "ok", "reason": None, "fix": None,
        "distribution": "apt-toy", "version": "0.9", "source": "installed", "import_ms": import_ms,
        "hooks": ["apt_register_commands", "apt_register_providers"], "providers": ["router:everywhere"],
    }  # fmt: skip
    expected = {
        "kind": "router", "name": "everywhere", "version": "0.3", "default": False,
        "plugin": "toy", "distribution": "apt-toy", "source": "installed", "status": "ok", "import_ms": import_ms,
        "contested": False,
    }  # fmt: skip
    assert listing["providers"]["router"] == [expected]
    assert [p["name"] for p in listing["providers"]["attention"] if p["default"]] == ["tva_default"]
    assert json.loads(run_apt("plugin-list", "--kind", "router", "--json").out) == {"providers": {"router": [expected]}}
    assert json.loads(run_apt("plugin-list", "--kind", "quant", "--json").out) == {"providers": {"quant": []}}


def test_plugins_without_providers_are_listed_too(run_apt: RunApt, make_distribution: MakeDistribution) -> None:
    make_distribution("apt-empty", plugins={"empty": "empty_plugin"}, modules={"empty_plugin": HEAD})
    assert ["empty", "ok", "apt-empty", "1.0", "no", "providers"] in words(run_apt("plugin-list").out)


@pytest.mark.parametrize(
    ("source", "status", "reason", "fix"),
    [
        ("raise SystemExit(3)", "import-error", "SystemExit: 3", None),
        ("import not_there_at_all", "missing-dependency", "not_there_at_all", "pip install not_there_at_all"),
        ("API_VERSION = (9, 0)", "api-mismatch", "(9, 0)", "upgrade apt-core"),
    ],
)  # fmt: skip
def test_plugins_that_fail_are_listed_with_the_reason(
    run_apt: RunApt, make_distribution: MakeDistribution, source: str, status: str, reason: str, fix: str | None
) -> None:
    make_distribution("apt-bad", plugins={"bad": "bad_plugin"}, modules={"bad_plugin": source})
    result = run_apt("plugin-list")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    at = next(n for n, line in enumerate(lines) if line.split()[:2] == ["bad", status])
    assert reason in lines[at + 1]
    assert fix is None or lines[at + 2] == f"    fix: {fix}"
    listed = json.loads(run_apt("plugin-list", "--json").out)["plugins"]
    assert next(plugin for plugin in listed if plugin["name"] == "bad")["status"] == status


def test_environment_chooses_what_is_listed(run_apt: RunApt, toy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APT_DISABLE_PLUGINS", "toy")
    result = run_apt("plugin-list")
    assert ["toy", "disabled"] in [line[:2] for line in words(result.out)]
    assert "everywhere" not in result.out


def test_an_editable_install_says_where_it_lies(run_apt: RunApt, make_distribution: MakeDistribution) -> None:
    url = '{"url": "file:///home/me/toy", "dir_info": {"editable": true}}'
    make_distribution("apt-here", plugins={"here": "here_plugin"}, modules={"here_plugin": HEAD}, direct_url=url)
    make_distribution("apt-odd", plugins={"odd": "odd_plugin"}, modules={"odd_plugin": HEAD}, direct_url="{nonsense")
    result = run_apt("plugin-list")
    assert ["editable:", "/home/me/toy"] in [line[4:6] for line in words(result.out)]
    assert ["odd", "ok", "apt-odd", "1.0"] in [line[:4] for line in words(result.out)]


def test_two_plugins_that_claim_one_provider_are_both_shown(
    run_apt: RunApt, make_distribution: MakeDistribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APT_PLUGINS", "a b")
    for name in ("a", "b"):
        make_distribution(
            f"apt-{name}",
            plugins={name: f"{name}_plugin"},
            modules={f"{name}_plugin": HEAD + PROVIDES.format(name="same", module=name)},
        )
    lines = run_apt("plugin-list", "--kind", "router").out.splitlines()[1:]
    assert [line.split()[2] for line in lines] == ["apt-a", "apt-b"]
    assert [line.rpartition("  ")[2] for line in lines] == [
        f"claimed twice, so not used; leave one out: --no-plugin {name}" for name in ("a", "b")
    ]
    result = run_apt("plugin-info", "router", "same")
    assert result.code == 2
    assert result.err.startswith("error: router:same is claimed by plugin 'a' (apt-a) and plugin 'b' (apt-b)\n")


# plugin-info


def test_info_shows_what_is_known(run_apt: RunApt, toy: None) -> None:
    result = run_apt("plugin-info", "router", "everywhere")
    assert (result.code, result.err) == (0, "")
    head, *rows = result.out.splitlines()
    assert head == "router:everywhere"
    facts = {row[:18].strip(): row[18:] for row in rows}
    assert facts == {
        "version": "0.3", "is default": "no", "class": "toy_router:Router", "summary": "Sends every token everywhere.",
        "plugin": "toy", "distribution": "apt-toy", "dependencies": "nothing-like-it>=2", "excludes": "quant:int8",
        "requires": "none", "section": "model.everywhere", "weights layout": "none",
        "conformance": "not checked yet: apt plugin-check router:everywhere",
    }  # fmt: skip


def test_info_of_what_is_not_there_says_how_to_get_it(
    run_apt: RunApt, toy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_apt("plugin-info", "router", "everywere")
    assert result == (2, "", "error: router:everywere is not installed\n  fix: did you mean 'everywhere'?\n")
    monkeypatch.setenv("APT_DISABLE_PLUGINS", "rag")
    said = run_apt("plugin-info", "retrieval", "knn_lm").err
    assert re.search(r'fix: (pip install "apt-plugin-rag"|leave --no-plugin out)', said), "installed here, or not"
    result = run_apt("plugin-info", "ruter", "everywhere")
    assert result == (2, "", "error: there is no provider kind 'ruter'\n  fix: did you mean router?\n")


def test_what_the_calling_script_has_registered_is_shown_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mine(RouterProvider):
        """My own."""

        def get_name(self) -> str:
            return "mine"

        def get_version(self) -> str:
            return "7"

        def wrap_ffn(self, base_ffn: object, config: object) -> object:
            return base_ffn

    mine = Registry()
    mine.register("router", "mine", Mine, version="7")
    monkeypatch.setattr(registry, "_claims", mine._claims)
    assert run_plugin_list_command(Namespace(kind="router")) == 0
    assert ["mine", "7", "script"] in words(capsys.readouterr().out)
    assert run_plugin_info_command(Namespace(kind="router", name="mine")) == 0
    assert ["summary", "My", "own."] in words(capsys.readouterr().out)


# Commands of plugins


def test_commands_of_plugins_are_shown_with_their_package_and_run(run_apt: RunApt, toy: None) -> None:
    result = run_apt("--help")
    assert result.err == ""
    assert "toy-hello" in result.out.partition("Commands of plugins")[2]
    assert ["toy-hello", "greet", "somebody", "(apt-toy)"] in words(result.out)
    assert run_apt("toy-hello", "you", "--run", "fast") == (0, "hello you, fast\n", "")
    assert run_apt("toy-hello", "five").code == 5
    assert run_apt("toy-helo").err.splitlines()[1] == "  fix: did you mean toy-hello? see the commands with: apt --help"
    assert run_apt("toy-hello").err == "error: apt toy-hello: needs who\n  fix: see apt toy-hello --help\n"
    assert run_apt("toy-hello", "--help").out.startswith("usage: apt toy-hello ")


ADD = "\n@hookimpl\ndef apt_register_commands(commands):\n"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("train", "is taken by apt-core"),
        ("install", "is a word of the system's own apt"),
        ("toy-hello", "is taken by plugin 'toy' (apt-toy)"),
        ("fine", "is taken by this plugin itself"),
        ("Not fine", "is not of lower-case words joined by hyphens"),
        ("--x", "is not of lower-case words joined by hyphens"),
    ],
)
def test_a_command_that_clashes_is_left_out_and_the_others_stay(
    run_apt: RunApt, toy: None, make_distribution: MakeDistribution, name: str, problem: str
) -> None:
    body = (
        f"{ADD}    def run(args): print('mine')\n"
        f"    commands.add('fine', 'x', lambda parser: None, run)\n"
        f"    commands.add({name!r}, 'x', lambda parser: None, run)\n"
    )
    make_distribution("apt-zeal", plugins={"zeal": "zeal_plugin"}, modules={"zeal_plugin": HEAD + body})
    result = run_apt("--help")
    assert result.err == f"warning: plugin 'zeal' (apt-zeal): its command {name!r} is left out: the name {problem}\n"
    assert ["fine", "x", "(apt-zeal)"] in words(result.out)
    assert run_apt("fine").out == "mine\n"


@pytest.mark.parametrize("what", ["raise ValueError('oh\\nno')", "import sys; sys.exit(4)"])
def test_a_plugin_that_raises_adds_nothing_and_harms_nobody(
    run_apt: RunApt, toy: None, make_distribution: MakeDistribution, what: str
) -> None:
    body = f"{ADD}    commands.add('half', 'x', lambda parser: None, lambda args: 0)\n    {what}\n"
    make_distribution("apt-bad", plugins={"bad": "bad_plugin"}, modules={"bad_plugin": HEAD + body})
    result = run_apt("--help")
    assert result.code == 0
    assert result.err.startswith("warning: plugin 'bad' (apt-bad): its commands are left out: ")
    assert result.err.count("\n") == 1
    assert "half" not in result.out
    assert "toy-hello" in result.out


def test_a_command_that_fails_is_the_fault_of_its_plugin(run_apt: RunApt, make_distribution: MakeDistribution) -> None:
    body = (
        f"{ADD}    commands.add('bad-run', 'x', lambda parser: None, lambda args: 1 / 0)\n"
        "    commands.add('bad-arguments', 'x', lambda parser: 1 / 0, lambda args: 0)\n"
        "    def advise(args):\n"
        "        from apt.api import AptError\n"
        "        raise AptError('cannot', hint='do not')\n"
        "    commands.add('advise', 'x', lambda parser: None, advise)\n"
    )
    make_distribution("apt-bad", plugins={"bad": "bad_plugin"}, modules={"bad_plugin": HEAD + body})
    for name in ("bad-run", "bad-arguments"):
        result = run_apt(name)
        assert result.code == 1
        line = f"error: plugin 'bad' (apt-bad): its command {name!r} failed: ZeroDivisionError: division by zero\n"
        assert result.err.startswith(line)
    assert run_apt("advise") == (2, "", "error: cannot\n  fix: do not\n")


def test_help_survives_a_wrong_choice_of_plugins(run_apt: RunApt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APT_PLUGINS", "quux")
    result = run_apt("--help")
    assert result.code == 0
    assert "plugin-list" in result.out
    assert result.err.startswith("warning: APT_PLUGINS: there is no plugin 'quux'")


# Options of plugins

OPTIONS = """
@hookimpl
def apt_register_options(command, options):
    if command == "train":
        options.add_argument("--toy-strength", type=float, default=1.0, help="how much")
"""


@pytest.fixture
def optional(make_distribution: MakeDistribution) -> None:
    make_distribution("apt-toy", plugins={"toy": "toy_plugin"}, modules={"toy_plugin": HEAD + OPTIONS})


def test_options_of_plugins_join_the_command(run_apt: RunApt, optional: None) -> None:
    assert parse_arguments(["train", "-p", "tiny_debug", "--toy-strength", "2"]).toy_strength == 2.0
    assert parse_arguments(["train", "-p", "tiny_debug"]).toy_strength == 1.0
    assert "options of plugin 'toy' (apt-toy):" in run_apt("train", "--help").out
    assert run_apt("train", "--toy-strenth", "2").err.endswith(
        "fix: did you mean --toy-strength? see apt train --help\n"
    )
    assert run_apt("eval", "--toy-strength", "2").err.startswith("error: apt eval: there is no option --toy-strength")


@pytest.mark.parametrize("choice", [["--no-plugin", "toy"], ["--no-plugins"], ["--plugins", "builtin"]])
def test_options_of_plugins_that_are_left_out_are_not_asked_for(
    run_apt: RunApt, optional: None, choice: list[str]
) -> None:
    result = run_apt("train", *choice, "--toy-strength", "2")
    assert result.err.startswith("error: apt train: there is no option --toy-strength")


def test_the_profile_chooses_whose_options_there_are(
    run_apt: RunApt, optional: None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    profile = tmp_path_factory.mktemp("profiles") / "none.yaml"
    profile.write_text("plugins: []\n")
    result = run_apt("train", "-p", str(profile), "--toy-strength", "2")
    assert result.err.startswith("error: apt train: there is no option --toy-strength")


RETRIEVE = """
@hookimpl
def apt_register_options(command, options):
    if command != "train":
        options.add_argument("--retrieve", help="for " + command)
"""


@pytest.mark.parametrize("command", ["generate", "chat", "eval"])
def test_the_run_chooses_whose_options_there_are(
    run_apt: RunApt, make_distribution: MakeDistribution, tmp_path: pathlib.Path, command: str
) -> None:
    make_distribution("apt-toy", plugins={"toy": "toy_plugin"}, modules={"toy_plugin": HEAD + RETRIEVE})
    for name, plugins in {"with": "[toy]", "without": "[]"}.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "profile.yaml").write_text(f"plugins: {plugins}\n")
    assert f"for {command}" in run_apt(command, "with", "--help").out
    for call in (["runs/with", "--retrieve", "without"], ["--retrieve", "without", "with"]):
        assert parse_arguments([command, *call]).retrieve == "without"
    for call in (["runs/without", "--retrieve", "with"], ["--retrieve", "with", "without"]):
        result = run_apt(command, *call)
        assert result.err.startswith(f"error: apt {command}: there is no option --retrieve")
    assert run_apt("train", "--retrieve", "x").err.startswith("error: apt train: there is no option --retrieve")


@pytest.mark.parametrize("body", ["raise ValueError('oh no')", "options.add_argument('--epochs')"])
def test_a_plugin_whose_options_fail_harms_nobody(make_distribution: MakeDistribution, body: str) -> None:
    source = f"{HEAD}\n@hookimpl\ndef apt_register_options(options):\n    {body}\n"
    make_distribution("apt-bad", plugins={"bad": "bad_plugin"}, modules={"bad_plugin": source})
    with pytest.warns(AptWarning, match=r"plugin 'bad' \(apt-bad\): its options for 'train' are left out: ") as caught:
        args = parse_arguments(["train", "--epochs", "3"])
    assert len(caught) == 1
    assert isinstance(args, argparse.Namespace)
    assert args.epochs == 3
