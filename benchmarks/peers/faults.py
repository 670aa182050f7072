"""The same faults for APT, Hugging Face's Trainer and Lightning: `python benchmarks/peers/faults.py --work DIR`.

Makes an environment for each of the other two under DIR with pip; APT is that of this checkout, and this Python must
have what it requires. Tries every fault of `experiments.py` on each, one after the other (half an hour on two busy
cores; with `--points 12` it fails at twelve operations instead of all), and prints the table. `--write` puts it
into docs/peers.md. Linux on x86-64 only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from system_calls import supported

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "peers.md"
TORCH = "torch==2.13.0"
PEERS = {
    "apt": (),
    "hf": ("transformers==5.23.0", "accelerate==1.15.0"),
    "lightning": ("lightning==2.6.6", "torchdata==0.11.0"),
}
"""{trainer: what pip installs for it}."""
BEGIN, END = "<!-- the table of benchmarks/peers/faults.py -->\n", "<!-- its end -->\n"


def environment(work: Path, name: str) -> Path:
    """The Python that has a trainer; it is made where it is not there yet."""
    if not PEERS[name]:
        return Path(sys.executable)
    folder = work / f"env-{name}"
    python = folder / "bin" / "python"
    done = folder / "installed.txt"
    wanted = "\n".join((TORCH, *PEERS[name]))
    if not done.exists() or done.read_text() != wanted:
        print(f"installing {', '.join(PEERS[name])} into {folder}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        install = (str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"))
        subprocess.run([*install, TORCH, *PEERS[name]], check=True)
        done.write_text(wanted)
    return python


def results_of(work: Path, name: str, options: Sequence[str]) -> dict[str, Any]:
    """Try every fault on one trainer."""
    source = str(ROOT / "packages" / "apt-core" / "src")
    known = {key: value for key, value in os.environ.items() if not key.startswith("APT_")}
    known |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": source if name == "apt" else ""}
    command = (str(environment(work, name)), str(HERE / "experiments.py"), name, "--work", str(work / name))
    done = subprocess.run([*command, *options], env=known, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A column for each trainer, a row for each experiment."""
    heads = []
    for result in results:
        first, *more = (f"{package} {version}" for package, version in result["versions"].items())
        heads.append(f"{result['name']} ({', '.join([first, *more])})")
    lines = [f"| fault | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for row in zip(*(result["rows"] for result in results), strict=True):
        labels = {cell["experiment"] for cell in row}
        assert len(labels) == 1, labels
        lines.append(f"| {labels.pop()} | {' | '.join(map(cell_text, row))} |")
    return "\n".join(lines) + "\n"


def cell_text(cell: Mapping[str, Any]) -> str:
    counted = f"{cell['good']} of {cell['of']}" if cell["of"] else ""
    return "; ".join(filter(None, [counted, cell["said"]])) or "-"


def put_in(page: str, new: str) -> str:
    """A page with the table in it replaced."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"the page has no place for the table: {BEGIN.strip()} ... {END.strip()}"
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where to install and to train; 2 GB")
    parser.add_argument("--points", type=int, metavar="N", help="fail at N operations, spread evenly, instead of all")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    if why := supported():
        parser.error(why)
    if args.points is not None and args.points < 2:
        parser.error("--points must be 2 or more")
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    options = ("--points", str(args.points)) if args.points else ()
    try:
        results = [results_of(work, name, options) for name in PEERS]
    except subprocess.CalledProcessError as error:
        parser.exit(1, f"{' '.join(error.cmd)} ended with {error.returncode}\n")
    (work / "results.json").write_text(json.dumps(results, indent=1))
    text = table(results)
    print(text)
    for result in results:
        for cell in result["rows"]:
            for reason, count in cell["wrong"].items():
                print(f"{result['name']}, {cell['experiment']}, {count} of {cell['of']}: {reason}")
    if args.write:
        PAGE.write_text(put_in(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
