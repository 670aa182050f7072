"""What an installed distribution says of itself, and which files it consists of; nothing of it is imported."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any


def name_and_version(distribution: Any) -> tuple[str | None, str | None]:
    """From the head of its METADATA; the mail parser behind `distribution.metadata` costs 10 ms, and 1 ms a file."""
    fields: dict[str, str] = {}
    for line in (distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or "").splitlines():
        if not line:
            break
        key, _, value = line.partition(":")
        fields.setdefault(key.lower(), value.strip())
    return fields.get("name"), fields.get("version")


def editable_path(distribution: Any) -> str | None:
    """Where the sources of an editable install lie; None for any other."""
    direct_url = distribution.read_text("direct_url.json")
    if direct_url is None:
        return None
    import json  # here and below: start-up is measured, and not everyone has plugins

    try:
        origin = json.loads(direct_url)
        return str(origin["url"].removeprefix("file://")) if origin["dir_info"]["editable"] else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def record_sha256(record: str | None) -> str | None:
    """A SHA-256 over the files that a RECORD lists with theirs; None where it lists none.

    It is the same wherever the same wheel is installed: what an installer adds (scripts, INSTALLER, REQUESTED,
    direct_url.json, compiled modules) is left out.
    """
    lines = []
    for line in (record or "").splitlines():
        path, separator, _ = line.partition(",sha256=")
        if not separator or path.startswith(("..", "/", '"..', '"/')):
            continue
        if ".dist-info/" in path and not path.endswith(("/METADATA", "/entry_points.txt")):
            continue
        lines.append(line)
    return _sha256(sorted(lines)) if lines else None


def sources_sha256(module_name: str) -> str | None:
    """A SHA-256 over the content of the files that a module's package consists of; None where there are none."""
    import hashlib

    parts = []
    for relative, path in _sources(module_name):
        parts += [relative, hashlib.sha256(path.read_bytes()).hexdigest()]
    return _sha256(parts) if parts else None


def sources_stamp(module_name: str) -> str:
    """Another text as soon as one of these files is written: a look at their names, sizes and times, not into them."""
    parts = []
    for relative, path in _sources(module_name):
        status = path.stat()
        parts.append(f"{relative} {status.st_size} {status.st_mtime_ns}")
    return _sha256(parts)


def _sources(module_name: str) -> list[tuple[str, Path]]:
    """(path inside the package, path) of the files that a module's top-level package consists of.

    A top-level package is found without importing it, in an editable install too.
    """
    try:
        spec = importlib.util.find_spec(module_name.partition(".")[0])
    except (ImportError, ValueError, AttributeError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is None:
        origin = Path(spec.origin or "")
        return [(origin.name, origin)] if origin.is_file() else []
    found = []
    for package in spec.submodule_search_locations:
        for folder, folders, names in os.walk(package):
            folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
            paths = [Path(folder, name) for name in names if name.endswith((".py", *EXTENSION_SUFFIXES))]
            found += [(path.relative_to(package).as_posix(), path) for path in paths]
    return sorted(found)


def _sha256(parts: Iterable[str]) -> str:
    import hashlib

    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
