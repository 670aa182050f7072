"""What `apt generate --retrieve STORE` does: passages before the prompt, or a datastore in each prediction.

A retriever that fails never stops a generation: it is said, and the text goes on without it. Under `--strict` it does.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from apt.api import AptError, AptWarning, ConfigError, DataError
from apt.core.providers.retrieval import Passage
from apt_plugin_rag.commands import open_retriever
from apt_plugin_rag.knn_lm import KNNRetriever, Mixer, check_model
from apt_plugin_rag.retrievers import StoredRetriever

READ = 3
"""Passages that are read where --retrieve-k is not given."""

SHOWN = 3
"""Sources that are named where every token has its own."""

SETTINGS = {"knn_lambda": "weight", "knn_temperature": "temperature"}
"""Option -> the setting of a datastore that it changes."""


@dataclass(slots=True)
class Reading:
    """What one generator reads from."""

    retriever: StoredRetriever | None = None
    mixer: Mixer | None = None
    unsaid: bool = field(default=True)
    """Whether the sources of the datastore are still to be named."""


_readings: WeakKeyDictionary[Any, Reading] = WeakKeyDictionary()
"""A generator that is asked again, as in a chat, keeps its store open."""


def start(prompt: str, generator: Any) -> str | None:
    """The prompt with passages before it; None for a datastore, which leaves it alone."""
    try:
        reading = _readings.get(generator) or _open(generator)
        _readings[generator] = reading
        reading.unsaid = True
        if reading.retriever is None or reading.mixer is not None:
            return None
        return _with_passages(prompt, reading.retriever, generator)
    except Exception as error:
        _go_on_without(generator, error)
        return None


def next_token(logits: Any, generator: Any) -> Any:
    """The logits [B, V] with a datastore mixed in; None where there is none."""
    reading = _readings.get(generator)
    if reading is None or reading.mixer is None or reading.retriever is None:
        return None
    try:
        found = reading.mixer.find(generator.hidden.float().cpu().numpy())
        if reading.unsaid:
            reading.unsaid = False
            ids = [passage for passage, _ in reading.mixer.passages(found[0], SHOWN)]
            _name(reading.retriever.store.read(ids), generator)
        return reading.mixer.mix(logits, found)
    except Exception as error:
        _go_on_without(generator, error)
        return None


def _open(generator: Any) -> Reading:
    options = generator.options
    given = {name: getattr(options, name, None) for name in ("retrieve_k", *SETTINGS)}
    given = {name: value for name, value in given.items() if value is not None}
    if getattr(options, "retrieve", None) is None:
        _pass_over(given, "there is no --retrieve", "name a store with --retrieve", generator)
        return Reading()
    retriever = open_retriever(options.retrieve)
    where = retriever.store.where
    if not isinstance(retriever, KNNRetriever):
        why = f"only a knn_lm store takes that, and {where} is a {retriever.get_name()} store"
        _pass_over([name for name in given if name in SETTINGS], why, "name a knn_lm store", generator)
        return Reading(retriever)
    why = f"{where} is a knn_lm store, of which no passages are read"
    _pass_over([name for name in given if name not in SETTINGS], why, "name another store", generator)
    check_model(retriever.store, generator.model)
    changed = {setting: given[name] for name, setting in SETTINGS.items() if name in given}
    config = retriever.config
    return Reading(retriever, Mixer(retriever.store, type(config).model_validate({**config.model_dump(), **changed})))


def _with_passages(prompt: str, retriever: StoredRetriever, generator: Any) -> str | None:
    """Passages, the best one last and so nearest to the prompt, as far as the context holds them."""
    options, encode, limit = generator.options, generator.tokenizer.encode, generator.model.max_seq_len
    k = getattr(options, "retrieve_k", None) or READ
    found = retriever.retrieve(prompt, k)
    if not found:
        generator.note("sources: none; nothing in the store matches the prompt")
        return None
    # Half of the context, or what the new text needs if that is less, is left free: what slides out is not read.
    room = limit - len(encode(prompt)) - min(getattr(options, "max_tokens", limit), limit // 2)
    if getattr(options, "command", None) == "chat":
        room //= 2  # the rest is for what was said before
    used: list[Passage] = []
    before = ""
    for passage in found:
        try:
            text = _fitting(passage.text.strip() + "\n\n", room, generator.tokenizer)
        except AptError as error:  # letters that the run's tokenizer does not know
            warnings.warn(f"--retrieve: {passage.source} is left out: {error.message}", AptWarning, stacklevel=2)
            continue
        if not text:
            break
        before, room = text + before, room - len(encode(text))
        used.append(passage)
    if not used:
        raise DataError("no passage fits before the prompt", hint=f"shorten it: the context holds {limit} tokens")
    _name(used, generator)
    return before + prompt


def _fitting(text: str, room: int, tokenizer: Any) -> str:
    """As much of the start of `text` as fits into `room` tokens; nothing where that is less than a few."""
    ids = list(tokenizer.encode(text))
    if len(ids) <= room:
        return text
    cut: str = tokenizer.decode(ids[: max(0, room - len(tokenizer.encode("\n\n")))])
    cut = cut.replace("\ufffd", "").strip()
    return cut + "\n\n" if cut else ""


def _name(passages: list[Passage], generator: Any) -> None:
    generator.note("sources: " + ", ".join(dict.fromkeys(passage.source for passage in passages)))


def _pass_over(names: Collection[str], why: str, instead: str, generator: Any) -> None:
    """Say which of the given options do nothing; what they were given with goes on. Under --strict raise it."""
    if not names:
        return
    options = " and ".join(f"--{name.replace('_', '-')}" for name in names)
    said, hint = f"{options} without effect: {why}", f"leave {options} out, or {instead}"
    if getattr(generator.options, "strict", False):
        raise ConfigError(said, hint=hint)
    warnings.warn(f"{said} ({hint})", AptWarning, stacklevel=2)


def _go_on_without(generator: Any, error: Exception) -> None:
    if getattr(generator.options, "strict", False):
        raise error
    _readings[generator] = Reading()
    said = error.message if isinstance(error, AptError) else f"{type(error).__name__}: {error}"
    hint = f" ({error.hint})" if isinstance(error, AptError) and error.hint else ""
    warnings.warn(f"--retrieve: {said}; generating without retrieval{hint}", AptWarning, stacklevel=2)
