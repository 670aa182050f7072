"""Retrieval: passages go in, and the best ones for a query come out. Each check begins with an empty index: a factory
whose provider keeps a store has to name another one each time."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from typing import Any

from apt.core.providers.retrieval import Passage
from apt.testing.check import check
from apt.testing.compare import require
from apt.testing.subjects import Subject, describe

TEXTS = (
    "Rivers carry sand and gravel from the mountains down to the sea.",
    "A compiler translates source code into instructions for a machine.",
    "Bees return to the hive and dance to show where flowers bloom.",
    "The orchestra tuned its violins before the symphony began.",
    "Vaccines teach the immune system to recognise a virus.",
    "Glaciers shrink as summers in the Alps grow warmer.",
    "The recipe asks for flour, butter, two eggs and a pinch of salt.",
    "Telescopes gather light from galaxies billions of years old.",
)
STRANGE = ("", "   ", "\n\t", "qqqzzzxxx", "?!...", "größer 你好 🙂", "the", "glacier " * 400)


def passages(texts: Iterable[str] = TEXTS) -> list[Passage]:
    """One passage for each text, from a source of its own."""
    return [Passage(text, f"notes/{zlib.crc32(text.encode())}.txt:1") for text in texts]


def filled(subject: Subject, found: list[Passage] | None = None) -> Any:
    """A provider that has indexed passages."""
    provider = subject.provider()
    provider.add(passages() if found is None else found)
    return provider


@check("retrieval")
def a_passage_is_found_by_its_own_words(subject: Subject) -> None:
    """Asked with a passage's own text, the best result is that passage: whatever else similarity means, it means
    that."""
    provider = filled(subject)
    for text in TEXTS:
        best = list(provider.retrieve(text, 3))
        require(best, f"nothing is found for the words of a passage: {text!r}")
        require(best[0].text == text, f"for the words of {text!r} the best result is {best[0].text!r}")


@check("retrieval")
def the_best_come_first(subject: Subject) -> None:
    """At most `k` results come back, each passage once, in order of falling scores that are finite numbers: they are
    put before a prompt from the top until its room is full."""
    provider = filled(subject)
    for k in (1, 3, 8, 50):
        found = list(provider.retrieve("glaciers and rivers in the mountains", k))
        require(len(found) <= k, f"k={k} gives {len(found)} results: return at most k")
        scores = [passage.score for passage in found]
        require(all(isinstance(s, (int, float)) and math.isfinite(s) for s in scores), f"the scores are {scores}")
        require(scores == sorted(scores, reverse=True), f"the scores do not fall: {scores}; larger is better")
        twice = len(found) - len({(passage.text, passage.source) for passage in found})
        require(not twice, f"{twice} of {len(found)} results come twice")
    require(len(list(provider.retrieve(TEXTS[0], 1))) == 1, "k=1 gives nothing for the words of a passage")


@check("retrieval")
def passages_come_back_whole(subject: Subject) -> None:
    """What comes back is what went in, text and source: the source is what an answer names, and a text that was cut or
    lowered misquotes it."""
    provider, known = filled(subject), {(p.text, p.source) for p in passages()}
    for text in TEXTS:
        for found in provider.retrieve(text, 4):
            require(hasattr(found, "text") and hasattr(found, "source"), f"it returns {describe(found)}, no Passage")
            require((found.text, found.source) in known, f"{found.source}: {found.text!r} is none of what was indexed")


@check("retrieval")
def any_query_is_answered(subject: Subject) -> None:
    """An empty query, one of unknown words, of signs, in another script or very long gives results or none, and no
    error: queries are whatever people type."""
    provider = filled(subject)
    for query in STRANGE:
        try:
            found = list(provider.retrieve(query, 3))
        except Exception as error:
            require(False, f"the query {query!r:.30} raises {type(error).__name__}: {error}; return what there is")
            raise
        require(len(found) <= 3, f"the query {query!r:.30} gives {len(found)} results for k=3")
        require(all(math.isfinite(p.score) for p in found), f"the query {query!r:.30} gives scores that are not finite")


@check("retrieval")
def an_empty_index_finds_nothing(subject: Subject) -> None:
    """With nothing indexed, or an empty list, nothing is found, and nothing is raised: a folder of documents may be
    empty, and an answer without sources is still one."""
    provider = subject.provider()
    require(not list(provider.retrieve("glaciers", 3)), "something is found before anything was indexed")
    provider.add([])
    require(not list(provider.retrieve("glaciers", 3)), "something is found after an empty list was indexed")


@check("retrieval")
def passages_can_be_added_later(subject: Subject) -> None:
    """What is added in a second go is found, and what was there before still is; passages may come from a generator,
    once."""
    provider = subject.provider()
    provider.add(passage for passage in passages(TEXTS[:4]))
    provider.add(passage for passage in passages(TEXTS[4:]))
    for text in (TEXTS[0], TEXTS[3], TEXTS[4], TEXTS[7]):
        found = [passage.text for passage in provider.retrieve(text, 3)]
        require(found[:1] == [text], f"after a second add, {text!r} is not found first by its own words: {found}")


@check("retrieval")
def a_source_is_replaced(subject: Subject) -> None:
    """Passages of a source that was indexed before take the place of its old ones: a file that has changed must not be
    quoted as it was."""
    provider = filled(subject)
    source = passages()[2].source
    new = "Wasps build nests of paper under the roofs of barns."
    provider.add([Passage(new, source)])
    found = [passage.text for passage in provider.retrieve(new, 8)]
    require(found[:1] == [new], f"the new passage of a source is not found by its own words: {found[:2]}")
    old = [passage.text for passage in provider.retrieve(TEXTS[2], 8)]
    require(TEXTS[2] not in old, "the old passage of a source that was indexed again is still found")


@check("retrieval")
def asking_changes_nothing(subject: Subject) -> None:
    """The same query gives the same results, whatever was asked between: an index that learns from what it is asked
    cannot be measured, and shows one user what another has asked."""
    provider = filled(subject)
    query = "light from old mountains"
    first = list(provider.retrieve(query, 5))
    for other in TEXTS:
        list(provider.retrieve(other, 2))
    again = list(provider.retrieve(query, 5))
    require(first == again, f"the same query gives other results: {first!r:.120} and then {again!r:.120}")
