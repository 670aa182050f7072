"""The folder of an export: written aside, hashed, and only then given its name.

Beside the files of its format it holds `tokenizer.json`, where the run's tokenizer can be written as one of the library
`tokenizers`, and `export.json`: where the weights come from, the model's profile, and size and SHA-256 of every file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from apt.api import AptError

MANIFEST = "export.json"
FORMAT = 1
FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


def check_target(out: Path, *, force: bool) -> None:
    """Raise AptError if something is at `out` that may not be replaced: anything, or with `force` what is no export."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise AptError(f"{out} exists already", hint="give another --out, or --force to replace an export")
    if not (out / MANIFEST).is_file():
        raise AptError(f"{out} is no export (it has no {MANIFEST}), and is not replaced", hint="give another --out")


@contextmanager
def new_folder(out: Path, at_least: int) -> Iterator[Path]:
    """A folder to write into, which is `out` once the block ends well; else nothing is left of it, and what was at
    `out` stays.

    Args:
        out: the folder.
        at_least: bytes that its files will have together, or less: what is said to be needed where the disk is full.

    Raises:
        AptError: it cannot be written.
    """
    aside = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    before = out.with_name(f".{out.name}.old-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        yield aside
        for path in aside.rglob("*"):
            _sync(path)
        _sync(aside)
        if out.exists():
            os.replace(out, before)
        os.replace(aside, out)
        _sync(out.parent)
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(error, out, aside, at_least) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _cannot_write(error: Exception, out: Path, aside: Path, at_least: int) -> AptError:
    """What to tell the user."""
    told, free = re.search(r"\(os error (\d+)\)", str(error)), None  # safetensors says it in words alone
    code = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    needed = max(at_least, sum(path.stat().st_size for path in aside.rglob("*") if path.is_file()))
    shutil.rmtree(aside, ignore_errors=True)  # now, so that what it takes up counts as free
    with suppress(OSError):
        free = shutil.disk_usage(out.parent).free
    if code is None and free is not None and free <= needed:
        code = errno.ENOSPC  # numpy, which writes large ONNX weights, does not say it
    if code not in FULL:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return AptError(f"cannot write {out}: {reason}", hint="give an --out that can be written")
    cause = f"{FULL[code]}: more than {needed:,} bytes are needed" + ("" if free is None else f", {free:,} are free")
    return AptError(f"cannot write {out}: {cause}", hint="free some space, or give an --out on another disk")


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> dict[str, int]:
    """Write `export.json` for the files that lie in `folder`; returns {name: bytes} of them, itself left out."""
    files = {path.name: path for path in sorted(folder.iterdir())}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    hashed = {name: {"bytes": sizes[name], "sha256": sha256(path)} for name, path in files.items()}
    text = json.dumps({"format": FORMAT, **facts, "files": hashed}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    for path in files.values():
        shutil.copymode(folder / MANIFEST, path)  # safetensors lets the owner alone read, whatever the umask says
    return sizes


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
