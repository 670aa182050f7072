"""Datasets, tokenizers, trackers, retrievers and voters that are wrong in one thing each: those of
`kit_references_data`, one change each."""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kit_references_data import (
    PlainDataset,
    PlainRetrieval,
    PlainTokenizer,
    PlainTokenizerProvider,
    PlainTracker,
    PlainVoter,
)
from torch import Tensor

from apt.core.providers.dataset import Piece
from apt.core.providers.retrieval import Passage
from apt.core.providers.voter import Candidate

MUTANTS: dict[str, tuple[str, type[Any], str]] = {}
"""{name: (kind, provider, the check that is aimed at it)}; what is wrong with it is its docstring."""

PROVIDERS: dict[type[Any], str] = {
    PlainDataset: "dataset",
    PlainTokenizerProvider: "tokenizer",
    PlainTracker: "tracker",
    PlainRetrieval: "retrieval",
    PlainVoter: "voter",
}


def mutant(aim: str) -> Any:
    """Make a tokenizer, or a whole provider, a mutant that the check `aim` has to catch."""

    def add(cls: Any) -> Any:
        provider = cls
        if issubclass(cls, PlainTokenizer):
            provider = type(cls.__name__, (PlainTokenizerProvider,), {"Tokenizer": cls, "__doc__": cls.__doc__})
        kind = next(kind for base, kind in PROVIDERS.items() if issubclass(provider, base))
        MUTANTS[cls.__name__] = (kind, provider, aim)
        return cls

    return add


# Dataset


@mutant("pieces_are_text")
class Strings(PlainDataset):
    """It yields strings in place of pieces."""

    def pieces(self) -> Iterator[Any]:
        yield from self.texts()


@mutant("pieces_are_text")
class NulInside(PlainDataset):
    """A document holds NUL."""

    def texts(self) -> Sequence[str]:
        return [*super().texts(), "a\0b"]


@mutant("the_order_is_fixed")
class Shuffled(PlainDataset):
    """Documents come in another order each time."""

    def pieces(self) -> Iterator[Any]:
        yield from sorted(super().pieces(), key=lambda piece: (random.random(), piece.text))

    TEXTS = tuple(f"document {i}\n" for i in range(20))


@mutant("the_order_is_fixed")
class OnePassAlone(PlainDataset):
    """The second pass goes on where the first one ended."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.one = super().pieces()

    def pieces(self) -> Iterator[Any]:
        yield from self.one


@mutant("two_passes_are_apart")
class PlaceOnTheProvider(PlainDataset):
    """The place in the documents is kept on the provider."""

    place = 0

    def pieces(self) -> Iterator[Any]:
        self.place = 0
        while self.place < len(self.texts()):
            self.place += 1
            yield Piece(self.texts()[self.place - 1])


@mutant("the_fingerprint_is_fixed")
class FingerprintOfTheTime(PlainDataset):
    """The fingerprint is the time."""

    def fingerprint(self) -> str:
        return str(time.perf_counter_ns())


@mutant("the_fingerprint_leaves_the_documents")
class FingerprintUsesThemUp(PlainDataset):
    """Taking the fingerprint reads the first document, which is then gone."""

    taken = 0

    def texts(self) -> Sequence[str]:
        return super().texts()[self.taken :]

    def fingerprint(self) -> str:
        found = super().fingerprint()
        self.taken = 1
        return found


@mutant("the_size_is_near")
class SizeInDocuments(PlainDataset):
    """The size is the number of documents."""

    def size_hint(self) -> int | None:
        return len(self.texts())


# Tokenizer


@mutant("text_survives")
class LowerCase(PlainTokenizer):
    """Text is made lower case."""

    def split(self, text: str) -> list[str]:
        return [word if word not in self.ids or word.lower() not in self.ids else word.lower()
                for word in super().split(text)]  # fmt: skip


@mutant("text_survives")
class StripsSpaces(PlainTokenizer):
    """Space at the ends of a text is lost."""

    def encode(self, text: str) -> Sequence[int]:
        return super().encode(text.strip())


@mutant("strange_text_survives_or_is_refused")
class KeyErrorForStrangers(PlainTokenizer):
    """A word that is not in the vocabulary is a KeyError."""

    def encode(self, text: str) -> Sequence[int]:
        return [self.ids[word] for word in self.split(text)]


@mutant("strange_text_survives_or_is_refused")
class LeavesStrangersOut(PlainTokenizer):
    """A word that is not in the vocabulary is left out."""

    def encode(self, text: str) -> Sequence[int]:
        return [self.ids[word] for word in self.split(text) if word in self.ids]


@mutant("ids_are_in_the_vocabulary")
class OneTooMany(PlainTokenizer):
    """vocab_size leaves out the end of a document."""

    @property
    def vocab_size(self) -> int:
        return len(self.words) - 1


@mutant("nothing_gives_nothing")
class BeginsWithASign(PlainTokenizer):
    """Every text begins with the sign that ends one, which decode takes away."""

    def encode(self, text: str) -> Sequence[int]:
        return [0, *super().encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode([i for i in ids if i])


@mutant("any_ids_can_be_decoded")
class DecodesWholeTextsAlone(PlainTokenizer):
    """An id without a word is an IndexError."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join([word for word in (self.words[i] for i in ids) if word or self._fail()])

    def _fail(self) -> bool:
        raise IndexError("no word")


@mutant("the_end_of_a_document_has_its_own_id")
class EndsAtAComma(PlainTokenizer):
    """The end of a document is the id of the comma."""

    def __init__(self, words: Iterable[str]) -> None:
        super().__init__(words)
        self.eos_id = self.ids[","]


@mutant("saved_and_loaded_it_is_the_same")
class SavesASet(PlainTokenizer):
    """The words are saved in order of the alphabet, and have other ids when they are loaded."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(sorted(self.words[1:])))


@mutant("saved_and_loaded_it_is_the_same")
class SavesTwoFiles(PlainTokenizer):
    """A second file is left beside the one that was asked for."""

    def save(self, path: Path) -> None:
        super().save(path)
        path.with_suffix(".merges").write_text("")


@mutant("built_twice_it_is_the_same")
class OrderByChance(PlainTokenizerProvider):
    """Ids are dealt out in an order that chance decides."""

    def order(self, counts: Counter[str]) -> list[str]:
        words = super().order(counts)
        random.shuffle(words)
        return words


@mutant("encoding_leaves_nothing_behind")
class GrowsAsItReads(PlainTokenizer):
    """A word that is not in the vocabulary joins it."""

    def encode(self, text: str) -> Sequence[int]:
        for word in self.split(text):
            if word not in self.ids:
                self.ids[word] = len(self.words)
                self.words.append(word)
        return super().encode(text)


# Tracker


@mutant("a_run_is_followed")
class WantsALoss(PlainTracker):
    """Every record is taken to hold a loss."""

    def log(self, record: Mapping[str, Any]) -> None:
        super().log({**record, "loss": round(record["loss"], 6)})


@mutant("any_record_is_taken")
class NumbersAlone(PlainTracker):
    """Every entry is taken for a number."""

    def log(self, record: Mapping[str, Any]) -> None:
        super().log({key: value if key == "event" else float(value) for key, value in record.items()})


@mutant("records_stay_as_they_are")
class TakesTheStepOut(PlainTracker):
    """The step is taken out of the record it is handed."""

    def log(self, record: Any) -> None:
        record["at"] = record.pop("step")
        super().log(record)


@mutant("the_end_may_come_at_any_time")
class EndsOnceAlone(PlainTracker):
    """The end of a run that has not begun, or has ended, is an error."""

    def finish(self) -> None:
        assert self.path is not None
        super().finish()
        self.path = None


@mutant("a_run_can_be_resumed")
class WantsAnEmptyFolder(PlainTracker):
    """What is in the folder already is an error."""

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        super().start(run_dir, config, step)
        assert self.path is not None
        self.path.open("x").close()


@mutant("what_is_logged_is_kept")
class LosesItsBuffer(PlainTracker):
    """What is in the buffer at the end is lost."""

    def finish(self) -> None:
        self.lines = self.lines[:1]
        super().finish()


@mutant("a_run_reaches_it_through_its_hooks")
class OverridesAHook(PlainTracker):
    """A hook of the interface is overridden and no longer logs."""

    def on_log(self, record: Mapping[str, Any]) -> None:
        self.last = record


# Retrieval


@mutant("a_passage_is_found_by_its_own_words")
class CountsCommonWords(PlainRetrieval):
    """The longest passage wins, for it has the most words."""

    def score(self, query: set[str], words: set[str]) -> float:
        return float(len(words)) if query & words else 0.0


@mutant("the_best_come_first")
class WorstFirst(PlainRetrieval):
    """Among several results the best comes last."""

    def best(self, found: list[Any]) -> list[Any]:
        best = super().best(found)
        return [*best[:1], *best[:0:-1]]


@mutant("the_best_come_first")
class OneMoreThanAsked(PlainRetrieval):
    """One result more than k comes back."""

    def retrieve(self, query: str, k: int = 5) -> Sequence[Any]:
        return super().retrieve(query, k + 1)


@mutant("passages_come_back_whole")
class LowersItsTexts(PlainRetrieval):
    """What comes back is what was searched, in lower case."""

    def found(self, passage: Passage, score: float) -> Any:
        return Passage(passage.text if score == 1 else passage.text.lower(), passage.source, score)


@mutant("any_query_is_answered")
class DividesByTheQuery(PlainRetrieval):
    """The score is divided by the number of the query's words."""

    def score(self, query: set[str], words: set[str]) -> float:
        return len(query & words) / len(query) / (1 + len(words - query))


@mutant("an_empty_index_finds_nothing")
class WantsAnIndex(PlainRetrieval):
    """The best passage is asked for where there is none."""

    def best(self, found: list[Any]) -> list[Any]:
        assert max(passage.score for passage in found) >= 0
        return super().best(found)


@mutant("passages_can_be_added_later")
class LastAddWins(PlainRetrieval):
    """Adding begins anew."""

    def add(self, passages: Iterable[Passage]) -> None:
        self.passages = []
        super().add(passages)


@mutant("passages_can_be_added_later")
class ReadsItsInputTwice(PlainRetrieval):
    """What is added is gone through twice, which a generator does not allow."""

    def add(self, passages: Iterable[Passage]) -> None:
        self.forget({passage.source for passage in passages})
        self.passages += passages


@mutant("a_source_is_replaced")
class KeepsOldPassages(PlainRetrieval):
    """Passages of a source that is indexed again stay."""

    def forget(self, sources: set[str]) -> None:
        pass


@mutant("asking_changes_nothing")
class LearnsFromQueries(PlainRetrieval):
    """Passages that were found often come first."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.seen: Counter[str] = Counter()

    def found(self, passage: Passage, score: float) -> Any:
        self.seen[passage.text] += score > 0
        return Passage(passage.text, passage.source, score * (1 + math.log1p(self.seen[passage.text])))


# Voter


@mutant("the_winner_is_a_candidate")
class CountsFromOne(PlainVoter):
    """The index is counted from 1."""

    def vote(self, candidates: Sequence[Candidate]) -> int:
        return super().vote(candidates) + 1


@mutant("the_winner_is_a_candidate")
class WantsMoreThanOne(PlainVoter):
    """With one candidate there is nothing to choose, and nothing comes back."""

    def vote(self, candidates: Sequence[Candidate]) -> Any:
        return super().vote(candidates) if len(candidates) > 1 else None


@mutant("the_answer_of_most_and_likeliest_wins")
class LeastLikelyWins(PlainVoter):
    """The sign of the log-probability is turned round, and votes are not counted."""

    def vote(self, candidates: Sequence[Candidate]) -> int:
        return min(range(len(candidates)), key=lambda i: candidates[i].logprob)


@mutant("the_order_does_not_decide")
class FirstComesFirst(PlainVoter):
    """The first candidate counts double."""

    def vote(self, candidates: Sequence[Candidate]) -> int:
        votes = Counter(candidate.text for candidate in [*candidates, candidates[0], candidates[0]])
        return max(range(len(candidates)), key=lambda i: votes[candidates[i].text])


@mutant("voting_changes_nothing")
class SortsItsCandidates(PlainVoter):
    """The list of candidates is sorted in place."""

    def vote(self, candidates: Sequence[Candidate]) -> int:
        candidates.sort(key=lambda candidate: -candidate.logprob)  # type: ignore[attr-defined]
        return super().vote(candidates)


@mutant("uncertainty_is_judged")
class LogOfZero(PlainVoter):
    """The entropy takes the logarithm of zero, and the comparison with NaN is a tensor."""

    def should_vote(self, logits: Tensor) -> Any:
        return self.entropy(logits.softmax(-1)) > 1

    def entropy(self, probs_V: Tensor) -> Tensor:
        return -(probs_V * probs_V.log()).sum()


@mutant("doubt_asks_for_no_fewer_votes")
class VotesWhereItIsSure(PlainVoter):
    """The comparison is turned round."""

    def should_vote(self, logits: Tensor) -> bool:
        return not super().should_vote(logits)


@mutant("it_asks_for_some_candidates")
class NoCandidates(PlainVoter):
    """It asks for no candidate at all."""

    k = 0
