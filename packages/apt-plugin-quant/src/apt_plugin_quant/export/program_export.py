"""The format `torch-export`: a program that `torch.export.load` opens without a line of APT."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from apt.api import LoadedRun
from apt_plugin_quant.export.tracing import FullPass, check_difference, decoder_only, trace

FILE = "model.pt2"
SHAPES = ((2, 7), (1, 1), (3, 16))
"""Batches and lengths at which the reloaded program is compared; none is that of the trace."""


def write(loaded: LoadedRun, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Write `model.pt2`: tokens int64 [B, T] to logits float32 [B, T, V], any B, T up to `model.max_seq_len`."""
    model, longest = decoder_only(loaded, "torch-export"), loaded.model.max_seq_len
    tokens = torch.zeros(2, min(3, longest), dtype=torch.int64)
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=longest)}
    program = trace(
        loaded,
        "torch-export",
        lambda: torch.export.export(FullPass(model), (tokens,), dynamic_shapes=(dims,), strict=False),
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # where in which file on this machine each node comes from
    _save(program, folder / FILE)
    reloaded = torch.export.load(folder / FILE).module()
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch, length in SHAPES:
        tokens = torch.randint(model.vocab_size, (batch, min(length, longest)), generator=generator)
        with torch.no_grad():
            worst = max(worst, check_difference("reloaded", reloaded(tokens), model(tokens).logits))
    return {"differences": {"reloaded": worst}}


def _save(program: torch.export.ExportedProgram, path: Path) -> None:
    """Through memory, for torch's own writer of files ends the process where the disk is full."""
    archive = io.BytesIO()
    torch.export.save(program, archive)
    path.write_bytes(archive.getbuffer())
