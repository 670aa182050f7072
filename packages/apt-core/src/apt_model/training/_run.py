"""What a training of 1.x becomes: a profile and what it reads, in the folder of the run to be."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from apt.core.errors import AptWarning, DataError
from apt.core.profiles import dump_yaml
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
    return APTConfig(num_encoder_layers=4, num_decoder_layers=4, max_seq_len=128, dropout=0.2)


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
        ConfigError: a run cannot keep the tokenizer.
        DataError: there are no texts, or they cannot be read.
    """
    kept = None if tokenizer is None else kernel_tokenizer(tokenizer)
    lines, read_from = _lines(texts, limit)
    make_way(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {"train_path": str(read_from), "val_fraction": HELD_OUT}
    if read_from is None or limit is not None:
        suffix = ".jsonl" if read_from is None else read_from.suffix
        copy = folder.resolve() / f"texts{suffix}"
        copy.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        data["train_path"] = str(copy)
    if data["train_path"].endswith(".jsonl") and '"source"' not in lines[0]:
        data["pairs"] = OWN_TARGET
    if kept is not None:
        data["tokenizer"] = str(folder.resolve() / "tokenizer.json")
        kept.save(Path(data["tokenizer"]))
    else:
        data["tokenizer"] = _named(tokenizer_type)
    profile = config.to_profile()
    profile["model"]["vocab_size"] = None  # the tokenizer's
    learnt = max(int(len(lines) * (1 - HELD_OUT)), 1)
    if learnt < batch_size:
        warnings.warn(f"{learnt} texts are learnt from: batches have {learnt} and not {batch_size}", AptWarning, 3)
    batch_size = min(batch_size, learnt)
    # A tenth of the steps, as 1.x warmed up, or fewer where the options say so.
    profile["training"]["warmup_steps"] = min(config.warmup_steps, epochs * (learnt // batch_size) // 10)
    path = folder / PROFILE
    path.write_text(dump_yaml({"name": "apt_model", **profile, "data": data}), encoding="utf-8")
    asked = {"max_epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    return path, {f"training.{key}": value for key, value in asked.items()}


def _lines(texts: Sequence[str] | Path | None, limit: int | None) -> tuple[list[str], Path | None]:
    """The lines that a file of pairs has, or should have, and the file if it is one."""
    if texts is None:
        texts = TRAIN_FILE
    if not isinstance(texts, Path):
        found, path = [text for text in texts if text.strip()], None
    elif texts.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{texts}: read are {', '.join(SUFFIXES)}", hint='write {"text": "..."} in each line of a .jsonl file'
        )
    else:
        try:
            found = [line.rstrip("\r\n") for _, line in read_with(decoded_lines, texts)]
        except OSError as error:
            raise DataError(f"{texts} cannot be read: {error.strerror}", hint="name a file of texts") from None
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
