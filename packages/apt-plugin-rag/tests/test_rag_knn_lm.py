"""kNN-LM beside its definition, and generation that reads from a store, or goes on without one that fails."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt.api import AptWarning, ConfigError, DataError, Generator, find_run
from apt_plugin_rag import knn_lm
from apt_plugin_rag.contents import Document, Vectors
from apt_plugin_rag.knn_lm import KNNRetriever, KNNSettings, Mixer, fingerprint_of, hidden_states
from apt_plugin_rag.store import Manifest, Store, open_store

Apt = Callable[..., Any]


@given(st.integers(0, 200), st.integers(1, 20))
def test_every_position_is_read_once_with_half_a_context_before_it(count: int, limit: int) -> None:
    seen: list[int] = []
    for starts, kept in knn_lm._windows(count, limit):
        for start in starts:
            assert start == 0 or start + limit <= count
            end = min(start + limit, count)
            assert kept == 0 or kept >= limit // 2
            seen += range(start + kept, end)
    assert seen == list(range(count))


def test_hidden_states_are_the_models_own(trained: Path) -> None:
    generator = Generator.from_run(find_run(trained), device="cpu")
    limit = generator.model.max_seq_len
    ids = np.array(generator.tokenizer.encode((trained.parents[1] / "text.txt").read_text()[: 3 * limit + 5]), np.int64)
    states = hidden_states(generator.model, ids)
    assert states.shape == (len(ids), generator.model.d_model)
    for position in (0, 5, limit - 1, limit, 2 * limit + 3, len(ids) - 1):
        own = [states[position] - alone(generator.model, ids, position, start) for start in range(len(ids) - limit + 1)
               if start <= position < start + limit and (start == 0 or position - start >= limit // 2)]  # fmt: skip
        assert min(np.abs(difference).max() for difference in own) < 1e-5


def alone(model: Any, ids: Any, position: int, start: int) -> Any:
    with torch.no_grad():
        return model(torch.from_numpy(ids[None, start : position + 1])).hidden[0, -1].numpy()


@pytest.fixture
def store() -> Store:
    """Six keys in two passages."""
    store = open_store(None, create=True)
    points = np.array([[0, 0], [0, 1], [1, 0], [4, 4], [4, 5], [9, 9]], np.float32)
    vectors = Vectors.of(points, np.array([0, 0, 0, 1, 1, 1]), np.array([2, 1, 2, 0, 0, 3]))
    from apt.core.providers.retrieval import Passage

    document = Document("a", "", [Passage("one", "a:1"), Passage("two", "a:2")], vectors=vectors)
    store.update(Manifest("knn_lm", "1", {}), (), [document])
    return store


def test_the_mixture_is_what_its_formula_says(store: Store) -> None:
    settings = KNNSettings(neighbours=4, weight=0.3, temperature=0.5)
    mixer = Mixer(store, settings)
    query = np.array([[0.5, 0.0], [4.0, 4.0]], np.float32)
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4, -torch.inf], [1.0, 0.0, 0.0, 2.0, -torch.inf]])
    points = np.array([[0, 0], [0, 1], [1, 0], [4, 4], [4, 5], [9, 9]], float)
    values = [2, 1, 2, 0, 0, 3]
    spread = ((points - points.mean(axis=0)) ** 2).sum(axis=1).mean()
    expected = np.zeros((2, 5))
    for row, q in enumerate(query):
        squares = ((points - q) ** 2).sum(axis=1)
        near = np.argsort(squares, kind="stable")[:4]
        shares = np.exp(-squares[near] / (0.5 * spread))
        for index, share in zip(near, shares / shares.sum(), strict=True):
            expected[row, values[index]] += share
    expected = 0.3 * expected + 0.7 * logits.softmax(dim=-1).numpy()
    mixed = mixer.mix(logits, mixer.find(query))
    assert torch.allclose(mixed.exp(), torch.from_numpy(expected).float(), atol=1e-6)
    assert (mixed[:, 4] == -torch.inf).all()  # what the vocabulary lacks stays out
    assert mixer.mix(logits.double(), mixer.find(query)).dtype == torch.float64
    assert mixer.passages(mixer.find(query)[1], 1)[0][0] == 1


def test_an_empty_datastore_changes_nothing() -> None:
    store = open_store(None, create=True)
    store.update(Manifest("knn_lm", "1", {}), (), ())
    mixer = Mixer(store, KNNSettings())
    logits = torch.randn(2, 5)
    assert mixer.mix(logits, mixer.find(np.zeros((2, 3), np.float32))) is logits


def test_a_fingerprint_tells_weights_apart() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(40, 50)
    before = fingerprint_of(layer)
    assert fingerprint_of(torch.nn.Linear(40, 50).requires_grad_(False)) != before
    with torch.no_grad():
        layer.weight += 1e-4
    assert fingerprint_of(layer) != before


def test_the_passages_before_a_datastores_neighbours_are_found(trained: Path) -> None:
    text = trained.parents[1] / "text.txt"
    retriever = KNNRetriever({"run": str(trained), "passage_words": 20})
    from apt_plugin_rag.passages import cut

    retriever.update((), [("text", "0", list(cut(text.read_text(), "text.txt", 20)))])
    size = retriever.store.size()
    assert size.vectors == len(text.read_text()) - 1
    assert [p.source.partition(":")[0] for p in retriever.retrieve("7 green bott", 2)] == ["text.txt"] * 2
    assert retriever.retrieve("", 2) == []
    [first] = retriever.retrieve(text.read_text()[:60], 1)
    assert first.source == "text.txt:1"
    assert 0 < first.score <= 1


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    shutil.copy(trained.parents[1] / "text.txt", tmp_path / "text.txt")
    return tmp_path / "run"


def test_generation_mixes_a_datastore_and_names_its_sources(apt: Apt, run: Path) -> None:
    made = apt("rag", "index", "text.txt", "--store", "kn", "--retriever", "knn_lm", "--run", "run")
    assert made.code == 0, made.err
    generate = ("generate", "run", "--prompt", "0 gr", "--max-tokens", 12, "--temperature", 0, "--device", "cpu")
    plain = apt(*generate)
    read = apt(*generate, "--retrieve", "kn", "--knn-lambda", 0.99, "--knn-temperature", 1e-6)
    assert read.code == 0
    assert read.err.startswith("sources: ")
    assert "text.txt:" in read.err
    assert read.out != plain.out
    assert read.out == "0 green bottles \n"  # the text itself, which so short a training has not learned
    for wrong in (("--knn-lambda", 1), ("--knn-temperature", 0), ("--knn-temperature", "hot"), ("--retrieve-k", 0)):
        assert apt(*generate, "--retrieve", "kn", *wrong).code == 2
    assert apt("rag", "query", "7 green bott", "--store", "kn", "-k", 1).code == 0


def test_generation_reads_passages_and_names_their_sources(apt: Apt, run: Path) -> None:
    apt("rag", "index", "text.txt", "--store", "s", "--language", "none", "--passage-words", 7)
    generate = ("generate", "run", "--prompt", "7", "--max-tokens", 12, "--seed", 1, "--device", "cpu")
    read = apt(*generate, "--retrieve", "s", "--retrieve-k", 1)
    assert (read.code, read.err.count("sources: ")) == (0, 1)
    assert "text.txt:8\n" in read.err
    assert read.out.startswith("7")
    assert len(read.out) == len(apt(*generate).out)


def test_an_option_that_a_store_does_not_take_is_said_and_the_store_is_read(apt: Apt, run: Path) -> None:
    apt("rag", "index", "text.txt", "--store", "s", "--language", "none", "--passage-words", 7)
    apt("rag", "index", "text.txt", "--store", "kn", "--retriever", "knn_lm", "--run", "run")
    generate = ("generate", "run", "--prompt", "7", "--max-tokens", 4, "--seed", 1, "--device", "cpu")
    datastore = "only a knn_lm store takes that, and s is a bm25 store"
    for store, option, value, why, other in (
        ("s", "--knn-lambda", 0.5, datastore, "a knn_lm"),
        ("s", "--knn-temperature", 0.5, datastore, "a knn_lm"),
        ("kn", "--retrieve-k", 1, "kn is a knn_lm store, of which no passages are read", "another"),
    ):
        plain = apt(*generate, "--retrieve", store)
        read = apt(*generate, "--retrieve", store, option, value)
        said, fix = f"{option} without effect: {why}", f"leave {option} out, or name {other} store"
        assert (read.code, read.out) == (0, plain.out)
        assert read.err == f"warning: {said} ({fix})\n{plain.err}"
        assert "sources: " in plain.err
        strict = apt(*generate, "--retrieve", store, option, value, "--strict")
        assert strict.code == 2
        assert f"{said}; {fix}" in strict.err


def test_an_option_of_retrieval_without_a_store_is_said_once(apt: Apt, run: Path) -> None:
    generate = ("generate", "run", "--prompt", "7", "--prompt", "8", "--max-tokens", 4, "--seed", 1, "--device", "cpu")
    plain = apt(*generate)
    assert "without effect" not in plain.err
    given = ("--retrieve-k", 2, "--knn-lambda", 0.5, "--knn-temperature", 1)
    options = "--retrieve-k and --knn-lambda and --knn-temperature"
    read = apt(*generate, *given)
    assert (read.code, read.out) == (0, plain.out)
    assert read.err.count("warning: ") == 1
    assert f"warning: {options} without effect: there is no --retrieve (leave {options} out, or name" in read.err
    strict = apt(*generate, *given, "--strict")
    assert (strict.code, strict.out) == (2, "")
    assert f"{options} without effect: there is no --retrieve; leave {options} out" in strict.err


class Reader:
    """A generator as hooks see it."""

    def __init__(self, trained: Path, **options: Any) -> None:
        loaded = Generator.from_run(find_run(trained), device="cpu")
        self.model, self.tokenizer, self.device = loaded.model, loaded.tokenizer, loaded.device
        self.options = Namespace(strict=False, retrieve_k=3, max_tokens=4, **options)
        self.notes: list[str] = []
        self.note = self.notes.append


@pytest.mark.filterwarnings("ignore:.*strange is left out:apt.core.errors.AptWarning")
def test_the_best_passage_stands_nearest_and_all_fit(trained: Path, tmp_path: Path, installed: None) -> None:
    from apt.core.providers.retrieval import Passage
    from apt_plugin_rag.generation import start
    from apt_plugin_rag.retrievers import BM25Retriever

    retriever = BM25Retriever({"language": "none", "store": str(tmp_path / "s")})
    retriever.add([Passage("7 7\n", "best"), Passage("7 on\n", "next"), Passage("7 \u263a", "strange")])
    reader = Reader(trained, retrieve=str(tmp_path / "s"))
    with pytest.warns(AptWarning, match="strange is left out"):
        assert start("7", reader) == "7 on\n\n7 7\n\n7"
    assert reader.notes == ["sources: best, next"]
    retriever.add([Passage("7 7 " + "green bottles hanging " * 3, "best")])
    reader = Reader(trained, retrieve=str(tmp_path / "s"))
    with pytest.warns(AptWarning, match="strange is left out"):
        prompt = start("7 7", reader)
    assert prompt is not None
    assert prompt.endswith("\n\n7 7")
    assert len(reader.tokenizer.encode(prompt)) <= reader.model.max_seq_len - reader.options.max_tokens
    talker = Reader(trained, retrieve=str(tmp_path / "s"), command="chat")
    with pytest.warns(AptWarning, match="strange is left out"):
        told = start("7 7", talker)
    assert told is not None
    assert len(told) < len(prompt)  # what was said before has its half
    assert start("zz", reader) is None
    assert reader.notes[-1].startswith("sources: none")
    with pytest.warns(AptWarning, match="no passage fits before the prompt; generating without retrieval"):
        assert start("7 " * 20, reader) is None
    assert start("7", reader) is None  # it is not asked again


@pytest.mark.parametrize("broken", ["missing", "truncated", "other", "raises"])
def test_a_retriever_that_fails_never_stops_a_generation(
    apt: Apt, run: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = ("generate", "run", "--prompt", "7 gr", "--max-tokens", 12, "--seed", 1, "--device", "cpu")
    plain = apt(*generate)
    said = {
        "missing": "there is no store in s",
        "truncated": "the store s is damaged: points.npy has",
        "other": "the store s holds the hidden states of another model",
        "raises": "RuntimeError: out of order",
    }[broken]
    if broken != "missing":
        apt("rag", "index", "text.txt", "--store", "s", "--retriever", "knn_lm", "--run", "run")
    if broken == "truncated":
        points = next(Path("s").glob("data-*/points.npy"))
        points.write_bytes(points.read_bytes()[:-1])
    if broken == "other":
        monkeypatch.setattr("apt_plugin_rag.knn_lm.fingerprint_of", lambda model: "another")
    if broken == "raises":

        def find(*_: Any) -> None:
            raise RuntimeError("out of order")

        monkeypatch.setattr(Mixer, "find", find)
    without = apt(*generate, "--retrieve", "s")
    assert (without.code, without.out) == (0, plain.out)
    assert without.err.count("warning: ") == 1
    assert f"warning: --retrieve: {said}" in without.err
    assert "generating without retrieval" in without.err
    strict = apt(*generate, "--retrieve", "s", "--strict")
    assert strict.code == 2
    assert said in strict.err


def test_a_store_is_of_one_run_alone(apt: Apt, run: Path) -> None:
    index = ("rag", "index", "text.txt", "--store", "s", "--retriever", "knn_lm")
    assert apt(*index, "--run", "nothing").code == 2
    assert apt(*index, "--run", "run").code == 0
    assert apt(*index).code == 0  # the store knows its run
    from apt_plugin_rag.commands import open_retriever

    retriever = open_retriever("s")
    with torch.no_grad():
        next(retriever.generator.model.parameters()).add_(0.1)
    with pytest.raises(ConfigError, match="embeddings of another model"):
        retriever.retrieve("7")
    with pytest.raises(DataError, match="hidden states of another model"):
        knn_lm.check_model(retriever.store, retriever.generator.model)
