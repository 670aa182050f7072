"""`apt export`: opens a run, has the format's module write it, and says in `export.json` what was written."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from apt.api import AptWarning, ConfigError, LoadedRun, RunFolder, load_run
from apt_plugin_quant.export import hf_export, onnx_export, program_export, weights_export
from apt_plugin_quant.export.folder import check_target, new_folder, write_manifest
from apt_plugin_quant.export.tokenizer import TOKENIZER, as_library_tokenizer

Writer = Callable[[LoadedRun, Path, torch.dtype], dict[str, Any]]
"""Writes its files into a folder, in which the tokenizer lies already, and returns facts for export.json; "differences"
are {what was run: the largest difference measured}."""

WRITERS: dict[str, Writer] = {
    "safetensors": weights_export.write,
    "onnx": onnx_export.write,
    "torch-export": program_export.write,
    "hf": hf_export.write,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(slots=True)
class Exported:
    """What came of an export."""

    step: int
    sizes: dict[str, int]
    """{file: bytes}."""
    checks: list[str] = field(default_factory=list)
    """What was compared, one line each."""


def export_run(
    run: RunFolder,
    out: Path,
    format: str,
    *,
    checkpoint: str | int | None = None,
    state: str | None = None,
    dtype: str = "fp32",
    force: bool = False,
) -> Exported:
    """Write a run's model to the folder `out`.

    Args:
        format: a key of `WRITERS`.
        checkpoint, state: as `load_run` takes them.
        dtype: a key of `DTYPES`: of floating-point weights.
        force: replace an export that is there.

    Raises:
        AptError: the run cannot be opened, something stands in the way of this format, what was written does not
            compute what the run does, or it cannot be written.
    """
    check_target(out, force=force)
    loaded = load_run(run, device="cpu", checkpoint=checkpoint, state=state)
    if loaded.config.model.quant_name:
        raise ConfigError(
            f"{run.path} is quantised, and no format of this command holds its scheme",
            hint="export the run that it was made from",
        )
    weights = sum(parameter.numel() for parameter in loaded.model.parameters()) * DTYPES[dtype].itemsize
    with new_folder(out, weights) as folder:
        tokenizer = as_library_tokenizer(run.tokenizer)
        if tokenizer is None:
            warnings.warn(
                f"the tokenizer of {run.path} ({loaded.config.data.tokenizer}) cannot be written as a tokenizer.json: "
                "the export holds none",
                AptWarning,
                stacklevel=2,
            )
        else:
            # Not by its own `save`, which raises a bare Exception where the disk is full.
            (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        facts = WRITERS[format](loaded, folder, DTYPES[dtype])
        sizes = write_manifest(
            folder,
            {
                "kind": format,
                "run": run.path.resolve().name,
                "step": loaded.step,
                "state": state,
                "dtype": dtype,
                "vocab_size": loaded.model.vocab_size,
                "eos_id": loaded.tokenizer.eos_id,
                "model": loaded.config.model.model_dump(mode="json"),
                "providers": [
                    {"kind": slot.kind, "name": slot.name, "version": slot.version, "config": slot.config}
                    for slot in loaded.in_use.slots.values()
                    if slot.kind in ("attention", "ffn", "router")
                ],
                **facts,
            },
        )
    checks = [
        f"largest difference of a logit from the run's own, {what}: {difference:.1e}"
        for what, difference in facts.get("differences", {}).items()
    ]
    return Exported(loaded.step, sizes, checks)
