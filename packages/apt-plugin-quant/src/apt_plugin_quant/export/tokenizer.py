"""The tokenizer of a run as a `tokenizer.json` of the library `tokenizers`, where it can be written as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

TOKENIZER = "tokenizer.json"


def as_library_tokenizer(path: Path) -> tokenizers.Tokenizer | None:
    """The tokenizer that a run has saved to `path`, with the same ids for every text; None where the library has no
    such tokenizer."""
    try:
        source = path.read_text(encoding="utf-8")
        content: Any = json.loads(source)
    except ValueError:
        return None
    kind = content.get("apt_tokenizer") if isinstance(content, dict) else None
    if kind == "byte":
        return _bytes()
    if kind == "char":
        return _characters(content["characters"])
    try:
        return tokenizers.Tokenizer.from_str(source)
    except Exception:  # the library's own class, for whatever is none of its files: a plugin's, in its own form
        return None


def _bytes() -> tokenizers.Tokenizer:
    """The 256 bytes of UTF-8: a byte-level BPE without a merge."""
    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _characters(characters: str) -> tokenizers.Tokenizer:
    """One id per character, in this order; any other character is an error there too."""
    vocabulary = {character: i for i, character in enumerate(characters)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab=vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: printable Latin-1 for itself, the others from U+0100 on
    (Radford et al. 2019, as released)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
