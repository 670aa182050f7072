"""Discovery with a hundred plugins, ten of them broken in ten ways: what `apt plugin-list` and `apt train` cost with
them beside what they cost with none.

    python benchmarks/discovery.py --later-at-most 300

The distributions are made up for the occasion, in a folder on PYTHONPATH, as pip would leave them. Figures are user
plus system time of the process and of every child that it started, so that work is not hidden by being done elsewhere.
With and without take turns; a later call is the median of `--runs`. The first call looks into a hundred plugins that
nobody has seen yet, and pays in full for the import that never ends: it spins until the time limit (APT_IMPORT_SECONDS,
here `--limit`) stops it. What a first call costs without that one plugin stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import apt

HEAD = "from apt.hookspecs import hookimpl\n\nAPI_VERSION = (1, 0)\n"

GOOD = (
    HEAD
    + """

@hookimpl
def apt_register_providers(registry):
    registry.register("attention", "many_{number}", "many_{number}.attention:Attention", version="1.0")
    registry.register("ffn", "many_{number}", "many_{number}.ffn:FFN", version="1.0")
"""
)

LISTENS = "\n\n@hookimpl\ndef on_step_end(step):\n    pass\n"

BROKEN: dict[str, str | None] = {
    "ImportError": "raise ImportError('half an install')\n",
    "SyntaxError": "def\n",
    "SystemExit": "raise SystemExit(3)\n",
    "endless import": "while True:\n    pass\n",
    "wrong type": HEAD + "@hookimpl\ndef apt_register_providers(registry):\n    registry.register('ffn', 'odd', 42)\n",
    "wrong API": "API_VERSION = (9, 0)\n",
    "duplicate name": GOOD.format(number=99).replace("many_99.", "its_own."),
    "unknown argument": HEAD + "@hookimpl\ndef on_step_end(stp):\n    pass\n",
    "missing dependency": "import not_there_at_all\n",
    "stale entry point": None,
}
"""What is wrong with each broken plugin, and its module; None where the module is gone."""

METADATA = "Metadata-Version: 2.4\nName: {name}\nVersion: 1.{number}\n{more}\n" + "This is what it is.\n" * 100

SMALL = """\
name: small
model: {d_model: 16, num_heads: 2, num_layers: 1, max_seq_len: 16}
data: {train_path: text.txt, cache_dir: tokens}
training: {max_steps: 2, batch_size: 8, eval_batches: 1}
hardware: {device: cpu, threads: 1}
"""


def install(site: Path, plugins: int, *, without: str | None = None) -> None:
    """Write the distributions: the broken ones, and as many good ones as make up `plugins`, every tenth with a hook."""
    broken = {f"broken-{number}": source for number, (what, source) in enumerate(BROKEN.items()) if what != without}
    good = {f"many-{number}": GOOD.format(number=number) for number in range(len(BROKEN), plugins)}
    for number, (name, source) in enumerate({**broken, **good}.items()):
        module = name.replace("-", "_") + "_plugin"
        info = site / f"{name.replace('-', '_')}-1.{number}.dist-info"
        info.mkdir(parents=True)
        needs = "Requires-Dist: not-there>=2\n" if source == BROKEN["missing dependency"] else ""
        (info / "METADATA").write_text(METADATA.format(name=name, number=number, more=needs))
        (info / "entry_points.txt").write_text(f"[apt.providers]\n{name} = {module}\n")
        (info / "RECORD").write_text(f"{module}.py,sha256=made-up-{number},1\n")
        if source is not None:
            listens = name in good and number % 10 == 0
            (site / f"{module}.py").write_text(source + (LISTENS if listens else ""))


def cpu_ms(arguments: list[str], env: dict[str, str], folder: Path) -> float:
    """CPU time of one call of `apt`, its children's included, in milliseconds."""
    call = [sys.executable, "-m", "apt", *arguments]
    child = subprocess.Popen(call, env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    said = child.stderr.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"apt {' '.join(arguments)} ended with {child.returncode}:\n{said}")
    return (usage.ru_utime + usage.ru_stime) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="of each (%(default)s)")
    parser.add_argument("--plugins", type=int, default=100, help="the broken ones included (%(default)s)")
    parser.add_argument("--limit", type=float, default=20.0, metavar="S", help="seconds for an import (%(default)g)")
    parser.add_argument("--later-at-most", type=float, metavar="MS", help="exit 1 if plugins add more to a later call")
    parser.add_argument("--show", action="store_true", help="print what plugin-list says of them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        install(folder / "site", args.plugins)
        install(folder / "ending", args.plugins, without="endless import")
        (folder / "small.yaml").write_text(SMALL)
        (folder / "text.txt").write_text("".join(f"{n} green bottles hanging on the wall\n" for n in range(40)))
        source, cache = str(Path(apt.__file__).parents[1]), folder / "cache"
        unset = ("APT_PLUGINS", "APT_DISABLE_PLUGINS", "PYTHONDONTWRITEBYTECODE")
        none = {key: value for key, value in os.environ.items() if key not in unset}
        none |= {"PYTHONPATH": source, "PYTHONPYCACHEPREFIX": str(folder / "compiled"), "APT_CACHE_DIR": str(cache)}
        none |= {"APT_IMPORT_SECONDS": f"{args.limit:g}", "OMP_NUM_THREADS": "1"}
        many = none | {"PYTHONPATH": os.pathsep.join([source, str(folder / "site")])}
        ending = none | {"PYTHONPATH": os.pathsep.join([source, str(folder / "ending")])}

        calls = {"plugin-list": ["plugin-list"], "train": ["train", "-p", "small.yaml", "--quiet"]}
        rows, worst = [], 0.0
        for command, call in calls.items():
            cpu_ms(call, none, folder)  # compiles what is Python's and ours
            shutil.rmtree(cache, ignore_errors=True)
            first_ending = cpu_ms(call, ending, folder)
            shutil.rmtree(cache, ignore_errors=True)
            first = cpu_ms(call, many, folder)
            pairs = [(cpu_ms(call, none, folder), cpu_ms(call, many, folder)) for _ in range(args.runs)]
            alone, together = (statistics.median(side) for side in zip(*pairs, strict=True))
            low, added, high = statistics.quantiles([b - a for a, b in pairs], n=4)
            spread = f"{added:,.0f} ({low:,.0f} to {high:,.0f})"
            firsts = [f"{first - alone:,.0f}", f"{first_ending - alone:,.0f}"]
            rows.append([command, f"{alone:,.0f}", f"{together:,.0f}", spread, *firsts])
            worst = max(worst, added)
        listing = subprocess.run(
            [sys.executable, "-m", "apt", "plugin-list", "--json"], env=many, cwd=folder, capture_output=True, text=True
        )
    found = [plugin for plugin in json.loads(listing.stdout)["plugins"] if plugin["name"] != "builtin"]
    used = sum(plugin["status"] == "ok" for plugin in found)
    print(
        f"{len(found)} plugins, {used} of them without fault; CPU milliseconds, medians of {args.runs} and quartiles\n"
    )
    head = ["", "with none", "with all", "added", "added, first call", "the same, no endless import"]
    widths = [max(map(len, cells)) for cells in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    if args.show:
        print()
        for plugin in found:
            if plugin["status"] != "ok":
                print(f"{plugin['name']:<9}  {plugin['status']:<18}  {plugin['reason']}\n{'':31}fix: {plugin['fix']}")
    return int(args.later_at_most is not None and worst > args.later_at_most)


if __name__ == "__main__":
    sys.exit(main())
