"""Every hostile file of the fault suite but the largest, here in one process; the suite measures time and memory."""

from __future__ import annotations

import sys
from pathlib import Path

import fuzz
import hostile
import hostile_folders
import pytest

from apt.cli.main import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Windows has no pipes and links of this kind")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("APT_CACHE_DIR", str(tmp_path / "cache"))
    for variable in ("APT_PLUGINS", "APT_DISABLE_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("case", hostile.PROFILES)
def test_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    make, says = hostile.PROFILES[case]
    assert main(["train", "-p", make(tmp_path)]) == 2
    assert not hostile.refused(capsys.readouterr().err.splitlines(), says)
    assert not (tmp_path / "runs").exists(), "nothing is left of a run that never began"


@pytest.mark.parametrize("case", [case for case in hostile.DATA if case not in hostile.LARGE])
def test_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    make, says = hostile.DATA[case]
    (tmp_path / "small.yaml").write_text(hostile.SMALL)
    code = main(["train", "-p", "small.yaml", "--data.train_path", make(tmp_path)])
    out, error = capsys.readouterr()
    if says == hostile.TRAINS:
        assert code == 0 and says in out, error
    else:
        assert code == 2 and not hostile.refused(error.splitlines(), says)
        assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("case", hostile_folders.CASES)
def test_a_folder(tmp_path: Path, case: str) -> None:
    if "store" in case:
        pytest.importorskip("bm25s", reason="stores of passages need it")
    assert not hostile_folders.problem_of(case, tmp_path / "root")


def test_a_snapshot_of_the_hubs_cache_is_no_escape(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x/snapshots/0", tmp_path / "models--x/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in fuzz.llama(snapshot):
        path.rename(blobs / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    hostile_folders.import_model(snapshot)
    assert (snapshot.parent / "out/profile.yaml").is_file()


def test_what_is_refused_with_more_than_a_line_or_elsewhere_is_noticed() -> None:
    assert not hostile.refused(["error: a:1: b", "  fix: c"], "a:1")
    for lines in (["error: a:2: b"], ["a:1: b"], ["error: a:1", "b", "c"], ["Traceback", "error: a:1"], []):
        assert hostile.refused(lines, "a:1")
