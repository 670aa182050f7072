"""Plain correct providers of the kinds that handle text and runs, written so that a mutant can change one thing."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from kit_references import Plain
from torch import Tensor

from apt.core.errors import DataError
from apt.core.providers.dataset import DatasetProvider, Piece
from apt.core.providers.retrieval import Passage, RetrievalProvider
from apt.core.providers.tokenizer import TokenizerProvider
from apt.core.providers.tracker import TrackerProvider
from apt.core.providers.voter import Candidate, VoterProvider

# Dataset


class PlainDataset(Plain, DatasetProvider):
    TEXTS = ("one document\n", "another, longer document\n" * 5, "größer 🙂\n")

    def texts(self) -> Sequence[str]:
        return self.TEXTS

    def pieces(self) -> Iterator[Any]:
        for text in self.texts():
            yield Piece(text)

    def fingerprint(self) -> str:
        return hashlib.sha256("\0".join(self.texts()).encode()).hexdigest()

    def size_hint(self) -> int | None:
        return sum(len(text.encode()) for text in self.texts())


# Tokenizer


class PlainTokenizer:
    """Words and single characters between them; id 0 ends a document."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = ["", *words]
        self.ids = {word: i for i, word in enumerate(self.words) if i}
        self.eos_id: int | None = 0

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def split(self, text: str) -> list[str]:
        return re.findall(r"\w+|\W", text)

    def encode(self, text: str) -> Sequence[int]:
        try:
            return [self.ids[word] for word in self.split(text)]
        except KeyError as error:
            raise DataError(f"{error.args[0]!r} is not in the vocabulary") from error

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.words[i] if 0 < i < len(self.words) else "\ufffd" for i in ids)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.words[1:]))


class PlainTokenizerProvider(Plain, TokenizerProvider):
    Tokenizer: ClassVar[type[PlainTokenizer]] = PlainTokenizer

    def build(self, pieces: Callable[[], Iterable[Piece]]) -> Any:
        counts = Counter(re.findall(r"\w+|\W", "".join(piece.text for piece in pieces())))
        return self.Tokenizer(self.order(counts))

    def order(self, counts: Counter[str]) -> list[str]:
        return sorted(counts, key=lambda word: (-counts[word], word))

    def load(self, path: Path) -> Any:
        return self.Tokenizer(json.loads(path.read_text()))


# Tracker


class PlainTracker(Plain, TrackerProvider):
    """One line of JSON for each record."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.lines: list[str] = []
        self.path: Path | None = None

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int) -> None:
        self.path = run_dir / "plain.jsonl"

    def log(self, record: Mapping[str, Any]) -> None:
        self.lines.append(json.dumps(record, default=str))

    def finish(self) -> None:
        if self.path is not None and self.lines:
            with self.path.open("a") as file:
                file.write("\n".join(self.lines) + "\n")
            self.lines = []


# Retrieval


class PlainRetrieval(Plain, RetrievalProvider):
    """The share of a passage's words that the query and it have in common."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.passages: list[Passage] = []

    def add(self, passages: Iterable[Passage]) -> None:
        new = list(passages)
        self.forget({passage.source for passage in new})
        self.passages += new

    def forget(self, sources: set[str]) -> None:
        self.passages = [passage for passage in self.passages if passage.source not in sources]

    def words(self, text: str) -> set[str]:
        return set(re.findall(r"\w+", text.lower()))

    def score(self, query: set[str], words: set[str]) -> float:
        return len(query & words) / max(1, len(query | words))

    def found(self, passage: Passage, score: float) -> Any:
        return Passage(passage.text, passage.source, score)

    def retrieve(self, query: str, k: int = 5) -> Sequence[Any]:
        words = self.words(query)
        found = [self.found(p, self.score(words, self.words(p.text))) for p in self.passages]
        return self.best(found)[:k]

    def best(self, found: list[Any]) -> list[Any]:
        return sorted((p for p in found if p.score > 0), key=lambda passage: -passage.score)


# Voter


class PlainVoter(Plain, VoterProvider):
    """The answer that most give, the likeliest of several such; asked where the entropy is above one nat."""

    def should_vote(self, logits: Tensor) -> bool:
        return bool(self.entropy(logits.float().softmax(-1)) > 1)

    def entropy(self, probs_V: Tensor) -> Tensor:
        return torch.special.entr(probs_V).sum()

    def vote(self, candidates: Sequence[Candidate]) -> int:
        votes = Counter(candidate.text for candidate in candidates)
        return max(range(len(candidates)), key=lambda i: (votes[candidates[i].text], candidates[i].logprob))
