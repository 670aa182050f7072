"""The program: its help, how it says what went wrong, and what it does not import."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from fixture_types import MakeDistribution, RunApt

import apt
from apt.cli import commands, main
from apt.cli.overview import COMMANDS
from apt.core.discovery import find_plugins
from apt.core.errors import AptWarning, ConfigError, FallbackWarning, TrainingError
from apt.core.runs import find_run

SOURCE = str(Path(apt.__file__).parents[1])


@pytest.fixture
def doing(monkeypatch: pytest.MonkeyPatch):
    """Let `apt profile list` do something else."""

    def replace(what):
        monkeypatch.setattr(commands, "run_profile_list_command", what)

    return replace


def raises(error: BaseException):
    def command(args: Namespace) -> int:
        raise error

    return command


def test_help_names_every_command(run_apt: RunApt) -> None:
    result = run_apt("--help")
    assert (result.code, result.err) == (0, "")
    for name, text in COMMANDS.items():
        assert any(line.split() == [name, *text.split()] for line in result.out.splitlines())
    assert ("Commands of plugins" in result.out) == any(entry.name != "builtin" for entry in find_plugins())
    assert run_apt() == result
    assert run_apt("--debug", "-h") == result


def test_version(run_apt: RunApt) -> None:
    assert run_apt("--version") == (0, f"apt-core {apt.__version__}\n", "")


def test_headings_stand_out_on_a_terminal_alone(run_apt: RunApt, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\033" not in run_apt("--help").out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\033[1mCommands\033[0m" in run_apt("--help").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in run_apt("--help").out


def test_an_error_is_a_line_and_its_fix(run_apt: RunApt, doing) -> None:
    doing(raises(ConfigError("a.yaml:3: no good", hint="make it better")))
    assert run_apt("profile", "list") == (2, "", "error: a.yaml:3: no good\n  fix: make it better\n")
    doing(raises(ConfigError("no good")))
    assert run_apt("profile", "list") == (2, "", "error: no good\n")


def test_debug_shows_the_traceback_before_or_after_the_command(run_apt: RunApt, doing) -> None:
    doing(raises(ConfigError("no good")))
    for call in (["--debug", "profile", "list"], ["profile", "list", "--debug"], ["profile", "--debug", "list"]):
        result = run_apt(*call)
        assert result.code == 2
        assert result.err.startswith("Traceback")
        assert result.err.endswith("error: no good\n")


def test_a_run_that_a_signal_ended_is_no_error(run_apt: RunApt, doing) -> None:
    stopped = TrainingError(
        "stopped by Ctrl-C after step 3 of 9; saved", hint="go on with: apt train --resume runs/a-1"
    )
    stopped.exit_code = 130
    doing(raises(stopped))
    assert run_apt("profile", "list") == (130, "", f"{stopped.message}\n{stopped.hint}\n")
    doing(raises(KeyboardInterrupt()))
    assert run_apt("profile", "list") == (130, "", "interrupted\n")


def test_what_the_system_refuses_is_told_with_the_file(run_apt: RunApt, doing) -> None:
    doing(raises(OSError(28, "No space left on device", "runs/a-1/metrics.jsonl")))
    assert run_apt("profile", "list") == (2, "", "error: No space left on device: runs/a-1/metrics.jsonl\n")


def test_what_only_we_can_cause_asks_for_a_report(run_apt: RunApt, doing) -> None:
    doing(raises(KeyError("x\ny")))
    line = "internal error: KeyError: 'x\\ny'; run again with --debug and report what it shows\n"
    assert run_apt("profile", "list") == (1, "", line)


def test_exit_codes_of_commands_come_back(run_apt: RunApt, doing) -> None:
    doing(lambda args: 3)
    assert run_apt("profile", "list").code == 3
    for code, expected, err in ((4, 4, ""), (None, 0, ""), ("no", 1, "no\n")):
        doing(raises(SystemExit(code)))
        assert run_apt("profile", "list") == (expected, "", err)


def test_warnings_are_lines_each_told_once(run_apt: RunApt, doing) -> None:
    def warns(args: Namespace) -> int:
        for category in (AptWarning, FallbackWarning, AptWarning):
            warnings.warn("this is passed over", category, stacklevel=1)
        warnings.warn("and this", AptWarning, stacklevel=1)
        return 0

    doing(warns)
    assert run_apt("profile", "list") == (0, "", "warning: this is passed over\nwarning: and this\n")
    assert run_apt("profile", "list").err  # in another call they are told again


def test_warnings_of_others_are_left_to_python(run_apt: RunApt, doing) -> None:
    def warns(args: Namespace) -> int:
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        return 0

    doing(warns)
    with pytest.warns(DeprecationWarning, match="old"):
        assert run_apt("profile", "list").err == ""


MUTE = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")


@contextmanager
def mute(how: str) -> Iterator[None]:
    """A standard error that takes nothing, inside this block."""
    end, pipe = os.pipe()
    os.close(end)
    stderr = open(pipe if how == "unread" else "/dev/full", "w", buffering=1)  # noqa: SIM115
    if how != "unread":
        os.close(pipe)
    if how == "closed":
        stderr.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        yield
    with suppress(OSError):  # what is left in its buffer
        stderr.close()


@MUTE
@pytest.mark.parametrize("how", ["full", "closed", "unread"])
def test_what_cannot_be_said_does_not_change_how_a_command_ends(
    run_apt: RunApt, doing: Callable[[Any], None], how: str
) -> None:
    def warns(args: Namespace) -> int:
        warnings.warn("this is passed over", AptWarning, stacklevel=1)
        print("done")
        return 0

    doing(warns)
    with mute(how):
        assert run_apt("profile", "list") == (0, "done\n", "")
    stopped = TrainingError("stopped by Ctrl-C", hint="go on with it")
    stopped.exit_code = 130
    for error, code in (
        (ConfigError("no good", hint="make it better"), 2),
        (OSError(28, "No space left on device"), 2),
        (KeyError("x"), 1),
        (stopped, 130),
        (KeyboardInterrupt(), 130),
    ):
        doing(raises(error))
        with mute(how):
            assert run_apt("profile", "list") == (code, "", "")


@MUTE
@pytest.mark.parametrize("how", ["full", "closed", "unread"])
def test_nor_do_a_traceback_and_the_last_words_of_a_plugin(
    run_apt: RunApt, doing: Callable[[Any], None], how: str
) -> None:
    doing(raises(ConfigError("no good")))
    with mute(how):
        assert run_apt("--debug", "profile", "list") == (2, "", "")
    doing(raises(SystemExit("no")))
    with mute(how):
        assert run_apt("profile", "list") == (1, "", "")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has another shell")
def test_what_cannot_be_said_is_not_said_elsewhere() -> None:
    env = {**os.environ, "PYTHONPATH": SOURCE}
    closed = f"exec {shlex.quote(sys.executable)} -m apt profile lst 2>&-"
    result = subprocess.run(["sh", "-c", closed], env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has another shell")
@pytest.mark.parametrize(
    ("call", "code", "err"),
    [("profile list", 0, ""), ("--help", 0, ""), ("profile lst", 2, "error: apt profile: 'lst' is none of")],
)
def test_a_standard_output_that_is_closed_takes_nothing_and_ends_nothing(call: str, code: int, err: str) -> None:
    env = {**os.environ, "PYTHONPATH": SOURCE}
    closed = f"exec {shlex.quote(sys.executable)} -m apt {call} >&- <&-"
    result = subprocess.run(["sh", "-c", closed], env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr[: len(err) or None]) == (code, "", err)


def test_letters_that_the_terminal_lacks_do_not_end_a_command() -> None:
    program = (
        "import sys; from apt.cli import commands, main\n"
        "commands.run_profile_list_command = lambda args: print('\\u00e9\\U0001d11e') or 0\n"
        "sys.exit(main.main(['profile', 'list']))"
    )
    env = {**os.environ, "PYTHONPATH": SOURCE, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "\\xe9\\U0001d11e\n", "")


def test_a_reader_that_leaves_is_no_error() -> None:
    env = {**os.environ, "PYTHONPATH": SOURCE}
    child = subprocess.Popen(
        [sys.executable, "-m", "apt", "--help"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.close()
    _, err = child.communicate()
    assert (child.returncode, err) == (main.BROKEN_PIPE, "")


SMALL_RUN = """
name: small
model: {d_model: 16, num_heads: 2, num_layers: 1, max_seq_len: 16}
data: {train_path: text.txt, cache_dir: cache, tokenizer: char}
training: {max_epochs: 1, max_steps: 2, batch_size: 2, eval_batches: 1}
hardware: {device: cpu}
"""


def test_training_goes_on_without_its_reader(run_apt: RunApt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 40)
    (tmp_path / "small.yaml").write_text(SMALL_RUN)
    end, pipe = os.pipe()
    os.close(end)
    with open(pipe, "w", buffering=1) as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert run_apt("train", "-p", "small.yaml") == (0, "", "")
    assert find_run(output_dir="runs").has_checkpoints()


PLUGIN = """
from apt.hookspecs import hookimpl

API_VERSION = (1, 0)

@hookimpl
def apt_register_providers(registry):
    registry.register("router", "toy", "toy_router:Router", version="0.1")

@hookimpl
def apt_register_commands(commands):
    commands.add("toy-hello", "greet", lambda parser: None, lambda args: 0)
"""


@pytest.mark.parametrize("call", [["--help"], ["plugin-list"], ["plugin-list", "--json"], ["--version"]])
def test_listing_imports_nothing_heavy(make_distribution: MakeDistribution, call: list[str]) -> None:
    site = make_distribution(
        "apt-toy", plugins={"toy": "toy_plugin"}, modules={"toy_plugin": PLUGIN, "toy_router": "import torch"}
    )
    heavy = {"torch", "pydantic", "numpy", "rich", "ruamel.yaml", "yaml", "tokenizers", "toy_router"}
    heavy |= {"argparse"} if "plugin-list" not in call else set()
    program = (
        f"import sys; from apt.cli.main import main; code = main({call!r})\n"
        f"print('heavy:', *sorted({heavy!r} & set(sys.modules))); sys.exit(code)"
    )
    env = {**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{site}"}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    *shown, last = result.stdout.splitlines()
    assert last == "heavy:"
    assert ("--version" in call) or any("toy" in line for line in shown)


def test_python_m_apt_is_the_program() -> None:
    env = {**os.environ, "PYTHONPATH": SOURCE}
    result = subprocess.run([sys.executable, "-m", "apt", "profile", "lst"], env=env, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: apt profile: 'lst' is none of")
