"""From a profile to batches: which dataset, which tokenizer, what is trained on and what is held out."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

from apt.core.cache import cache_dir
from apt.core.config import DataConfig, RunConfig
from apt.core.errors import AptError, AptWarning, ConfigError, DataError, ProviderError, in_a_line
from apt.core.in_use import ProvidersInUse
from apt.core.providers.dataset import DatasetProvider, Piece
from apt.core.providers.tokenizer import Tokenizer, TokenizerProvider
from apt.data.loader import Loader, TokenLoader
from apt.data.pairs import PairLoader, PairsDataset, split_pairs
from apt.data.sources import FilesDataset
from apt.data.token_store import FORMAT_VERSION, Tokens, load_or_tokenize

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, the bytes of text done, and the bytes in all if they are known."""

PROGRESS_SECONDS = 0.05

READS_FILES: dict[str, type[FilesDataset]] = {"files": FilesDataset, "pairs": PairsDataset}
"""The datasets that read `data.train_path`."""

TOKENIZER_HAS = ("vocab_size", "eos_id", "encode", "decode", "save")
"""What is used of a tokenizer."""


@dataclass(frozen=True, slots=True)
class Data:
    """What a run reads."""

    tokenizer: Tokenizer
    train: Loader
    """Its batches hold one optimizer step each, accumulation included."""
    val: Loader
    """What is held out; `val.eval_batches` goes through all of it."""
    fingerprint: str
    """Changes whenever the text, its split or the tokenizer do: a resumed run can tell."""


def prepare_data(
    config: RunConfig,
    in_use: ProvidersInUse,
    *,
    tokenizer_path: Path | None = None,
    progress: Progress | None = None,
) -> Data:
    """Read, tokenize and split the text that a profile names; tokens that are cached are not made again.

    The tokenizer is built on all of the text, what is held out included. Without `data.val_path` the end of the token
    stream is held out: with n tokens, all from `int(n * (1 - data.val_fraction))` on; of n pairs likewise.

    Args:
        in_use: where the dataset and the tokenizer come from. The settings of `data` itself become their sections;
            sections that the profile spells out win.
        tokenizer_path: load the tokenizer from here instead of building it: a run keeps its own.
        progress: told at most some twenty times a second how far each stage is.

    Raises:
        ConfigError: the profile names no dataset.
        ProviderError: a dataset or tokenizer that the profile names cannot be had, or fails; nothing stands in for one.
        DataError: the text cannot be read or tokenized, or is too short.
    """
    _hand_down(config.data, in_use)
    texts = _texts(config, in_use, progress)
    fingerprints = [text.fingerprint() for text in texts]
    name = _tokenizer_name(config.data)
    if tokenizer_path is not None:
        tokenizer = load_saved_tokenizer(config, in_use, tokenizer_path)
    else:
        builder: TokenizerProvider = _use(in_use, "tokenizer", name)

        def pieces() -> Iterator[Piece]:
            return chain.from_iterable(text.pieces("building the tokenizer") for text in texts)

        with _blaming("tokenizer", name):
            tokenizer = _complete(builder.build(pieces))

    cache_root = config.data.cache_dir
    folder = cache_dir("tokens", None if cache_root is None else Path(cache_root).expanduser())
    with _blaming("tokenizer", name):
        identity = _identity(tokenizer)
        keys = [_digest(FORMAT_VERSION, fingerprint, identity) for fingerprint in fingerprints]
        streams = [text.tokens(folder, key, tokenizer) for text, key in zip(texts, keys, strict=True)]
    names = [f"the training part of {texts[0].label}"]
    names.append(f"the held-out part of {texts[0].label}" if len(texts) == 1 else texts[1].label)
    load = _load_pairs if config.model.backbone == "encdec" else _load_text
    train, val = load(config, tokenizer, streams, names)
    split = config.data.val_fraction if len(texts) == 1 else None
    return Data(tokenizer, train, val, _digest(*(key.hex() for key in keys), split).hex())


def use_data_providers(config: RunConfig, in_use: ProvidersInUse) -> None:
    """Fill the slots of the dataset and the tokenizer, as `prepare_data` does, without reading any text.

    Raises:
        ConfigError, ProviderError: as `prepare_data`.
    """
    _hand_down(config.data, in_use)
    _texts(config, in_use, None)
    _use(in_use, "tokenizer", _tokenizer_name(config.data))


def load_saved_tokenizer(config: RunConfig, in_use: ProvidersInUse, path: Path) -> Tokenizer:
    """The tokenizer that a run has saved, loaded by the provider that its profile names.

    Raises:
        ProviderError: the provider cannot be had, or fails.
        DataError: the file cannot be read, or holds no tokenizer.
    """
    _hand_down(config.data, in_use)
    name = _tokenizer_name(config.data)
    provider: TokenizerProvider = _use(in_use, "tokenizer", name)
    with _blaming("tokenizer", name):
        return _complete(provider.load(path))


def _hand_down(data: DataConfig, in_use: ProvidersInUse) -> None:
    """Give the providers of core what `data` itself says, where their own sections do not say otherwise."""
    given = in_use.sections.get("data", {})
    if data.tokenizer == "file" and "path" not in given.get("file", {}):
        raise ConfigError("data.tokenizer: which file?", hint="set data.tokenizer to the path of a tokenizer.json")
    files = {"train_path": data.train_path, "text_field": data.text_field}
    own: dict[str, Mapping[str, Any]] = {
        "files": {key: value for key, value in files.items() if value is not None},
        "bpe": {"vocab_size": data.vocab_size},
        "file": {"path": data.tokenizer},
    }
    if data.train_path is not None:
        own["pairs"] = {"train_path": data.train_path}
    extended = {name: {**settings, **given.get(name, {})} for name, settings in own.items()}
    in_use.sections = {**in_use.sections, "data": {**given, **extended}}


def _texts(config: RunConfig, in_use: ProvidersInUse, progress: Progress | None) -> list[_Text]:
    """The text to train on, and the text to validate on if it is one of its own."""
    data, wants_pairs = config.data, config.model.backbone == "encdec"
    usual = "pairs" if wants_pairs else "files"
    sections = in_use.sections["data"]
    name = data.dataset or (usual if "train_path" in sections.get(usual, {}) else None)
    if name is None or (name in READS_FILES and "train_path" not in sections.get(name, {})):
        raise ConfigError(
            "the profile names no text to train on" if name is None else f"the dataset {name!r} needs data.train_path",
            hint="set data.train_path to a text file or a folder of them, or data.dataset to a dataset such as stdlib",
        )
    if name not in READS_FILES and data.train_path is not None:
        warnings.warn(
            f"data.train_path {data.train_path} is not read: data.dataset is {name!r}; "
            f"set data.dataset to {usual} to read it",
            AptWarning,
            stacklevel=3,
        )
    dataset = _use(in_use, "dataset", name)
    if getattr(dataset, "pairs", False) != wants_pairs:
        raise ConfigError(
            f"data.dataset: {name!r} yields {'texts' if wants_pairs else 'pairs'}, and model.backbone "
            f"{config.model.backbone} learns {'pairs' if wants_pairs else 'texts'}",
            hint=f"set data.dataset to {usual}, or leave it out and give data.train_path",
        )
    label = os.path.expanduser(sections[name]["train_path"]) if name in READS_FILES else f"the dataset {name!r}"
    texts = [_Text(dataset, name, label, progress)]
    if data.val_path is not None:
        held_out = READS_FILES[usual]({**sections.get(usual, {}), "train_path": data.val_path})
        texts.append(_Text(held_out, usual, os.path.expanduser(data.val_path), progress))
    return texts


def _tokenizer_name(data: DataConfig) -> str:
    """The name of the provider: a path is one for `file`."""
    is_path = data.tokenizer.endswith(".json") or "/" in data.tokenizer or os.sep in data.tokenizer
    return "file" if is_path else data.tokenizer


def _use(in_use: ProvidersInUse, kind: str, name: str) -> Any:
    return in_use.use(kind, name, lambda provider: provider)


def _load_text(
    config: RunConfig, tokenizer: Tokenizer, streams: list[Tokens], names: Sequence[str]
) -> tuple[Loader, Loader]:
    """The text to train on and the text to validate on, in blocks."""
    if len(streams) == 1:
        cut = int(len(streams[0]) * (1 - config.data.val_fraction))
        streams = [streams[0].slice(0, cut), streams[0].slice(cut, len(streams[0]))]
    train, val = (
        TokenLoader(
            tokens,
            config.model.max_seq_len,
            _rows_per_step(config),
            seed=config.training.seed,
            document_mask=config.data.document_mask,
            workers=config.data.workers,
            name=name,
        )
        for tokens, name in zip(streams, names, strict=True)
    )
    if len(train) == 0:
        raise DataError(
            f"{names[0]} has {len(train.tokens)} tokens; one step of {train.batch_size} "
            f"blocks of {train.block_size} needs {train.batch_size * train.block_size + 1}",
            hint="give more text or lower training.batch_size, training.gradient_accumulation or model.max_seq_len",
        )
    return train, val


def _load_pairs(
    config: RunConfig, tokenizer: Tokenizer, streams: list[Tokens], names: Sequence[str]
) -> tuple[Loader, Loader]:
    """Likewise for pairs."""
    eos_id = tokenizer.eos_id
    if eos_id is None:
        raise ConfigError(
            f"data.tokenizer: {config.data.tokenizer} has no token to end a target",
            hint="choose one that has, such as byte, char or bpe",
        )
    if config.data.document_mask:
        warnings.warn("data.document_mask says nothing here: each row is one pair", AptWarning, stacklevel=3)
    for tokens, name in zip(streams, names, strict=False):
        if len(tokens.starts) % 2:
            raise ProviderError(f"{name} has a source without a target", hint="mend the plugin that brings the dataset")
    if len(streams) == 1:
        streams = list(split_pairs(streams[0], config.data.val_fraction))
    train, val = (
        PairLoader(
            tokens,
            config.model.max_seq_len,
            _rows_per_step(config),
            eos_id=eos_id,
            seed=config.training.seed,
            workers=config.data.workers,
            name=name,
        )
        for tokens, name in zip(streams, names, strict=True)
    )
    if len(train) == 0:
        raise DataError(
            f"{names[0]} has {train.pairs} pairs; one step takes {train.batch_size}",
            hint="give more pairs or lower training.batch_size or training.gradient_accumulation",
        )
    return train, val


def _rows_per_step(config: RunConfig) -> int:
    return config.training.batch_size * config.training.gradient_accumulation


@contextmanager
def _blaming(kind: str, name: str) -> Iterator[None]:
    """What a provider raises inside this block that says nothing to a user comes out as an error that names it."""
    try:
        yield
    except (AptError, OSError):
        raise
    except (Exception, SystemExit) as error:
        raise ProviderError(
            f"{kind}:{name} failed: {in_a_line(error)}",
            hint=f"mend the plugin that brings it, or choose another data.{kind}; --debug shows where",
        ) from error


def _complete(tokenizer: Any) -> Tokenizer:
    """`tokenizer`, if it has what one must have."""
    if missing := [name for name in TOKENIZER_HAS if not hasattr(tokenizer, name)]:
        raise TypeError(f"it built {type(tokenizer).__name__}, which has no {', '.join(missing)}")
    return cast(Tokenizer, tokenizer)


def _identity(tokenizer: Tokenizer) -> str:
    """What a tokenizer does, as a hash: of its class and of all that it saves."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer.save(path)
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__} {content}"


def _digest(*parts: Any) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()


class _Text:
    """A dataset and what the user calls it: passes over it show progress, and errors say which it was."""

    def __init__(self, dataset: DatasetProvider, name: str, label: str, progress: Progress | None) -> None:
        self.dataset = dataset
        self.name = name
        self.label = label
        self._progress = progress
        self._total: int | None = None

    def fingerprint(self) -> str:
        try:
            with _blaming("dataset", self.name):
                self._total = self.dataset.size_hint()
                self._tell("reading", 0, self._total)
                found = self.dataset.fingerprint()
        except OSError as error:
            raise self._unreadable(error) from error
        self._tell("reading", self._total or 0, self._total or 0)
        # Two plugins may give the same answer to what they alone ask.
        return f"{self.dataset.get_name()} {self.dataset.get_version()} {found}"

    def pieces(self, stage: str) -> Iterator[Piece]:
        done, told = 0, float("-inf")
        try:
            with _blaming("dataset", self.name):
                for piece in self.dataset.pieces():
                    if not isinstance(piece, Piece):
                        raise TypeError(f"it must yield Piece(text), not {type(piece).__name__}")
                    yield piece
                    done += len(piece.text) if piece.text.isascii() else len(piece.text.encode("utf-8"))
                    now = time.monotonic()
                    if now - told >= PROGRESS_SECONDS:
                        self._tell(stage, done, self._total)
                        told = now
        except OSError as error:
            raise self._unreadable(error) from error
        done = self._total or done  # the size was a guess: the stage is over all the same
        self._tell(stage, done, done)

    def tokens(self, folder: Path, key: bytes, tokenizer: Tokenizer) -> Tokens:
        try:
            tokens = load_or_tokenize(folder, key, lambda: self.pieces("tokenizing"), tokenizer)
        except DataError as error:
            if self.label in error.message:
                raise
            raise DataError(f"{self.label}: {error.message}", hint=error.hint) from error
        if tokenizer.eos_id is None and len(tokens.starts) > 1:
            warnings.warn(
                f"{self.label} has {len(tokens.starts)} documents, and the tokenizer no token to end one: "
                "they run into each other",
                AptWarning,
                stacklevel=4,
            )
        return tokens

    def _tell(self, stage: str, done: int, total: int | None) -> None:
        if self._progress is not None:
            self._progress(stage, done, total)

    def _unreadable(self, error: OSError) -> DataError:
        where, reason = error.filename or self.label, error.strerror or error
        return DataError(f"{where} cannot be read: {reason}", hint="check that it is there and readable")
