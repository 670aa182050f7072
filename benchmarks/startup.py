"""Start-up: the CPU time of `apt --help`, and of `apt plugin-list` with 150 distributions installed.

    python benchmarks/startup.py --help-at-most 80 --plugin-list-at-most 150

The distributions are made up for the occasion, in a folder on PYTHONPATH; five of them are plugins that register
providers. The figures are user plus system time of the whole process, medians; `python -c pass` stands beside them, for
most of what is left is Python's own. Modules are compiled before, as after an installation.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import apt

PLUGIN = """
from apt.hookspecs import hookimpl

API_VERSION = (1, 0)


@hookimpl
def apt_register_providers(registry):
    registry.register("attention", "made_up_{number}", "made_up_{number}.attention:Attention", version="1.0")
    registry.register("ffn", "made_up_{number}", "made_up_{number}.ffn:FFN", version="1.0")
"""

METADATA = """Metadata-Version: 2.4
Name: made-up-{number}
Version: 1.{number}
Summary: One of many
{classifiers}Requires-Python: >=3.11
Requires-Dist: apt-core

{text}"""


def install(folder: Path, distributions: int, plugins: int) -> None:
    """Write as many distributions as pip would leave them, the first of which are plugins."""
    for number in range(distributions):
        info = folder / f"made_up_{number}-1.{number}.dist-info"
        info.mkdir()
        classifiers, text = "Classifier: Topic :: Benchmark\n" * 15, "Nothing to see here.\n" * 150
        (info / "METADATA").write_text(METADATA.format(number=number, classifiers=classifiers, text=text))
        (info / "RECORD").write_text("")
        if number < plugins:
            (info / "entry_points.txt").write_text(f"[apt.providers]\nmade-up-{number} = made_up_plugin_{number}\n")
            (folder / f"made_up_plugin_{number}.py").write_text(PLUGIN.format(number=number))
        elif number % 3 == 0:
            (info / "entry_points.txt").write_text(f"[console_scripts]\nmade-up-{number} = made_up_{number}:main\n")


def cpu_ms(command: list[str], env: dict[str, str], runs: int) -> float:
    """Median CPU time of a command in milliseconds, after two runs that compile and fill caches."""
    times = []
    for run in range(runs + 2):
        child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.stderr is not None
        complaint = child.stderr.read().decode()
        if child.returncode != 0 or complaint:
            raise SystemExit(f"{' '.join(command)} failed: {complaint}")
        if run >= 2:
            times.append((usage.ru_utime + usage.ru_stime) * 1e3)
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="of each")
    parser.add_argument("--distributions", type=int, default=150)
    parser.add_argument("--plugins", type=int, default=5, help="of those")
    parser.add_argument("--help-at-most", type=float, metavar="MS", help="exit 1 if `apt --help` costs more")
    parser.add_argument(
        "--plugin-list-at-most", type=float, metavar="MS", help="exit 1 if `apt plugin-list` costs more"
    )
    args = parser.parse_args()
    source = str(Path(apt.__file__).parents[1])
    with tempfile.TemporaryDirectory() as folder:
        site, compiled = Path(folder, "site"), Path(folder, "compiled")
        site.mkdir()
        install(site, args.distributions, args.plugins)
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        env |= {"PYTHONPATH": source, "PYTHONPYCACHEPREFIX": str(compiled), "APT_CACHE_DIR": str(Path(folder, "cache"))}
        many = env | {"PYTHONPATH": os.pathsep.join([source, str(site)])}
        program = [sys.executable, "-m", "apt"]
        rows = [
            ("python -c pass", cpu_ms([sys.executable, "-c", "pass"], env, args.runs), None),
            ("apt --help", cpu_ms([*program, "--help"], env, args.runs), args.help_at_most),
            (
                f"apt plugin-list, {args.distributions} distributions, {args.plugins} of them plugins",
                cpu_ms([*program, "plugin-list"], many, args.runs),
                args.plugin_list_at_most,
            ),
        ]
    width = max(len(name) for name, _, _ in rows)
    for name, cost, limit in rows:
        print(f"{name:<{width}}  {cost:>6.1f} ms" + (f"  (at most {limit:.0f})" if limit is not None else ""))
    return int(any(limit is not None and cost > limit for _, cost, limit in rows))


if __name__ == "__main__":
    sys.exit(main())
