"""Calls of the system's own apt: recognised, passed on unchanged, and never in a circle."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fixture_types import RunApt

import apt
from apt.cli import system_apt
from apt.cli.overview import COMMANDS

SOURCE = str(Path(apt.__file__).parents[1])
SYSTEM_PYTHON = Path("/usr/bin/python3")
PYTHON3_APT = Path("/usr/lib/python3/dist-packages/apt/__init__.py")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def passed_on(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Instead of becoming another program, write down what would have been called."""
    calls: list[list[str]] = []

    def execv(path: str, arguments: list[str]) -> None:
        calls.append([path, *arguments])
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setenv(system_apt.MARK, "")
    return calls


def test_no_command_of_ours_takes_a_word_of_the_systems_apt() -> None:
    assert not system_apt.WORDS & COMMANDS.keys()


@pytest.mark.skipif(not Path(system_apt.USUAL_PLACE).exists(), reason="this system has no apt")
def test_every_command_that_the_systems_apt_tells_of_is_known() -> None:
    text = subprocess.run(
        [system_apt.USUAL_PLACE, "--help"], capture_output=True, text=True, env={"LC_ALL": "C"}
    ).stdout
    words = re.findall(r"^  ([a-z-]+) - ", text, re.MULTILINE)
    assert "install" in words
    assert set(words) <= system_apt.WORDS


@pytest.mark.parametrize(
    "call",
    [
        "install x",
        "-y install x",
        "-o A=B -t stable update",
        "--option A=B --yes list --installed",
        "-qq -oA=B show x",
        "--target-release=sid full-upgrade",
        "moo",
        "--debug search x",
    ],
)
def test_calls_that_are_the_systems(call: str) -> None:
    assert system_apt.is_meant_for_it(call.split())


@pytest.mark.parametrize(
    "call",
    ["", "--help", "train -p install", "profile list", "profile show x", "-o install", "-t update --help", "help"],
)
def test_calls_that_are_ours(call: str) -> None:
    assert not system_apt.is_meant_for_it(call.split())


def test_first_apt_on_the_path_outside_our_environment_is_the_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed_on: list[list[str]]
) -> None:
    environment, link, own, real = (tmp_path / name for name in ("env", "link", "own", "real"))
    script(environment / "bin" / "apt", "")
    script(own / "apt", "")
    script(real / "apt", "")
    link.mkdir()
    (link / "apt").symlink_to(environment / "bin" / "apt")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "apt").write_text("not a program")
    (tmp_path / "folder" / "apt").mkdir(parents=True)
    monkeypatch.setattr(sys, "prefix", str(environment))
    monkeypatch.setattr(sys, "argv", [str(own / "apt")])
    folders = [environment / "bin", link, own, tmp_path / "plain", tmp_path / "folder", real]
    monkeypatch.setenv("PATH", os.pathsep.join(["", "relative", *map(str, folders)]))
    with pytest.raises(SystemExit):
        system_apt.pass_on(["-y", "install", "a b"])
    assert passed_on == [[str(real / "apt"), str(real / "apt"), "-y", "install", "a b"]]


def test_usual_place_serves_where_the_path_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = script(tmp_path / "usual" / "apt", "")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(system_apt, "USUAL_PLACE", str(usual))
    assert system_apt.find_system_apt() == str(usual)
    monkeypatch.setattr(sys, "argv", [str(usual)])
    assert system_apt.find_system_apt() is None


def test_without_a_systems_apt_one_line_says_so(run_apt: RunApt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_apt, "find_system_apt", lambda: None)
    result = run_apt("install", "x")
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines() == [
        "error: 'apt install x' is a call of the system's apt, and this machine has none",
        "  fix: use this system's own package manager; the commands of APT are shown by: apt --help",
    ]


def test_one_that_cannot_be_run_is_named(run_apt: RunApt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "apt"
    broken.write_bytes(b"\x7fELF no program at all")
    broken.chmod(0o755)
    monkeypatch.setenv(system_apt.MARK, "")
    monkeypatch.setattr(system_apt, "find_system_apt", lambda: str(broken))
    result = run_apt("update")
    assert result.code == 2
    assert result.err.startswith(f"error: the system's apt, {broken}, cannot be run: ")


def test_call_arrives_unchanged_and_its_exit_code_comes_back(tmp_path: Path) -> None:
    script(tmp_path / "apt", 'for word; do echo "<$word>"; done; exit 7')
    env = {**os.environ, "PYTHONPATH": SOURCE, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        [sys.executable, "-m", "apt", "-o", "A=B", "install", "--debug", "two words", "*"],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert result.stdout.split("\n") == ["<-o>", "<A=B>", "<install>", "<--debug>", "<two words>", "<*>", ""]
    assert (result.returncode, result.stderr) == (7, "")


def test_another_of_us_on_the_path_does_not_send_the_call_round_in_circles(tmp_path: Path) -> None:
    usual = script(tmp_path / "usual" / "apt", 'echo "the real one: $*"')
    program = (
        f"import sys; from apt.cli import main, system_apt; system_apt.USUAL_PLACE = {str(usual)!r}; "
        "sys.exit(main.main())"
    )
    script(tmp_path / "bin" / "apt", f'exec {sys.executable} -c "{program}" "$@"')
    env = {**os.environ, "PYTHONPATH": SOURCE, "PATH": str(tmp_path / "bin")}
    result = subprocess.run(
        [tmp_path / "bin" / "apt", "update", "-q"], env=env, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (0, "the real one: update -q\n")


def test_passing_on_imports_next_to_nothing() -> None:
    program = (
        "import os, sys\n"
        "def execv(path, arguments):\n"
        "    print(*sorted(m for m in sys.modules if m.startswith('apt') or m == 'argparse'))\n"
        "    sys.stdout.flush(); os._exit(0)\n"
        "os.execv = execv\n"
        "from apt.cli.main import main; main(['install'])"
    )
    env = {**os.environ, "PYTHONPATH": SOURCE, "PATH": "/usr/bin"}
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    if "has none" in result.stderr:
        pytest.skip("this system has no apt")
    assert result.stdout.split() == ["apt", "apt.cli", "apt.cli.main", "apt.cli.system_apt"]


@pytest.mark.skipif(not PYTHON3_APT.exists() or not SYSTEM_PYTHON.exists(), reason="python3-apt is not installed")
def test_scripts_of_the_systems_python_import_their_own_apt(tmp_path: Path) -> None:
    """While our environment is active, as `source bin/activate` leaves it."""
    program = tmp_path / "script"
    program.write_text("#!/usr/bin/python3\nimport apt, apt_pkg\nprint(apt.__file__, apt_pkg.VERSION)\n")
    program.chmod(0o755)
    env = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "HOME": str(tmp_path),
    }
    result = subprocess.run([program], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{PYTHON3_APT} ")
