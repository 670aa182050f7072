"""docs/conformance.md lists the checks that there are, and the mutants that each of them catches.

Run as a script, this file writes that part of it anew.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkout import ROOT

DOC = ROOT / "docs/conformance.md"
MARK = "<!-- What follows is made by: python tests/test_conformance_docs.py -->\n"
TITLES = {
    "provider": "Every provider",
    "layer": "Every layer: attention, FFN, router",
    "attention": "Attention",
    "ffn": "FFN",
    "router": "Router",
    "align": "Align",
    "retrieval": "Retrieval",
    "voter": "Voter",
    "quant": "Quant",
    "dataset": "Dataset",
    "tokenizer": "Tokenizer",
    "tracker": "Tracker",
}

NEEDS = {
    "config": "it has a `Config`",
    "context": "its forward takes a `context`",
    "mha": '`weights_layout` is "mha"',
}


def render() -> str:
    """The tables, as Markdown."""
    sys.path.insert(0, str(ROOT / "packages/apt-core/tests"))
    try:
        from test_kit_mutants import MUTANTS
    finally:
        del sys.path[0]
    from apt.core.catalogue import KINDS
    from apt.testing import checks_of

    catches: dict[Any, list[str]] = {}
    for name, (kind, _, aim) in MUTANTS.items():
        catches.setdefault(checks_of(kind)[aim].function, []).append(name)
    groups: dict[str, dict[Any, tuple[Any, list[str]]]] = {title: {} for title in TITLES}
    for kind in KINDS:
        for check in checks_of(kind).values():
            home = check.function.__module__.rpartition(".")[2].partition("_")[0]
            _, kinds = groups[home].setdefault(check.function, (check, []))
            kinds.append(kind)
    counts = ", ".join(f"{kind} {len(checks_of(kind))}" for kind in KINDS)
    different = sum(map(len, groups.values()))
    of_attention = sum(kind == "attention" for kind, _, _ in MUTANTS.values())
    lines = [
        "## The checks, and what they catch",
        "",
        f"There are {different} of them; those that kinds share counted for each: {counts}.",
        "",
        f"The kit is itself tested with {len(MUTANTS)} *mutants*, {of_attention} of them of attention: plain correct",
        "providers with one thing changed. Each is caught by the check that is aimed at it, each check catches at",
        "least one, and the plain providers and core's own pass. What each mutant does wrong is listed at the end.",
    ]
    for home, checks in groups.items():
        lines += ["", f"### {TITLES[home]}", "", "| check | what it proves, and why | catches |", "|---|---|---|"]
        lines += list(_rows(home, checks, catches))
    lines += ["", "### The mutants", "", "| mutant | kind | what is wrong | caught by |", "|---|---|---|---|"]
    for name, (kind, provider, aim) in MUTANTS.items():
        lines.append(f"| {name} | {kind} | {_cell(provider.__doc__)} | `{aim}` |")
    return "\n".join(lines) + "\n"


def _rows(home: str, checks: dict[Any, tuple[Any, list[str]]], catches: dict[Any, list[str]]) -> Iterator[str]:
    for function, (check, kinds) in checks.items():
        notes = [f"where {' and '.join(NEEDS.get(need, f'it claims `{need}`') for need in check.needs)}"]
        notes = notes if check.needs else []
        notes += ["may be refused"] if check.may_refuse else []
        notes += ["slow"] if check.slow else []
        if home == "layer" and len(kinds) < 3:
            notes.append(" and ".join(kinds) + " alone")
        note = f" *({'; '.join(notes)})*" if notes else ""
        yield f"| `{check.name}` | {_cell(check.summary)}{note} | {', '.join(catches.get(function, []))} |"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def test_the_tables_are_those_of_the_kit() -> None:
    written = DOC.read_text(encoding="utf-8").partition(MARK)[2]
    assert written.strip() == render().strip(), "write them anew: python tests/test_conformance_docs.py"


def test_the_readme_has_the_same_figures() -> None:
    tables = DOC.read_text(encoding="utf-8").partition(MARK)[2]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for ours, theirs in (
        (r"There are (\d+) of them", r"a conformance kit of (\d+) properties"),
        (r"tested with (\d+) \*mutants\*", r"tested with (\d+) subtly wrong providers"),
    ):
        assert re.findall(theirs, readme) == re.findall(ours, tables)


def test_the_example_runs_as_it_stands(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "test_toy.py").write_text(example)
    source = [ROOT / "packages/apt-core/src", ROOT / "tests/thirdparty/apt-toy/src"]
    plugin = ["-p", "apt.testing.pytest_plugin"] if not _is_installed() else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *plugin],
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(map(str, source)), "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "PASSED test_toy.py::test_conformance[gradcheck]" in done.stdout, done.stdout + done.stderr
    assert (
        "XFAIL test_toy.py::test_conformance[dropout_keeps_the_mean] - each head is normed behind its weights"
        in done.stdout
    )
    assert done.returncode == 0, done.stdout


def _is_installed() -> bool:
    from importlib_metadata import entry_points

    return any(point.value == "apt.testing.pytest_plugin" for point in entry_points(group="pytest11"))


if __name__ == "__main__":
    sys.path[:0] = [str(path) for path in (ROOT / "packages").glob("*/src")]
    before = DOC.read_text(encoding="utf-8").partition(MARK)[0]
    DOC.write_text(f"{before}{MARK}\n{render()}", encoding="utf-8")
