"""What each plugin registers, found out once and remembered, so that listing plugins imports none of them.

A plugin that is not known yet is imported in a process of its own: what hangs there is stopped by a time limit, what
crashes ends that process alone. What it brought, or why it cannot be used, is kept in the cache until its own files are
others, or another distribution comes or goes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import operator
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from apt.core.errors import AptError, AptWarning, UsageError
from apt.core.hooks import SPEC_NAMES, Hooks
from apt.core.registry import Registry
from apt.hookspecs import API_VERSION

if TYPE_CHECKING:
    from apt.core.discovery import Plugin

Status = Literal["ok", "disabled", "api-mismatch", "missing-dependency", "conflict", "import-error"]

FORMAT = 1
KEPT = 20
"""How many environments are remembered."""

IMPORT_SECONDS = 10.0
"""How long an import may take: a plugin module that registers import strings takes milliseconds, one that imports torch
seconds. APT_IMPORT_SECONDS is another limit."""


@dataclass(slots=True)
class Contents:
    """What importing a plugin came to."""

    status: Status = "ok"
    reason: str | None = None
    fix: str | None = None
    import_ms: float | None = None
    hooks: list[str] = field(default_factory=list)
    """The hooks that it implements."""
    providers: list[dict[str, Any]] = field(default_factory=list)
    """The arguments of each `registry.register` of its."""
    warnings: list[str] = field(default_factory=list)
    portable: bool = True
    """Whether all of that can be written down: not where a class that it registers has no import string."""
    limit: float | None = None
    """The seconds that it was given and that were not enough."""


def contents_of(plugins: Sequence[Plugin], *, refresh: bool = False) -> list[Contents]:
    """What each of these plugins brings, from the cache as far as it is known.

    Args:
        refresh: look at all of them again.

    Raises:
        UsageError: APT_IMPORT_SECONDS is no number of seconds.
    """
    from apt.core.cache import cache_dir

    if not plugins:
        return []
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


def examine(name: str, module_name: str, distribution: str | None) -> tuple[Contents, ModuleType | None]:
    """Import a plugin in this process and see what it brings; the module, too, if it can be used."""
    contents = Contents()
    started = time.perf_counter()
    module = None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", AptWarning)
        try:
            module = _import(name, module_name, distribution, contents)
        except ModuleNotFoundError as error:
            _lacks(contents, error.name or str(error), module_name, distribution)
        except (Exception, SystemExit) as error:
            text = str(error) if isinstance(error, AptError) else f"{type(error).__name__}: {error}"
            contents.status, contents.reason = "import-error", text.partition("\n")[0]
            contents.fix = f"upgrade or uninstall {distribution or module_name}"
    contents.import_ms = round((time.perf_counter() - started) * 1000, 2)
    contents.warnings = [str(warning.message) for warning in told]
    return contents, module if contents.status == "ok" else None


def _import(name: str, module_name: str, distribution: str | None, contents: Contents) -> ModuleType:
    module = importlib.import_module(module_name)
    theirs = getattr(module, "API_VERSION", None)
    if not _compatible(theirs, API_VERSION):
        declared = "no API_VERSION" if theirs is None else f"API_VERSION = {theirs}"
        newer = isinstance(theirs, tuple) and theirs > API_VERSION
        contents.status = "api-mismatch"
        contents.reason = f"it declares {declared}, this apt-core has {API_VERSION}"
        contents.fix = "upgrade apt-core" if newer else f"ask for a version of {distribution} for API {API_VERSION[0]}"
        return module
    hooks, registry = _checker(), Registry()
    hooks.add(module, name)
    try:
        with registry.owned_by(name, None, None):
            # Straight through pluggy: here a failure is to be raised.
            hooks.manager.hook.apt_register_providers(registry=registry)
        contents.hooks = sorted(caller.name for caller in hooks.manager.get_hookcallers(module) or ())
    finally:
        hooks.manager.unregister(module)
    contents.providers = [claim.arguments() for claim in registry.claims()]
    return module


@functools.cache
def _checker() -> Hooks:
    """One for all plugins in turn: making the specifications known takes longer than many an import."""
    return Hooks()


def _lacks(contents: Contents, missing: str, module_name: str, distribution: str | None) -> None:
    """Say which module is missing: the plugin's own, or one that it needs."""
    if module_name == missing or module_name.startswith(f"{missing}."):
        contents.status, contents.reason = "import-error", f"its module {module_name!r} does not exist"
        contents.fix = f"reinstall {distribution}"
        return
    from importlib_metadata import PackageNotFoundError, requires

    from apt.core.requirements import missing_requirements

    wanted: list[str] = []
    with suppress(PackageNotFoundError, ValueError):
        unmet = missing_requirements(requires(distribution or "") or ())
        wanted = [requirement for requirement, _ in unmet if not re.match(r"apt[-_.]core\b", requirement)]
    contents.status, contents.reason = "missing-dependency", f"it needs {missing!r}, which is not installed"
    # What a module is called is not always what its distribution is called; the requirements know.
    named = " ".join(f'"{requirement}"' for requirement in wanted)
    contents.fix = f"pip install {named or missing.partition('.')[0]}"


def _compatible(theirs: object, ours: tuple[int, int]) -> bool:
    fits = isinstance(theirs, tuple) and len(theirs) == 2 and all(isinstance(part, int) for part in theirs)
    return fits and theirs[0] == ours[0] and theirs[1] <= ours[1]  # type: ignore[index]


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
    import subprocess  # here: start-up is measured, and this is needed once

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
        target = provider["target"]
        if isinstance(target, type):
            provider["target"] = f"{target.__module__}:{target.__qualname__}"
            try:
                if operator.attrgetter(target.__qualname__)(sys.modules[target.__module__]) is target:
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
    except (OSError, ValueError, TypeError):  # not there yet, or damaged: it can be made again
        return {}
    return known


def _write(path: Path, known: Mapping[tuple[str, str], Contents]) -> None:
    from apt.core.cache import atomic_write

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
