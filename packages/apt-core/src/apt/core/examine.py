"""What importing one plugin comes to: what it registers, which hooks it implements, or why it cannot be used."""

from __future__ import annotations

import functools
import importlib
import re
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

from apt.core.errors import AptError, AptWarning, in_a_line
from apt.core.hooks import Hooks
from apt.core.registry import Registry
from apt.hookspecs import API_VERSION

Status = Literal["ok", "disabled", "api-mismatch", "missing-dependency", "conflict", "import-error"]


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
            contents.status = "import-error"
            contents.reason = str(error).partition("\n")[0] if isinstance(error, AptError) else in_a_line(error)
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
