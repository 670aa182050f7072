"""Dataset: documents, the same ones in the same order each time."""

from __future__ import annotations

from itertools import islice
from typing import Any

from apt.testing.check import check
from apt.testing.compare import require
from apt.testing.subjects import Subject, describe

MANY = 200
"""How many pieces of a large dataset are looked at."""


def some(provider: Any) -> list[Any]:
    """The first pieces."""
    return list(islice(provider.pieces(), MANY))


@check("dataset")
def pieces_are_text(subject: Subject) -> None:
    """`pieces` yields `Piece`s with a text, without NUL and with no half of a surrogate pair: text is stored as UTF-8,
    and NUL stands between documents."""
    found = some(subject.provider())
    require(found, "it yields nothing: raise DataError where there is no text, and say why")
    for index, piece in enumerate(found):
        text, continues = getattr(piece, "text", None), getattr(piece, "continues", None)
        require(isinstance(text, str), f"piece {index} is {describe(piece)}: yield Piece(text)")
        require(isinstance(continues, bool), f"piece {index} has continues = {continues!r}: it is a bool")
        assert isinstance(text, str)
        require("\0" not in text, f"piece {index} holds NUL at {text.find(chr(0))}: leave such documents out")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            require(False, f"piece {index} is no UTF-8: {error}")
    require(any(piece.text for piece in found), "every piece is empty")
    require(not found[0].continues, "the first piece says that it continues a document, and there is none before it")


@check("dataset")
def the_order_is_fixed(subject: Subject) -> None:
    """Asked again, and from a fresh provider, the documents and their order are the same: what is held out for
    evaluation is a stretch of that order, and training on it by accident makes every figure wrong."""
    provider = subject.provider()
    first = some(provider)
    for what, again in (("asked again", some(provider)), ("from a fresh provider", some(subject.provider()))):
        index = next((i for i, (a, b) in enumerate(zip(first, again, strict=False)) if a != b), None)
        require(
            index is None and len(first) == len(again),
            f"{what}, piece {index} is another one ({len(first)} and {len(again)} pieces): sort what comes from a "
            "folder or a set, and begin a new pass at each call",
        )


@check("dataset")
def two_passes_are_apart(subject: Subject) -> None:
    """Two passes at the same time do not disturb each other: the tokenizer may still read when tokens are counted."""
    provider = subject.provider()
    expected = some(provider)[:20]
    one, two = iter(provider.pieces()), iter(provider.pieces())
    seen: list[list[Any]] = [[], []]
    for _ in expected:
        seen[0].append(next(one, None))
        seen[1].append(next(two, None))
    require(seen == [expected, expected], "two passes side by side miss pieces: keep the place in the generator alone")


@check("dataset")
def the_fingerprint_is_fixed(subject: Subject) -> None:
    """`fingerprint` is a string that is the same for the same documents, before and after they are read and from a
    fresh provider: tokens are cached under it, and a new one each time makes them again each time."""
    provider = subject.provider()
    first = provider.fingerprint()
    require(isinstance(first, str) and first, f"fingerprint gives {describe(first)}, not a string")
    some(provider)
    require(provider.fingerprint() == first, "after a pass fingerprint gives another string: leave time and place out")
    require(subject.provider().fingerprint() == first, "a fresh provider has another fingerprint: hash the documents")


@check("dataset")
def the_fingerprint_leaves_the_documents(subject: Subject) -> None:
    """Documents are the same whether their fingerprint was taken or not: core takes it first."""
    plain, asked = subject.provider(), subject.provider()
    asked.fingerprint()
    require(
        some(plain) == some(asked), "after fingerprint() the documents are other ones: it used up what pieces reads"
    )


@check("dataset")
def the_size_is_near(subject: Subject) -> None:
    """`size_hint` is None or within a factor of four of the bytes there are: progress and the time that is left are
    worked out from it."""
    provider = subject.provider()
    hint = provider.size_hint()
    if hint is None:
        return
    require(isinstance(hint, int) and hint >= 0, f"size_hint gives {describe(hint)}, not an int or None")
    pieces = list(islice(provider.pieces(), MANY + 1))
    size = sum(len(piece.text.encode("utf-8", "replace")) for piece in pieces)
    require(hint * 4 >= size, f"size_hint says {hint:,} bytes, and the first {len(pieces)} pieces have {size:,}")
    if len(pieces) <= MANY:
        require(hint <= 4 * size, f"size_hint says {hint:,} bytes, and there are {size:,}: count bytes of text")
