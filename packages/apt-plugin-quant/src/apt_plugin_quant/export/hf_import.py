"""`apt import hf`: a Llama or Mixtral folder, as transformers saves it, as a run."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apt.api import AptWarning, ConfigError, DataError, ModelBuilder, RunFolder, free_memory, registry, save_model
from apt_plugin_quant.export.hf_config import RESTORE, Llama, read_config
from apt_plugin_quant.export.llama import Layout, from_llama

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_JSON = 64 << 20
"""Bytes of JSON that are read; the largest index in circulation has some 10 MB."""

MORE_NAMES = 10_000
"""Tensors that a folder may lack for one of them to be named."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes that are taken, as safetensors calls them."""

DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors of old folders that follow from the config."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of an import."""

    run: RunFolder
    title: str
    """Such as "llama, 1,234 parameters"."""


def import_hf(folder: Path, out: Path | None = None, *, train_path: str | None = None) -> Imported:
    """Make a run of the model in `folder`: its profile, tokenizer and a checkpoint at step 0, in fp32.

    Args:
        folder: config.json, tokenizer.json and safetensors.
        out: the run's folder, which must not exist; in runs/, called after `folder`, if left out.
        train_path: the text that the profile names.

    Raises:
        DataError: a file is missing, unreadable or damaged, or the tensors are not those that config.json describes.
        ConfigError: the model has something that ours has not; the message names all of it.
        CheckpointError: the run cannot be written.
    """
    path = folder / "config.json"
    config = read_config(path, _read_json(path, "a folder that transformers has saved holds one"))
    layout = config.layout()
    files = _files(folder)
    if layout.num_layers * (layout.experts or 1) > len(files) + MORE_NAMES:  # memory has no room for their names
        raise DataError(
            f"{folder} lacks most of the model that config.json describes: it has {len(files)} tensors", hint=RESTORE
        )
    tokenizer_path = (folder / "tokenizer.json").absolute()
    if not _own(tokenizer_path).is_file():
        raise DataError(
            f"{folder} holds no tokenizer.json",
            hint="write one with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    if layout.experts is not None:
        registry.find("router", "topk_moe")  # without it the model would be built dense, with a warning
    builder = ModelBuilder(_profile(folder, config, tokenizer_path, train_path))
    tokenizer: Any = builder.in_use.use("tokenizer", "file", lambda provider: provider.load(tokenizer_path))
    assert tokenizer is not None
    if tokenizer.vocab_size > layout.vocab_size:
        raise DataError(
            f"{tokenizer_path} has ids up to {tokenizer.vocab_size - 1}, and config.json a vocab_size of "
            f"{layout.vocab_size}",
            hint="resize the model's embedding with transformers, or take out the tokens that were added",
        )
    _check_end(config.eos_token_id, tokenizer.eos_id)
    _check_tensors(folder, files, layout)
    out = out or Path("runs") / builder.config.name
    if out.exists():
        raise ConfigError(f"{out} exists already", hint="give another folder with --out, or remove it")
    model = builder.build_model()
    model.load_state_dict(from_llama(_read(folder, files), layout))
    run = save_model(out, builder, model.eval(), tokenizer)
    return Imported(run, f"{config.model_type}, {model.num_params():,} parameters")


def _profile(folder: Path, config: Llama, tokenizer: Path, train_path: str | None) -> dict[str, Any]:
    data: dict[str, Any] = {"tokenizer": "file", "file": {"path": str(tokenizer)}}
    if train_path is not None:
        text = Path(train_path).expanduser().absolute()
        if not text.exists():
            raise DataError(f"--train-path: there is no {text}", hint="name a text file or a folder of them")
        data["train_path"] = str(text)
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", folder.resolve().name)[:100].lstrip(".-") or "imported"
    return {
        "name": name,
        "description": f"imported from {folder}",
        "model": config.profile(),
        "data": data,
        # A model that is trained already would be thrown back by the rate that trains one from nothing.
        "training": {"learning_rate": 2e-5, "warmup_steps": 100},
    }


def _files(folder: Path) -> dict[str, str]:
    """{tensor: file} of the folder, without what follows from the config."""
    if (folder / INDEX).is_file():
        named = _read_json(folder / INDEX, RESTORE).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
            raise DataError(f"{folder / INDEX} has no weight_map", hint=RESTORE)
        for file in named.values():
            if re.search(r"[/\\\0]|^\.|^$|^[A-Za-z]:", file):
                raise DataError(
                    f"{folder / INDEX} names {file!r}, which is no file of this folder", hint="do not trust this folder"
                )
        files = dict(named)
    elif (folder / SINGLE).is_file():
        files = dict.fromkeys(_names(folder / SINGLE), SINGLE)
    else:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        if pickles:
            raise DataError(
                f"{folder} holds {pickles[0]}, a pickle, and no safetensors: a pickle may run any code and is not read",
                hint="save the model again with transformers, which writes safetensors",
            )
        raise DataError(f"{folder} holds no {SINGLE} and no {INDEX}", hint="name the folder of a model")
    return {name: file for name, file in files.items() if not DERIVED.fullmatch(name)}


def _check_end(named: int | list[int] | None, eos_id: int | None) -> None:
    """Warn where a text would end at another token than the model was trained to write."""
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if ids and eos_id not in ids:
        warnings.warn(
            f"config.json ends a text with token {ids[0]}, and tokenizer.json "
            + ("has no special token that ends one" if eos_id is None else f"with {eos_id}")
            + ": what is generated may not end by itself",
            AptWarning,
            stacklevel=3,
        )


def _check_tensors(folder: Path, files: Mapping[str, str], layout: Layout) -> None:
    """Raise DataError unless the folder holds what the config says, names and shapes, and memory holds it too."""
    wanted = layout.shapes()
    missing = [name for name in wanted if name not in files]
    strange = [name for name in files if name not in wanted and not (layout.tied and name == "lm_head.weight")]
    for what, names in (("lacks", missing), ("has also", strange)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise DataError(
                f"{folder} {what} {names[0]}{more}: it does not hold the model that config.json describes",
                hint=RESTORE,
            )
    # Twice, for the model and for what is read; a file may be larger than the disk that it lies on.
    needed = 2 * 4 * sum(map(math.prod, wanted.values()))
    if needed > free_memory():
        raise DataError(
            f"{folder} holds a model that takes {needed / 1e9:,.1f} GB to read, and there are "
            f"{free_memory() / 1e9:,.1f} GB here",
            hint="import it on a larger machine",
        )
    for file in sorted(set(files.values())):
        with _open(folder / file) as tensors:
            held = set(tensors.keys())
            for name in (name for name, where in files.items() if where == file and name in wanted):
                held_as = tensors.get_slice(name) if name in held else None
                shape = None if held_as is None else tuple(held_as.get_shape())
                if held_as is not None and held_as.get_dtype() not in FLOATS:
                    raise DataError(
                        f"{folder / file}: {name} is of dtype {held_as.get_dtype()}: its weights are quantised",
                        hint="choose a model in one of " + ", ".join(FLOATS),
                    )
                if shape != wanted[name]:
                    raise DataError(
                        f"{folder / file}: {name} is {list(shape) if shape else 'missing'}, and config.json makes it "
                        f"{list(wanted[name])}",
                        hint=RESTORE,
                    )


def _read(folder: Path, files: Mapping[str, str]) -> dict[str, Tensor]:
    """Every tensor, in fp32."""
    found: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        with _open(folder / file) as tensors:
            found |= {name: tensors.get_tensor(name).to(torch.float32) for name in files if files[name] == file}
    return found


def _own(path: Path) -> Path:
    """`path`, unless it is no file, or a link that leads out of its folder. One into the cache that the folder is a
    snapshot of is what the hub's library makes.

    Raises:
        DataError: it is.
    """
    folder, real = path.parent.resolve(), Path(os.path.realpath(path))
    cache = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if path.is_symlink() and real.parent not in (folder, cache):
        raise DataError(f"{path} is a link that leads out of its folder, to {real}", hint="put the file itself there")
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no file", hint=RESTORE)
    return path


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; json itself keeps the last of several with one key."""
    content = dict(pairs)
    if len(content) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} is given twice")
    return content


def _names(path: Path) -> list[str]:
    with _open(path) as tensors:
        return list(tensors.keys())


def _open(path: Path) -> Any:
    try:
        return safe_open(_own(path), framework="pt")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # RuntimeError: it cannot be mapped
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{path} cannot be read: {reason}", hint=RESTORE) from error


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        if _own(path).stat().st_size > MAX_JSON:
            raise DataError(f"{path} is larger than {MAX_JSON >> 20} MiB", hint=hint)
        content = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}", hint=hint) from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is no JSON object", hint=hint)
    return content
