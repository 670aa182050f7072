"""What a distribution's files come to in one hash, and when that hash changes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.core.distributions import record_sha256, sources_sha256, sources_stamp
from apt.core.requirements import missing_requirements

WHEEL = """\
toy/__init__.py,sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0
toy/plugin.py,sha256=aaa,12
toy-1.0.dist-info/METADATA,sha256=bbb,300
toy-1.0.dist-info/entry_points.txt,sha256=ccc,40
"""
INSTALLER = """\
../../../bin/toy,sha256=ddd,200
"../../share/a, b",sha256=ddd,200
/etc/toy.conf,sha256=ddd,200
toy-1.0.dist-info/INSTALLER,sha256=eee,4
toy-1.0.dist-info/REQUESTED,sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0
toy-1.0.dist-info/direct_url.json,sha256=fff,90
toy-1.0.dist-info/RECORD,,
toy/__pycache__/plugin.cpython-311.pyc,,
"""


@given(st.permutations(WHEEL.splitlines() + INSTALLER.splitlines()), st.booleans())
def test_a_wheel_has_one_hash_wherever_it_is_installed(lines: list[str], installers: bool) -> None:
    kept = lines if installers else [line for line in lines if line in WHEEL.splitlines()]
    assert record_sha256("\n".join(kept)) == record_sha256(WHEEL)


@pytest.mark.parametrize("line", WHEEL.splitlines())
def test_every_file_of_a_wheel_counts(line: str) -> None:
    without, other = WHEEL.replace(f"{line}\n", ""), WHEEL.replace(line, line.replace("sha256=", "sha256=X"))
    assert len({record_sha256(WHEEL), record_sha256(without), record_sha256(other)}) == 3


@pytest.mark.parametrize("record", [None, "", INSTALLER, "nonsense", "toy.py,,"])
def test_a_record_that_lists_nothing_has_none(record: str | None) -> None:
    assert record_sha256(record) is None


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `made_up_sources` on the path."""
    folder = tmp_path / "made_up_sources"
    (folder / "deep").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    (folder / "deep" / "part.py").write_text("x = 1")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_sources_are_hashed_by_content_and_stamped_by_time(package: Path) -> None:
    def both() -> tuple[str | None, str]:
        return sources_sha256("made_up_sources.deep.part"), sources_stamp("made_up_sources.deep.part")

    content, stamp = both()
    part = package / "deep/part.py"
    os.utime(part, ns=(1, 1))
    assert both()[0] == content and both()[1] != stamp, "touched"
    part.write_text("x = 2")
    assert both()[0] != content
    content, stamp = both()
    (package / "deep/__pycache__").mkdir()
    (package / "deep/__pycache__/part.cpython-311.pyc").write_bytes(b"")
    (package / ".hidden").mkdir()
    (package / ".hidden/x.py").write_text("")
    (package / "notes.txt").write_text("")
    assert both() == (content, stamp), "what is no source does not count"
    part.rename(package / "part.py")
    assert both()[0] != content, "nor is a file elsewhere the same"
    assert "made_up_sources" not in sys.modules


def test_a_module_of_one_file_and_one_that_is_not_there(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package.parent / "made_up_single.py").write_text("x = 1")
    before = sources_sha256("made_up_single")
    (package.parent / "made_up_single.py").write_text("x = 2")
    assert None not in (before, sources_sha256("made_up_single")) and before != sources_sha256("made_up_single")
    assert sources_sha256("made_up_absent") is None and sources_stamp("made_up_absent") == sources_stamp("made_up_no")
    monkeypatch.setitem(sys.modules, "made_up_odd", type(sys)("made_up_odd"))  # a module without a spec
    assert sources_sha256("made_up_odd") is None


def test_requirements_that_are_not_met() -> None:
    marked = ["made-up>=2; python_version >= '3'", "other; python_version < '3'", "x; extra == 'y'"]
    unmet = missing_requirements(["pluggy>=1", "pluggy>=99", *marked])
    assert [requirement for requirement, _ in unmet] == ["pluggy>=99", "made-up>=2"]
    assert unmet[0][1].startswith("pluggy>=99 is not met by the installed 1.")
    assert unmet[1][1] == "made-up>=2 is not installed"
