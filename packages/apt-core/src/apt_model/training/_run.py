"""What a training of 1.x becomes: a profile and what it reads, in the folder of the run to be."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from apt.checkpoint.durable import cannot_write
from apt.core.errors import AptWarning, DataError
from apt.core.profiles import dump_yaml, resolve
from apt.data.readers import decoded_lines, read_with
from apt_model._tokenizer import kernel_tokenizer
from apt_model.config._options import APTConfig, say_once
from apt_model.training._folder import make_way

PROFILE = "train.yaml"

TRAIN_FILE = Path("train.txt")
"""Read where no texts are named."""

TOKENIZERS = {"gpt2": "bpe", "chinese-char": "char", "chinese-word": "bpe"}
"""A tokenizer of 1.x -> the kernel's nearest."""

HELD_OUT = 0.1
"""The share of the texts that is measured and not learnt."""

OWN_TARGET = {"source_field": "text", "target_field": "text"}
"""Each text is its own source and target."""

SUFFIXES = (".txt", ".tsv", ".jsonl")


def default_config() -> APTConfig:
    """What is trained unless it is told otherwise."""
    return APTConfig(num_encoder_layers=4, num_decoder_layers=4, dropout=0.2)


def prepare(
    folder: Path,
    texts: Sequence[str] | Path | None,
    config: APTConfig,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    tokenizer: Any = None,
    tokenizer_type: str | None = None,
    limit: int | None = None,
    seed: int = 42,
) -> tuple[Path, dict[str, Any]]:
    """Write a profile into `folder`, and the texts where no file holds them as pairs. A run that is there makes way.

    Args:
        texts: texts, or a file of them: .jsonl with "text", or "source" and "target"; .txt with one in each line, or
            source<TAB>target; the file train.txt if left out.
        epochs, batch_size, learning_rate: what is asked of the run; a batch of more texts than are learnt from becomes
            one of them all, with an AptWarning.
        tokenizer: to be used, see `kernel_tokenizer`; else
        tokenizer_type: one of 1.x or the kernel, or a path; `bpe`, learnt from the texts, if left out.
        limit: how many texts to take.

    Returns:
        The profile's path, and what is to be given beside it: {dotted key: value}.

    Raises:
        ConfigError: a run cannot keep the tokenizer, or the profile cannot be used.
        CheckpointError: the folder cannot be written.
        DataError: there are no texts, or they cannot be read.
    """
    kept = None if tokenizer is None else kernel_tokenizer(tokenizer)
    lines, path = _lines(texts, limit)
    here, copy = folder.resolve(), None
    if path is None or limit is not None or path.resolve().is_relative_to(here):
        path = copy = here / f"texts{'.jsonl' if path is None else path.suffix}"
    learnt = max(int(len(lines) * (1 - HELD_OUT)), 1)
    if learnt < batch_size:
        warnings.warn(
            f"batches hold {learnt} texts and not {batch_size}: there are no more to learn from", AptWarning, 3
        )
        batch_size = learnt
    profile = {"name": "apt_model", **config.to_profile()}
    profile["model"]["vocab_size"] = None  # the tokenizer's
    # A tenth of the steps, as 1.x warmed up, or fewer where the options say so.
    steps = epochs * learnt // max(batch_size, 1)
    profile["training"]["warmup_steps"] = max(min(config.warmup_steps, steps // 10), 0)
    profile["data"] = {
        "train_path": str(path),
        "val_fraction": HELD_OUT,
        "tokenizer": _named(tokenizer_type) if kept is None else str(here / "tokenizer.json"),
    }
    if path.suffix.lower() == ".jsonl" and '"source"' not in lines[0]:
        profile["data"]["pairs"] = OWN_TARGET
    asked = {"max_epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    overrides = {f"training.{key}": value for key, value in asked.items()}
    resolve(profile, overrides)  # what is wrong with it is said before anything is touched
    make_way(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if copy is not None:
            copy.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        if kept is not None:
            kept.save(here / "tokenizer.json")
        (folder / PROFILE).write_text(dump_yaml(profile), encoding="utf-8")
    except OSError as error:
        raise cannot_write(error, folder, 0) from error
    return folder / PROFILE, overrides


def _lines(texts: Sequence[str] | Path | None, limit: int | None) -> tuple[list[str], Path | None]:
    """The lines that a file of pairs has, or should have, and the file if it is one."""
    if texts is None:
        texts = TRAIN_FILE
    if isinstance(texts, Path) and not texts.is_file():
        raise DataError(f"there is no file {texts} of texts to train on", hint="give texts, or name a file of them")
    if not isinstance(texts, Path):
        found, path = [text for text in texts if text.strip()], None
    elif texts.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{texts}: read are {', '.join(SUFFIXES)}", hint='write {"text": "..."} in each line of a .jsonl file'
        )
    else:
        found = [line.rstrip("\r\n") for _, line in read_with(decoded_lines, texts)]
        path = texts if texts.suffix.lower() == ".jsonl" or any("\t" in line for line in found[:1]) else None
    found = list(islice(found, limit))
    if not found:
        raise DataError("there are no texts to train on", hint="give some, one in each line of a file")
    return (found if path else [json.dumps({"text": text}) for text in found]), path


def _named(tokenizer_type: str | None) -> str:
    name = TOKENIZERS.get(tokenizer_type or "gpt2", tokenizer_type)
    assert name is not None
    if tokenizer_type in TOKENIZERS:
        say_once(f"tokenizer_type {tokenizer_type}: {name} is used, learnt from the texts")
    return name
