"""Embedding models on disk: found by what lies there, used, and told apart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apt.api import ConfigError, ProviderError
from apt.core.providers.retrieval import Passage
from apt_plugin_rag.retrievers import DenseRetriever, HybridRetriever, StoredRetriever

WORDS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]
PLAIN = {"language": "none"}


def filled(cls: type[StoredRetriever], corpus: list[str], **more: Any) -> StoredRetriever:
    retriever = cls({**PLAIN, **more})
    retriever.add(Passage(text, f"{number:03}") for number, text in enumerate(corpus))
    return retriever


def found(retriever: StoredRetriever, query: str) -> list[tuple[str, float]]:
    return [(passage.source, passage.score) for passage in retriever.retrieve(query)]


@pytest.fixture
def static_model(tmp_path: Path) -> Path:
    """A model of model2vec that knows eight words, each with a direction of its own."""
    model2vec = pytest.importorskip("model2vec", reason="model2vec is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, **{w: i + 1 for i, w in enumerate(WORDS)}}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    vectors = np.vstack([np.zeros(8), np.eye(8) * 3]).astype(np.float32)
    vectors[2] = vectors[1] + vectors[2] / 2  # a bee is nearly an ant
    model2vec.StaticModel(vectors, words).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_finds_what_shares_no_word(static_model: Path, tmp_path: Path) -> None:
    settings = {"model": str(static_model), "store": str(tmp_path / "store")}
    retriever = filled(DenseRetriever, ["cat dog", "ant", "nothing known"], **settings)
    assert found(retriever, "bee")[0] == ("001", pytest.approx(2 / math.sqrt(5), abs=1e-5))
    assert found(retriever, "unheard of") == []
    assert retriever.store.size().vectors == 2  # nothing is known of the third
    retriever.update((), [("empty", "", [])])
    assert found(DenseRetriever({**PLAIN, **settings}), "bee")[0][0] == "001"


def test_a_store_of_other_embeddings_is_refused(static_model: Path, tmp_path: Path) -> None:
    settings = {**PLAIN, "store": str(tmp_path / "store")}
    filled(HybridRetriever, ["cat dog", "ant"], **settings, model=str(static_model))
    with pytest.raises(ConfigError, match=r"embeddings of another model: model2vec .*, not of latent semantic"):
        HybridRetriever(settings).retrieve("ant")
    (static_model / "README.txt").write_text("not as it was")
    with pytest.raises(ConfigError, match="embeddings of another model"):
        HybridRetriever({**settings, "model": str(static_model)}).retrieve("ant")


def test_a_model_that_is_none_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        DenseRetriever({"model": str(tmp_path / "nothing")}).retrieve("ant")
    with pytest.raises(ConfigError, match="is not the folder of a model"):
        DenseRetriever({"model": str(tmp_path)}).retrieve("ant")
    pytest.importorskip("model2vec", reason="model2vec is not installed")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "model2vec"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ProviderError, match="cannot be loaded"):
        DenseRetriever({"model": str(tmp_path)}).retrieve("ant")


def test_sentence_transformers_are_read_too(static_model: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding

    modules = [StaticEmbedding.from_model2vec(str(static_model)), Normalize()]
    library.SentenceTransformer(modules=modules).save(str(tmp_path / "st"))
    retriever = filled(DenseRetriever, ["cat dog", "ant"], model=str(tmp_path / "st"))
    assert retriever.embeddings()["kind"] == "sentence-transformers"
    assert found(retriever, "bee")[0][0] == "001"
