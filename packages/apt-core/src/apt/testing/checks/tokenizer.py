"""Tokenizer: text to ids and back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from apt.core.errors import DataError
from apt.core.providers.dataset import Piece
from apt.testing.check import check
from apt.testing.compare import require
from apt.testing.subjects import Subject

TRAINED_ON = (
    "The quick brown fox jumps over the lazy dog.\nPack my box with five dozen liquor jugs!\n\n",
    "  two  spaces, a\ttab, CRLF\r\n, 0123456789, {brackets: [1.5e-3]}, don't; can't.\n" * 3,
    "naïve café, größer, Ελλάδα, Привет, 你好世界, 🙂👩\u200d👧, e\u0301\n",
)
STRANGE = ("", " ", "\n", "a" * 300, "fox fox", "zebra \u2603 \U0001f9e0", "\u00a0\u2028", "<|endoftext|>", "x\u0000y")
"""What a text may hold that a vocabulary was not built from."""


def pieces() -> Iterable[Piece]:
    """Three documents, the second in two pieces."""
    yield Piece(TRAINED_ON[0])
    half = len(TRAINED_ON[1]) // 2
    yield Piece(TRAINED_ON[1][:half])
    yield Piece(TRAINED_ON[1][half:], continues=True)
    yield Piece(TRAINED_ON[2])


def built(subject: Subject, provider: Any = None, source: Callable[[], Iterable[Piece]] = pieces) -> Any:
    """A tokenizer for these documents."""
    return (provider or subject.provider()).build(source)


def encoded(tokenizer: Any, text: str) -> list[int] | None:
    """The ids of a text; None where it is refused as outside the vocabulary."""
    try:
        return list(tokenizer.encode(text))
    except DataError:
        return None


def first_difference(actual: Sequence[Any], expected: Sequence[Any]) -> str:
    """Where two sequences part."""
    index = next((i for i, (a, b) in enumerate(zip(actual, expected, strict=False)) if a != b), None)
    if index is None:
        return f"lengths {len(actual)} and {len(expected)}"
    return f"from {index} on: {actual[index : index + 12]!r} for {expected[index : index + 12]!r}"


@check("tokenizer")
def text_survives(subject: Subject) -> None:
    """What was encoded is decoded to the same text, character for character: what is lost here no model can learn, and
    no answer can contain."""
    tokenizer = built(subject)
    for text in TRAINED_ON:
        ids = encoded(tokenizer, text)
        require(ids is not None, f"a text that it was built from is refused: {text[:30]!r}")
        back = tokenizer.decode(ids)
        require(back == text, f"{text[:30]!r}... comes back changed, {first_difference(back, text)}")


@check("tokenizer")
def strange_text_survives_or_is_refused(subject: Subject) -> None:
    """Text unlike what it was built from comes back as it was, or is refused with DataError: any other error, and a
    text that is quietly changed, reaches a user who only typed a prompt."""
    tokenizer = built(subject)
    for text in STRANGE:
        try:
            ids = list(tokenizer.encode(text))
        except DataError:
            continue
        except Exception as error:
            require(False, f"encode({text!r:.40}) raises {type(error).__name__}: {str(error)[:40]}; raise DataError")
            raise
        back = tokenizer.decode(ids)
        require(back == text, f"{text!r:.40} comes back as {back!r:.40}: refuse with DataError what cannot be kept")


@check("tokenizer")
def ids_are_in_the_vocabulary(subject: Subject) -> None:
    """Every id is an int from 0 to vocab_size - 1: the embedding has that many rows, and one more is a crash, on a GPU
    one without a message."""
    tokenizer = built(subject)
    size = tokenizer.vocab_size
    require(isinstance(size, int) and size > 0, f"vocab_size is {size!r}, not a positive int")
    for text in (*TRAINED_ON, *STRANGE):
        ids = encoded(tokenizer, text) or []
        wrong = [i for i in ids if isinstance(i, bool) or not (hasattr(i, "__index__") and 0 <= i < size)]
        require(not wrong, f"{text!r:.30} gives the ids {wrong[:5]}, and vocab_size is {size}")


@check("tokenizer")
def nothing_gives_nothing(subject: Subject) -> None:
    """The empty text has no ids, and no ids are the empty text: a prompt may be empty, and a sign added here would
    stand in the middle of every text that is encoded in parts."""
    tokenizer = built(subject)
    ids = list(tokenizer.encode(""))
    require(not ids, f"encode('') gives {ids}: add no special tokens")
    require(tokenizer.decode([]) == "", f"decode([]) gives {tokenizer.decode([])!r}")


@check("tokenizer")
def any_ids_can_be_decoded(subject: Subject) -> None:
    """Every single id, every beginning of a text and any mixture decode to some string: a model may say anything, and
    streaming shows what is not complete yet."""
    tokenizer = built(subject)
    size = tokenizer.vocab_size
    ids = encoded(tokenizer, TRAINED_ON[2]) or []
    mixtures = [[i] for i in range(min(size, 2000))] + [ids[:stop] for stop in range(len(ids))]
    mixtures += [[(7 * i * i + 3) % size for i in range(50)], [size - 1, 0] * 5]
    for sequence in mixtures:
        try:
            text = tokenizer.decode(sequence)
        except Exception as error:
            require(False, f"decode({sequence[:8]}) raises {type(error).__name__}: {error}; use U+FFFD")
            raise
        require(isinstance(text, str), f"decode({sequence[:8]}) gives {type(text).__name__}, not a string")


@check("tokenizer")
def the_end_of_a_document_has_its_own_id(subject: Subject) -> None:
    """`eos_id` is None or an id of the vocabulary that no ordinary text gives: else a document ends in the middle of a
    word."""
    tokenizer = built(subject)
    eos = tokenizer.eos_id
    if eos is not None:
        require(0 <= eos < tokenizer.vocab_size, f"eos_id is {eos}, and vocab_size is {tokenizer.vocab_size}")
        for text in TRAINED_ON:
            require(eos not in (encoded(tokenizer, text) or []), f"eos_id {eos} comes out of the text {text[:30]!r}")


@check("tokenizer")
def saved_and_loaded_it_is_the_same(subject: Subject) -> None:
    """`save` writes one file from which `load` of a fresh provider makes the same tokenizer: a run keeps it, and
    without it the weights are noise."""
    tokenizer = built(subject)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer.save(path)
        found = sorted(entry.name for entry in Path(folder).iterdir())
        require(found == [path.name], f"save({path.name!r}) leaves {found}: everything goes into that one file")
        loaded = subject.provider().load(path)
    for what in ("vocab_size", "eos_id"):
        was, now = getattr(tokenizer, what), getattr(loaded, what)
        require(was == now, f"{what} is {was} before save and {now} after load")
    for text in (*TRAINED_ON, *STRANGE):
        was, now = encoded(tokenizer, text), encoded(loaded, text)
        require(was == now, f"after load {text!r:.30} has other ids, {first_difference(now or [], was or [])}")
        if was is not None:
            require(
                loaded.decode(was) == tokenizer.decode(was), f"after load the ids of {text!r:.30} decode differently"
            )


@check("tokenizer")
def built_twice_it_is_the_same(subject: Subject) -> None:
    """The same documents give the same tokenizer: ids that depend on the order of a set, or on chance, make a run that
    nobody can repeat."""
    one, two = built(subject), built(subject)
    require(one.vocab_size == two.vocab_size, f"built twice it has {one.vocab_size} and {two.vocab_size} ids")
    for text in TRAINED_ON:
        was, now = encoded(one, text), encoded(two, text)
        require(was == now, f"built twice it gives other ids for {text[:30]!r}: sort what comes from a set or a dict")


@check("tokenizer")
def encoding_leaves_nothing_behind(subject: Subject) -> None:
    """A text has the same ids whatever was encoded before it, and a vocabulary that is built does not grow: a model's
    embedding cannot."""
    tokenizer = built(subject)
    size, before = tokenizer.vocab_size, encoded(tokenizer, TRAINED_ON[0])
    for text in (*STRANGE, *TRAINED_ON):
        encoded(tokenizer, text)
    require(tokenizer.vocab_size == size, f"vocab_size was {size} and is {tokenizer.vocab_size} after encoding")
    require(encoded(tokenizer, TRAINED_ON[0]) == before, "a text has other ids after other texts were encoded")
