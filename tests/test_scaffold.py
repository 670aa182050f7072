"""What `apt plugin-new` writes, for every kind and unedited: built, installed, listed, and put to its own tests, among
which is the conformance kit and, where the kind takes part in it, a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT, Apt
from hatchling.build import build_sdist, build_wheel

from apt.cli.scaffold import STARTERS


@pytest.mark.parametrize("kind", STARTERS)
def test_what_is_written_builds_installs_is_listed_and_passes_its_own_tests(
    kind: str, apt: Apt, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = apt("plugin-new", "third-party", "--kind", kind).stdout
    assert said.splitlines()[-3:-1] == ["  pip install -e './apt-third-party[test]'", "  pytest apt-third-party"]
    folder = tmp_path / "apt-third-party"

    site = install(folder, tmp_path, monkeypatch)
    listing = json.loads(apt("plugin-list", "--json", path=[site]).stdout)
    plugin = next(entry for entry in listing["plugins"] if entry["name"] == "third_party")
    assert (plugin["distribution"], plugin["version"], plugin["status"]) == ("apt-third-party", "0.1.0", "ok")
    assert "third_party" in [entry["name"] for entry in listing["providers"][kind]]

    sources = [str(source) for source in (ROOT / "packages").glob("*/src")]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("APT_", "COV_", "PYTEST_"))}
    env |= {"PYTHONPATH": os.pathsep.join([str(site), *sources]), "HOME": str(home), "OMP_NUM_THREADS": "1"}
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "apt.testing.pytest_plugin"],
        cwd=folder, env=env, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert tests.returncode == 0, tests.stdout + tests.stderr


def install(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Build sdist and wheel as pip would, and unpack the wheel as pip would."""
    monkeypatch.chdir(folder)
    dist, site = tmp_path / "dist", tmp_path / "site"
    dist.mkdir()
    assert build_sdist(str(dist)) == "apt_third_party-0.1.0.tar.gz"
    with zipfile.ZipFile(dist / build_wheel(str(dist))) as wheel:
        wheel.extractall(site)
    return site
