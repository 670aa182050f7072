"""Runs for the tests of exports: models whose weights are drawn so large that every part shows in the logits."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt.api import GPT, ModelBuilder, RunFolder, load_run, save_model
from apt.core.errors import AptWarning
from apt.core.providers.dataset import Piece
from apt_plugin_quant.export.commands import configure_export, configure_import, run_export, run_import

SIZES: dict[str, Any] = {"d_model": 32, "num_heads": 4, "num_layers": 2, "d_ff": 48, "max_seq_len": 64}
LLAMA: dict[str, Any] = SIZES | {"attention_name": "mha", "ffn_name": "swiglu", "norm": "rmsnorm"}

TEXT = "To be, or not to be: that is the question. Über den Wolken 🙂\n"


def make_run(
    path: Path,
    model: dict[str, Any],
    *,
    tokenizer: str = "byte",
    change: Callable[[GPT], object] | None = None,
    **data: Any,
) -> RunFolder:
    """A run at step 0 with random weights.

    Args:
        model: the section of the profile.
        tokenizer: its name; it is built on `TEXT`.
        change: called with the model before it is saved.
        data: more of the section `data`.
    """
    builder = ModelBuilder({"name": "sample", "model": model, "data": {"tokenizer": tokenizer, **data}})
    made: Any = builder.in_use.use("tokenizer", tokenizer, lambda provider: provider.build(lambda: [Piece(TEXT)]))
    built = builder.build_model(made.vocab_size)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.15, generator=generator)
        if change is not None:
            change(built)
    return save_model(path, builder, built.eval(), made)


def export(*arguments: str | Path) -> int:
    """`apt export ARGUMENTS`, without the program around it."""
    return _call(configure_export, run_export, arguments)


def import_(*arguments: str | Path) -> int:
    """`apt import ARGUMENTS`, likewise."""
    return _call(configure_import, run_import, arguments)


def _call(configure: Any, run: Any, arguments: Sequence[str | Path]) -> int:
    parser = argparse.ArgumentParser()
    configure(parser)
    return int(run(parser.parse_args([str(argument) for argument in arguments])))


def logits(run: RunFolder, tokens: Tensor) -> Tensor:
    """What the model of a run computes, float32 [B, T, V]."""
    with torch.inference_mode():
        found: Tensor = load_run(run, device="cpu").model(tokens).logits
    return found


def some_tokens(batch: int = 2, length: int = 19, vocab_size: int = 256) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def quietly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it with APT's warnings as errors: nothing was passed over, save that byte 0 ends a text of the tokenizer
    `byte` and is no special token of any library's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", AptWarning)
        warnings.filterwarnings("ignore", "config.json ends a text with token 0")
        return function(*arguments)
