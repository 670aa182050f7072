"""Saving and opening models of 1.x: as runs, which the kernel's commands open too."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from apt.checkpoint.durable import cannot_write, sync
from apt.core.errors import CheckpointError, ConfigError
from apt.core.hooks import Hooks
from apt.core.runs import find_run
from apt.inference.loading import LoadedRun, load_run
from apt.inference.saving import save_run
from apt.modeling.compose import ModelBuilder
from apt_model._tokenizer import OldTokenizer, kernel_tokenizer
from apt_model.config._options import FILE, APTConfig
from apt_model.modeling._model import APTLargeModel, APTModel
from apt_model.training._folder import make_way, refuse_weights_of_old


def save_model(model: APTModel, tokenizer: Any, path: str | Path, config: APTConfig | None = None) -> None:
    """Write a model as a run, with the options it was made of as `config.json` beside.

    What `save_model` wrote there before is replaced; a run that was trained there is renamed, with an AptWarning.

    Args:
        tokenizer: see `kernel_tokenizer`.
        config: the options to write; the model's own if left out.

    Raises:
        CheckpointError: something else is there, or it cannot be written.
        ConfigError: a run cannot keep the tokenizer, or it has more tokens than the model.
    """
    path, in_use = Path(path), model.builder.in_use
    kept = kernel_tokenizer(tokenizer)
    if kept.vocab_size > model.backbone.vocab_size:
        raise ConfigError(
            f"the tokenizer has {kept.vocab_size} tokens, and the model {model.backbone.vocab_size}",
            hint="build the model with vocab_size=tokenizer.vocab_size",
        )
    data = model.builder.config.data.model_copy(update={"tokenizer": str(path / "tokenizer.json")})
    whole = model.builder.config.model_copy(update={"data": data})
    # Whole before what is there goes.
    new = path.with_name(f".{path.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        save_run(new, LoadedRun(whole, model.backbone, kept, torch.device("cpu"), Hooks(), in_use, 0))
        (config or model.config).save_pretrained(new)
        make_way(path)
        if path.exists():
            raise CheckpointError(f"{path} exists already, and is no run", hint="choose another folder, or remove it")
        os.replace(new, path)
        sync(path.parent)
    except OSError as error:
        raise cannot_write(error, path, 0) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def load_model(path: str | Path, device: Any = None) -> tuple[APTLargeModel, OldTokenizer, APTConfig]:
    """Open a run of an encoder-decoder, from here or from `apt train`; the model is in evaluation mode.

    Args:
        device: as `hardware.device`, or a `torch.device`; the best there is if left out.

    Raises:
        ConfigError: there is no such run, or its model is no encoder-decoder.
        CheckpointError: it has saved nothing that is whole, or holds what 1.x saved.
    """
    refuse_weights_of_old(Path(path))
    run = find_run(path)
    loaded = load_run(run, device="auto" if device is None else str(device))
    tokenizer = OldTokenizer(loaded.tokenizer)
    if (run.path / FILE).exists():
        config = APTConfig.from_pretrained(run.path)
    else:
        ids = {name: tokenizer.eos_id for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        config = APTConfig.from_profile(loaded.config, vocab_size=loaded.model.vocab_size, **ids)
    builder = ModelBuilder(loaded.config, loaded.in_use)
    return APTLargeModel(config, built=(builder, loaded.model)).eval(), tokenizer, config
