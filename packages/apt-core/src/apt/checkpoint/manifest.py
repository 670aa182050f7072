"""What a checkpoint says of itself, and whether its files are as it says. Nothing here needs torch."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError

from apt.checkpoint.durable import sha256
from apt.core.errors import AptWarning, CheckpointError
from apt.core.files import read_file

FORMAT = 1
SHARDED = 2
"""The format of a checkpoint that several processes have written, each a file of its own."""
MODEL = "model.safetensors"
TENSORS = "state.safetensors"
STRUCTURE = "state.json"
MANIFEST = "manifest.json"

DAMAGE = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What reading nested data comes to where it is not as it was written."""


class _File(BaseModel):
    model_config = ConfigDict(strict=True)

    bytes: int
    sha256: str


class _Manifest(BaseModel):
    """What every manifest says. Its hash of itself shows that it is as it was written, and not by whom."""

    model_config = ConfigDict(strict=True)

    format: int
    step: int
    epoch: int
    batch_index: int
    metrics: dict[str, Any]
    dropped: list[str]
    files: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")], _File]
    """{a name in the folder: what it holds}."""


def folders_of(store: Path) -> dict[int, Path]:
    """{step: folder} of the complete checkpoints: those under their final name, else those that stepped aside.

    Raises:
        CheckpointError: `store` cannot be read.
    """
    found: dict[int, Path] = {}
    try:
        # "step-1" sorts before "step-1.old", and so takes its place.
        for path in sorted(store.iterdir()):
            match = re.fullmatch(r"step-(\d+)(\.old)?", path.name)
            if match and path.is_dir():
                found.setdefault(int(match[1]), path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{store} cannot be read: {error.strerror}", hint="name the folder of a run") from error
    return found


def seal(content: dict[str, Any]) -> bytes:
    """`content` as JSON with a hash of itself: the one way to write it, so that any other byte shows."""
    body = json.dumps(content, indent=1, allow_nan=False)
    return json.dumps({**content, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1).encode()


def read_manifest(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError where it is missing, damaged or another one's."""
    path = folder / MANIFEST
    try:
        data = read_file(path)
        content = json.loads(data)
        del content["sha256"]
        whole = seal(content) == data
        known = content["format"] in (FORMAT, SHARDED)
        if known:
            _Manifest.model_validate(content)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", hint="load another step") from error
    except DAMAGE:
        whole = False
    if not whole:
        raise CheckpointError(f"{path} is damaged", hint="load another step")
    if not known:
        raise CheckpointError(
            f"{path} has format {content['format']}, and this version of APT reads {FORMAT} and {SHARDED}",
            hint="use the version that wrote it",
        )
    if content["step"] != step:
        raise CheckpointError(f"{path} belongs to step {content['step']}", hint="give its folder back its own name")
    return dict(content)


def is_of_weights(file: str) -> bool:
    """Whether a checkpoint's file holds weights: all of them, or those of one process."""
    return re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", file) is not None


def parts_in(header: Mapping[str, str] | None) -> dict[str, Any]:
    """{tensor: {"shape": of the whole, "offsets": where in it the part begins}}: what a file's header says of tensors
    in it that are not whole."""
    return dict(json.loads((header or {}).get("shards", "{}")))


def verify(folder: Path, step: int, *, weights_only: bool = False) -> dict[str, Any]:
    """The manifest, if every file is as it says, or every one of weights. Raises CheckpointError if not."""
    manifest = read_manifest(folder, step)
    needed = {MODEL, TENSORS, STRUCTURE} if manifest["format"] == FORMAT else {STRUCTURE}
    if missing := needed - manifest["files"].keys():
        raise CheckpointError(f"{folder / MANIFEST} does not name {min(missing)}", hint="load another step")
    for name, known in manifest["files"].items():
        if weights_only and not is_of_weights(name):
            continue
        path = folder / name
        try:
            size = path.stat().st_size
            same = size == known["bytes"] and sha256(path) == known["sha256"]
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}", hint="load another step") from error
        if size != known["bytes"]:
            raise CheckpointError(
                f"{path} is damaged: {size:,} bytes instead of {known['bytes']:,}", hint="load another step"
            )
        if not same:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the manifest's", hint="load another step")
    strangers = {path.name for path in folder.iterdir()} - {MANIFEST, *manifest["files"]}
    if strangers:
        warnings.warn(
            f"{folder} also holds {', '.join(sorted(strangers))}, which is passed over", AptWarning, stacklevel=5
        )
    return manifest


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn whatever goes wrong over files that are as their manifest says into a CheckpointError: they, and it, were
    written by something else than a store."""
    try:
        yield
    except CheckpointError:
        raise
    except (*DAMAGE, SafetensorError) as error:
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder} is damaged ({type(error).__name__}: {text})", hint="load another step"
        ) from error
