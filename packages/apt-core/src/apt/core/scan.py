"""What each plugin registers, found out once and remembered, so that listing plugins imports none of them.

A plugin that is not known yet is imported in a process of its own: what hangs there is stopped by a time limit, what
crashes ends that process alone. What it brought, or why it cannot be used, is kept in the cache until its own files are
others, or another distribution comes or goes.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt.core.cache import atomic_write, cache_dir
from apt.core.errors import UsageError
from apt.core.examine import Contents, examine
from apt.core.hooks import SPEC_NAMES
from apt.hookspecs import API_VERSION

if TYPE_CHECKING:
    from apt.core.discovery import Plugin

FORMAT = 1
KEPT = 20
"""How many environments are remembered."""

IMPORT_SECONDS = 20.0
"""How long an import may take. A plugin module that registers import strings takes milliseconds; one that imports torch
takes two seconds, and on a busy machine ten. APT_IMPORT_SECONDS is another limit."""


def contents_of(plugins: Sequence[Plugin], *, refresh: bool = False) -> list[Contents]:
    """What each of these plugins brings, from the cache as far as it is known.

    Args:
        refresh: look at all of them again.

    Raises:
        UsageError: APT_IMPORT_SECONDS is no number of seconds.
    """
    seconds = _limit(os.environ)
    path = cache_dir("plugins") / f"{_environment()}.json"
    stamps = {plugin.entry_point: plugin.stamp() for plugin in plugins}
    known = _read(path, seconds)
    fresh = {entry: known[entry, stamp] for entry, stamp in stamps.items() if not refresh and (entry, stamp) in known}
    unknown = [plugin for plugin in plugins if plugin.entry_point not in fresh]
    if unknown:
        for plugin, contents in zip(unknown, _examine_apart(unknown, seconds), strict=True):
            fresh[plugin.entry_point] = contents
        current = {(entry, stamps[entry]): contents for entry, contents in fresh.items()}
        others = {key: contents for key, contents in known.items() if key[0] not in stamps}
        _write(path, others | current)
    return [fresh[plugin.entry_point] for plugin in plugins]


# In a process of its own

BOOT = """\
import json, sys
with open(sys.argv[1], encoding="utf-8") as file:
    request = json.load(file)
sys.path[:] = request["path"]
from apt.core.scan import child
child(**request)
"""


def _examine_apart(plugins: Sequence[Plugin], seconds: float) -> Iterator[Contents]:
    """Examine plugins in a child process; the one in which a child ends is passed over, and the next child goes on."""
    rest = list(plugins)
    while rest:
        with tempfile.TemporaryDirectory(prefix="apt-plugins-") as name:
            folder = Path(name)
            code = _run_child(folder, rest, seconds)
            lines = _text(folder / "results").split("\n")[:-1]  # what follows the last one was cut off
            stuck = _text(folder / "stuck")
        if not lines:  # no process can be started here, or none that knows where to find us
            yield from (examine(p.name, p.module_name, p.distribution)[0] for p in rest)
            return
        done = [Contents(**json.loads(line)) for line in lines[1:]]
        yield from done
        rest = rest[len(done) :]
        if rest:
            yield _never_came_back(rest.pop(0), code, stuck, seconds)


def _run_child(folder: Path, plugins: Sequence[Plugin], seconds: float) -> int | None:
    """Run a child over these plugins; its exit code, or None if it had to be stopped or could not be started."""
    request = {
        "path": sys.path,
        "folder": str(folder),
        "seconds": seconds,
        "plugins": [(plugin.name, plugin.module_name, plugin.distribution) for plugin in plugins],
    }
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    nothing = subprocess.DEVNULL
    with suppress(subprocess.TimeoutExpired, OSError):
        return subprocess.run(
            [sys.executable or "", "-c", BOOT, str(folder / "request.json")],
            stdin=nothing,
            stdout=nothing,
            stderr=nothing,
            timeout=60 + seconds * (len(plugins) + 1),  # a child stops itself; this is for one that was kept from it
            check=False,
        ).returncode
    return None


def child(path: list[str], folder: str, seconds: float, plugins: list[tuple[str, str, str | None]]) -> None:
    """What the child process does. It never returns."""
    import faulthandler

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it too, in the middle of an import
    with (
        open(Path(folder, "results"), "w", buffering=1, encoding="utf-8") as results,
        open(Path(folder, "stuck"), "w", encoding="utf-8") as stuck,
    ):
        print("ready", file=results)
        for name, module_name, distribution in plugins:
            # A watchdog of the interpreter's own: it ends the process whatever the import is doing, and says where,
            # and leaves no child behind if the parent dies.
            faulthandler.dump_traceback_later(seconds, exit=True, file=stuck)
            contents, _ = examine(name, module_name, distribution)
            faulthandler.cancel_dump_traceback_later()
            contents.portable = _make_portable(contents.providers)
            print(json.dumps(asdict(contents), default=str), file=results)
    os._exit(0)  # whatever threads a plugin has started


def _make_portable(providers: list[dict[str, Any]]) -> bool:
    """Put import strings in the place of classes; whether that could be done for all of them."""
    for provider in providers:
        for key in ("target", "config"):
            cls = provider[key]
            if not isinstance(cls, type):
                continue
            provider[key] = f"{cls.__module__}:{cls.__qualname__}"
            try:
                if operator.attrgetter(cls.__qualname__)(sys.modules[cls.__module__]) is cls:
                    continue
            except (KeyError, AttributeError):
                pass
            providers.clear()
            return False
    return True


def _never_came_back(plugin: Plugin, code: int | None, stuck: str, seconds: float) -> Contents:
    """What to say of the plugin in whose import a child ended."""
    package = plugin.distribution or plugin.module_name
    if stuck or code is None:
        # The innermost frame of the main thread, which is shown last.
        frame = re.search(r'File "([^<].*)", line (\d+)', stuck.rpartition("Thread 0x")[2])
        place = f", at {frame[1]}:{frame[2]}" if frame else ""
        more = f"APT_IMPORT_SECONDS={6 * seconds:g} apt plugin-list"
        return Contents(
            "import-error",
            f"its import had not ended after {seconds:g} s{place}",
            f"uninstall {package}, or give it more time: {more}",
            limit=seconds,
        )
    ended = f"with exit code {code}"
    if code < 0:
        with suppress(ValueError):
            ended = f"by {signal.Signals(-code).name}"
    return Contents("import-error", f"its import ended the whole process, {ended}", f"upgrade or uninstall {package}")


def _limit(environ: Mapping[str, str]) -> float:
    text = environ.get("APT_IMPORT_SECONDS")
    if text is None:
        return IMPORT_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UsageError(f"APT_IMPORT_SECONDS: expected a number of seconds, got {text!r}", hint="unset it, or set 60")
    return seconds


# The cache


def _environment() -> str:
    """What else decides whether an import succeeds: every distribution on the path, Python, and the contract."""
    installed = []
    for folder in dict.fromkeys(sys.path):
        with suppress(OSError), os.scandir(folder or ".") as entries:
            installed += [entry.path for entry in entries if entry.name.endswith((".dist-info", ".egg-info"))]
    contract = [FORMAT, API_VERSION, sorted(SPEC_NAMES), sys.version, sys.executable]
    return hashlib.sha256(json.dumps([contract, sorted(installed)]).encode()).hexdigest()


def _read(path: Path, seconds: float) -> dict[tuple[str, str], Contents]:
    """What is known, {(entry point, stamp): contents}, but for imports that were given less time than now."""
    known = {}
    try:
        for entry, stamp, row in json.loads(path.read_bytes()):
            contents = Contents(**row)
            if contents.limit is None or contents.limit >= seconds:
                known[entry, stamp] = contents
    except (OSError, ValueError, TypeError, RecursionError):  # not there yet, or damaged: it can be made again
        return {}
    return known


def _write(path: Path, known: Mapping[tuple[str, str], Contents]) -> None:
    rows = [(entry, stamp, asdict(contents)) for (entry, stamp), contents in known.items()]
    with suppress(OSError):  # it will be found out again
        with atomic_write(path) as file:
            file.write(json.dumps(rows).encode())
        others = sorted(path.parent.glob("*.json"), key=lambda other: other.stat().st_mtime)
        for other in others[:-KEPT]:
            other.unlink()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
