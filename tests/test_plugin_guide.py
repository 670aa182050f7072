"""docs/plugins.md, run from top to bottom as an author would, in an empty folder and a fresh environment.

A block of `sh` is run; one of `text` behind it is what it prints, line by line, with other lines between; one of `diff`
is applied to the plugin; any other block stands in one of the plugin's files.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from checkout import ROOT

GUIDE = ROOT / "docs/plugins.md"
PROGRAMS = {"apt": "apt", "pip": "pip", "pytest": "pytest -p apt.testing.pytest_plugin", "hatchling": "hatchling"}
"""What the guide calls -> the module that is run in the environment, with arguments."""


def blocks() -> list[tuple[str, str]]:
    """(language, content) of every fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def environment(tmp_path: Path, home: Path) -> dict[str, str]:
    """The variables of an environment of its own, which sees the libraries of this one and the sources of core, and
    into which pip installs without asking the network."""
    folder = tmp_path / "venv"
    venv.create(folder, symlinks=True)
    paths = {name: sysconfig.get_path(name, vars={"base": str(folder)}) for name in ("purelib", "scripts")}
    sources = [str(source) for source in (ROOT / "packages").glob("*/src")]
    Path(paths["purelib"], "outside.pth").write_text("\n".join([*sources, sysconfig.get_path("purelib")]))
    for name, module in PROGRAMS.items():
        program = Path(paths["scripts"], name)
        program.write_text(f'#!/bin/sh\nexec "{paths["scripts"]}/python" -m {module} "$@"\n')
        program.chmod(0o755)
    known = {
        name: value for name, value in os.environ.items() if not name.startswith(("APT_", "COV_", "PYTHON", "PYTEST_"))
    }
    return known | {
        "PATH": os.pathsep.join([paths["scripts"], os.environ["PATH"]]),
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
        "NO_COLOR": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it the other way round
    }


@pytest.mark.timeout(600)
def test_the_guide_runs_as_it_stands(environment: dict[str, str], tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("the guide's changes are applied with git, which is not installed")
    folder, said = tmp_path, ""
    for language, content in blocks():
        if language == "sh":
            script = f"set -e\n{content}\npwd > {tmp_path}/where"
            done = subprocess.run(
                ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
            )
            said = done.stdout + done.stderr
            assert done.returncode == 0, f"{content}\n{said}"
            folder = Path((tmp_path / "where").read_text().strip())
        elif language == "text":
            rest = said
            for line in content.splitlines():
                assert line in rest, f"not printed, or not in this order: {line}\n{said}"
                rest = rest.partition(line)[2]
        elif language == "diff":
            subprocess.run(["git", "apply", "--unidiff-zero", "-"], cwd=folder, input=content, text=True, check=True)
        else:
            files = [path.read_text() for path in folder.rglob("*") if path.suffix in (".py", ".toml", ".yml")]
            assert any(content in text for text in files), f"stands in no file of the plugin:\n{content}"
    assert folder == tmp_path / "apt-sliding-window"
    assert list(folder.glob("dist/*.whl"))
    tidy = subprocess.run([sys.executable, "-m", "ruff", "--version"], capture_output=True)
    if tidy.returncode == 0:
        for command in (["check"], ["format", "--check"]):
            subprocess.run([sys.executable, "-m", "ruff", *command, "--no-cache"], cwd=folder, check=True)
