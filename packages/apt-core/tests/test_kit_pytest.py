"""The conformance kit as an author of a provider meets it: a test file, run by pytest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import apt

TEST_FILE = """
import sys
sys.path.insert(0, {here!r})
from kit_references import PlainFFN, PlainFFNLayer
from apt.testing import parametrize_with_checks


class Layer(PlainFFNLayer):
    def forward(self, x):
        return self.down(self.up(x))


class Wrong(PlainFFN):
    Layer = Layer


@parametrize_with_checks("ffn", PlainFFN, at_least=20, name="plain")
def test_right(check):
    check()


@parametrize_with_checks("ffn", Wrong, {{"dropout_acts": "nothing to drop", "gradcheck": "a guess"}}, at_least=99)
def test_wrong(check):
    check()
"""


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(apt.__file__).parent.parent)
    plugin = [] if _is_installed() else ["-p", "apt.testing.pytest_plugin"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--strict-markers", *plugin, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def _is_installed() -> bool:
    from importlib_metadata import entry_points

    return any(point.value == "apt.testing.pytest_plugin" for point in entry_points(group="pytest11"))


def test_a_test_file_of_an_author(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(TEST_FILE.format(here=str(Path(__file__).parent)))
    done = run_pytest(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    said = done.stdout
    for line in (
        "PASSED test_mine.py::test_right[causality]".replace("causality", "output_shape"),
        "PASSED test_mine.py::test_right[count_of_checks]",
        "XFAIL test_mine.py::test_wrong[dropout_acts] - nothing to drop",
        "FAILED test_mine.py::test_wrong[gradcheck] - ",
        "FAILED test_mine.py::test_wrong[count_of_checks] - ",
        "slow: run it with --slow-checks",
    ):
        assert line in said, said
    assert "2 failed" in said
    assert "it is expected to fail (a guess) and passes" in said


def test_a_slip_in_the_expected_failures_stops_the_collection(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        TEST_FILE.format(here=str(Path(__file__).parent)).replace("gradcheck", "gradchek")
    )
    done = run_pytest(tmp_path, "-q")
    assert done.returncode == 2
    assert "did you mean 'gradcheck'" in done.stdout


def test_pytest_starts_without_torch(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text(
        "import sys\n\ndef test_light():\n"
        "    assert 'apt.testing.pytest_plugin' in sys.modules\n"
        "    assert not {'torch', 'numpy', 'pydantic', 'pluggy.nothing'} & set(sys.modules)\n"
    )
    done = run_pytest(tmp_path, "-q", "-p", "no:hypothesispytest", "-p", "no:xdist", "-p", "no:pytest_cov")
    assert done.returncode == 0, done.stdout
