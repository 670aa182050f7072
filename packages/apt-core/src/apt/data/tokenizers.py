"""The tokenizers that come with core: bytes, characters, byte-level BPE, and whatever a tokenizer.json describes.

A tokenizer is one JSON file. `byte` and `char` say which they are under "apt_tokenizer"; any other file is one of the
Hugging Face library `tokenizers`, which is imported only where one is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from apt.core.cache import atomic_write, cache_dir
from apt.core.config import NoConfig, PositiveInt, Section, Side
from apt.core.errors import AptWarning, ConfigError, DataError
from apt.core.files import read_file
from apt.core.providers.dataset import Piece
from apt.core.providers.tokenizer import Tokenizer, TokenizerProvider

if TYPE_CHECKING:
    import tokenizers

Pieces = Callable[[], Iterable[Piece]]

KIND_KEY = "apt_tokenizer"

NUL = "\0"
"""Ends a document where the vocabulary has no better sign: no text file holds it."""

BPE_EOS = "<|endoftext|>"
EOS_NAMES = (BPE_EOS, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<EOS>")
"""What the token that ends a document is called in the tokenizers in circulation, the likeliest first."""

LONGEST_TRAINED, LONGEST_ENCODED = 1000, 1 << 20
"""Letters without a space between them, or spaces without a letter, that are taken as one word. The time to learn from
a word grows with the square of its length, the memory to number it with the length; and what the library cannot have
ends the process."""

LARGEST_FILE = 256 << 20
"""Bytes of a tokenizer.json; those in circulation have up to 35 MB."""

BPE_SMALLEST = 257
"""256 bytes and the end of a document."""


class ByteTokenizer:
    """The bytes of UTF-8: 256 ids, and nothing is outside the vocabulary. Byte 0 ends a document."""

    vocab_size = 256
    eos_id: int | None = 0

    def encode(self, text: str) -> Sequence[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        # 0xFF occurs nowhere in UTF-8, so what is no byte at all is shown as U+FFFD too.
        return bytes(i if 0 <= i < 256 else 0xFF for i in ids).decode("utf-8", errors="replace")

    def save(self, path: Path) -> None:
        _save(path, {KIND_KEY: "byte"})


class CharTokenizer:
    """One id per character, in order of their code points.

    Args:
        characters: the vocabulary; with NUL among them, it ends a document.
    """

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = sorted(set(characters))
        self.vocab_size = len(self.characters)
        self._ids = {character: i for i, character in enumerate(self.characters)}
        self.eos_id = self._ids.get(NUL)

    def encode(self, text: str) -> Sequence[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise DataError(
                f"the character {character!r} (U+{ord(character):04X}, character {text.index(character)} of the text) "
                f"is not among the {self.vocab_size} of the vocabulary",
                hint="take it out of the text, or train with data.tokenizer byte or bpe, which know every character",
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.characters[i] if 0 <= i < self.vocab_size else "\ufffd" for i in ids)

    def save(self, path: Path) -> None:
        _save(path, {KIND_KEY: "char", "characters": "".join(self.characters)})


class HFTokenizer:
    """A tokenizer of the library `tokenizers`. Special tokens that a text spells out are read as such.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; its truncation and padding are switched off.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        # Ids may have gaps: what counts is the largest.
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        found = (tokenizer.token_to_id(name) for name in EOS_NAMES)
        self.eos_id: int | None = next((i for i in found if i is not None), None)

    def encode(self, text: str) -> Sequence[int]:
        # "fast" leaves out the offsets, which nobody reads: a third of the time.
        try:
            parts = list(_without_long_words(text, LONGEST_ENCODED))
            found = self._tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception for a word that it has no token for
            raise DataError(f"the tokenizer cannot encode the text: {error}", hint="take out what it lacks") from error
        ids: list[int] = found[0].ids if len(found) == 1 else list(chain.from_iterable(part.ids for part in found))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def save(self, path: Path) -> None:
        with atomic_write(path) as file:
            file.write(self._tokenizer.to_str(pretty=True).encode("utf-8"))


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file that `Tokenizer.save` of this module or the library `tokenizers` wrote.

    Raises:
        DataError: it cannot be read, or holds no tokenizer.
    """
    try:
        source = read_file(path, LARGEST_FILE).decode("utf-8")
        content = json.loads(source)
    except OSError as error:
        raise DataError(
            f"the tokenizer {path} cannot be read: {error.strerror or error}",
            hint="check the path; data.tokenizer is the name of a tokenizer or the path of a tokenizer.json",
        ) from error
    except (ValueError, RecursionError) as error:
        raise _no_tokenizer(path, f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise _no_tokenizer(path, "no JSON object")
    match content.get(KIND_KEY):
        case None:
            return _load_hf(path, source)
        case "byte":
            return ByteTokenizer()
        case "char":
            characters = content.get("characters")
            if not isinstance(characters, str) or not characters:
                raise _no_tokenizer(path, "the field 'characters' is missing or empty")
            return CharTokenizer(characters)
        case kind:
            raise _no_tokenizer(path, f"{KIND_KEY} is {kind!r}, and known are 'byte' and 'char'")


class _CoreTokenizerProvider(TokenizerProvider):
    """What the providers of core have in common."""

    name: ClassVar[str]
    Config: ClassVar[type[Any] | None] = NoConfig

    def get_name(self) -> str:
        return self.name

    def get_version(self) -> str:
        return "1.0.0"

    def load(self, path: Path) -> Tokenizer:
        return load_tokenizer(path)


class ByteTokenizerProvider(_CoreTokenizerProvider):
    """The 256 bytes of UTF-8."""

    name = "byte"

    def build(self, pieces: Pieces) -> Tokenizer:
        return ByteTokenizer()


class CharTokenizerProvider(_CoreTokenizerProvider):
    """The characters of the data, and NUL to end a document if there are several."""

    name = "char"

    def build(self, pieces: Pieces) -> Tokenizer:
        characters: set[str] = set()
        documents = 0
        for text, continues in pieces():
            characters.update(text)
            documents += not continues
        if documents > 1:
            characters.add(NUL)
        return CharTokenizer(characters)


class BPEConfig(Section):
    """How many tokens are learnt."""

    vocab_size: Side = 4096
    """Ids, the 256 bytes and the end of a document included."""
    min_frequency: PositiveInt = 2
    """How often a pair must occur in the data to become a token."""


class BPETokenizerProvider(_CoreTokenizerProvider):
    """Byte-level BPE (Radford et al. 2019, section 2.2), trained on the data.

    Training takes a while, so its result is cached under a hash of the text and the config.
    """

    name = "bpe"
    Config = BPEConfig

    def build(self, pieces: Pieces) -> Tokenizer:
        if self.config.vocab_size < BPE_SMALLEST:
            raise ConfigError(
                f"data.vocab_size {self.config.vocab_size} is too small for bpe: it needs {BPE_SMALLEST} or more",
                hint="raise it, or set data.tokenizer to byte or char",
            )
        cached = cache_dir("tokenizers") / f"{self._key(pieces())}.json"
        tokenizer = _load_cached(cached)
        if tokenizer is None:
            tokenizer = HFTokenizer(self._train(pieces()))
            # A cache that is full costs the next run some time, and this one nothing.
            with suppress(OSError):
                tokenizer.save(cached)
        if tokenizer.vocab_size < self.config.vocab_size:
            warnings.warn(
                f"bpe learnt {tokenizer.vocab_size} tokens instead of {self.config.vocab_size}: no more pairs of this "
                f"text occur {self.config.min_frequency} times",
                AptWarning,
                stacklevel=2,
            )
        return tokenizer

    def _key(self, pieces: Iterable[Piece]) -> str:
        import tokenizers

        digest = hashlib.sha256(f"{tokenizers.__version__} {self.config!r}\n".encode())
        for text, continues in pieces:
            digest.update(b"\0" * (not continues) + text.encode("utf-8"))
        return digest.hexdigest()

    def _train(self, pieces: Iterable[Piece]) -> tokenizers.Tokenizer:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.config.vocab_size,
            min_frequency=self.config.min_frequency,
            special_tokens=[BPE_EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        parts = (part for text, _ in pieces for part in _without_long_words(text, LONGEST_TRAINED))
        tokenizer.train_from_iterator(parts, trainer)
        return tokenizer


class FileConfig(Section):
    """Which file."""

    path: str
    """A tokenizer.json of Hugging Face's `tokenizers`, or one that a run has kept."""


class FileTokenizerProvider(_CoreTokenizerProvider):
    """The tokenizer of a given tokenizer.json."""

    name = "file"
    Config = FileConfig

    def build(self, pieces: Pieces) -> Tokenizer:
        return load_tokenizer(Path(self.config.path).expanduser())


def _without_long_words(text: str, longest: int) -> Iterator[str]:
    """`text` in parts, cut only inside words that are longer than `longest`; as it is, if it has none."""
    start = 0
    # Only from where a word begins: from everywhere in it would take the square of its length.
    pattern = rf"(?<!\S)\S{{{longest},}}|(?<!\s)\s{{{longest},}}"
    runs = re.finditer(pattern, text) if len(text) > longest else ()
    for run in runs:
        for end in range(run.start() + longest, run.end(), longest):
            yield text[start:end]
            start = end
    yield text[start:]


def _load_cached(path: Path) -> Tokenizer | None:
    """The tokenizer at `path`; None if there is none, or a damaged one, which is then made again."""
    try:
        tokenizer = load_tokenizer(path)
    except DataError:
        return None
    with suppress(OSError):
        os.utime(path)  # when it was used last decides when it is cleared away
    return tokenizer


def _load_hf(path: Path, source: str) -> HFTokenizer:
    from tokenizers import Tokenizer

    try:
        return HFTokenizer(Tokenizer.from_str(source))
    except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
        raise _no_tokenizer(path, str(error)) from error


def _no_tokenizer(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} holds no tokenizer ({reason})",
        hint="give a tokenizer.json that a run or the library `tokenizers` has written",
    )


def _save(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content).encode("ascii"))
