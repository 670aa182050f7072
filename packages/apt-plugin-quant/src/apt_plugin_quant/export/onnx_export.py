"""The format `onnx`: one graph, `model.onnx`, for full passes and for decoding with a cache.

Inputs: `tokens`, int64 [batch, length], and for each tensor of each layer's cache `past.LAYER.NAME`, float32
[batch, past, ...]: of `mha` `keys` and `values`; of `tva_default` `vein`, and `recent`, which is [batch, 2, ...] and
zeros at first. Outputs: `logits`, float32 [batch, length, vocabulary], and `present.LAYER.NAME`, the same with the new
positions joined. A past of 0 positions is a full pass. Attention without such a cache gives `tokens` to `logits` alone.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.api import AptWarning, LoadedRun
from apt_plugin_quant.export.tracing import (
    CachedPass,
    CacheTensor,
    FullPass,
    cache_tensors,
    check_difference,
    decoder_only,
    trace,
)

FILE = "model.onnx"
ONE_FILE = 1 << 30
"""Bytes of weights above which they lie in a file beside the graph: a graph itself holds no more than 2 GiB."""

Run = Callable[[Tensor, Sequence[Tensor]], list[Tensor]]
"""Tokens and cache to logits and cache."""


def write(loaded: LoadedRun, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Write `model.onnx`, run it with onnxruntime, and compare."""
    model = decoder_only(loaded, "onnx")
    cache = cache_tensors(model)
    if cache is None:
        warnings.warn(
            f"model.attention_name: {loaded.config.model.attention_name} has no cache that ONNX can carry: "
            "the graph serves full passes alone",
            AptWarning,
            stacklevel=2,
        )
    batch, length, past = (torch.export.Dim(name) for name in ("batch", "length", "past"))
    module: nn.Module = FullPass(model) if cache is None else CachedPass(model, cache)
    arguments: list[Any] = [torch.zeros(2, 3, dtype=torch.int64)]
    shapes: list[Any] = [{0: batch, 1: length}]
    if cache is not None:
        arguments.append([tensor.empty(2, 4) for tensor in cache])
        shapes.append([{0: batch, 1: past} if tensor.grows else {0: batch} for tensor in cache])
    names = [tensor.name for tensor in cache or ()]
    inputs, outputs = ["tokens", *(f"past.{n}" for n in names)], ["logits", *(f"present.{n}" for n in names)]

    def export() -> Any:
        return torch.onnx.export(
            module,
            tuple(arguments),
            dynamic_shapes=tuple(shapes),
            input_names=inputs,
            output_names=outputs,
            dynamo=True,
            verbose=False,
        )

    with _quiet():
        program = trace(loaded, "onnx", export)
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # where in which file on this machine each node comes from
        weights = sum(parameter.nbytes for parameter in model.parameters())
        program.save(str(folder / FILE), external_data=weights > ONE_FILE)
    return {
        "inputs": inputs,
        "outputs": outputs,
        "differences": _compare(loaded, _session(folder / FILE, inputs, outputs), cache or []),
    }


def _session(path: Path, inputs: list[str], outputs: list[str]) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(tokens: Tensor, past: Sequence[Tensor]) -> list[Tensor]:
        feeds = dict(zip(inputs, (tensor.numpy() for tensor in (tokens, *past)), strict=True))
        return [torch.from_numpy(array) for array in session.run(outputs, feeds)]

    return run


def _compare(loaded: LoadedRun, run: Run, cache: list[CacheTensor]) -> dict[str, float]:
    """The largest differences from the run's own logits, at several batches and lengths, and of a decoding."""
    model, generator = loaded.model, torch.Generator().manual_seed(0)

    def draw(batch: int, length: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(model.vocab_size, (batch, min(length, model.max_seq_len)), generator=generator)
        with torch.inference_mode():
            return tokens, model(tokens).logits

    full = decoding = 0.0
    for batch, length in ((2, 17), (1, 1), (3, 64)):
        tokens, wanted = draw(batch, length)
        logits = run(tokens, [tensor.empty(batch) for tensor in cache])[0]
        full = max(full, check_difference("full pass", logits, wanted))
    if not cache:
        return {"full pass": full}
    # A prompt, a stretch of several tokens, and then one at a time; at batch 1 from an empty cache on.
    for batch, stretches in ((2, (5, 3, 1, 1, 1, 1)), (1, (1, 1, 1, 2, 1))):
        tokens, wanted = draw(batch, sum(stretches))
        past, begin = [tensor.empty(batch) for tensor in cache], 0
        for stretch in stretches:
            new = tokens[:, begin : begin + stretch]
            if not new.numel():
                break  # a model of a very short context
            logits, *past = run(new, past)
            part = wanted[:, begin : begin + stretch]
            decoding = max(decoding, check_difference("decoding with a cache", logits, part))
            begin += stretch
    return {"full pass": full, "decoding with a cache": decoding}


@contextmanager
def _quiet() -> Iterator[None]:
    """What the exporter says to its own developers is not for ours."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
