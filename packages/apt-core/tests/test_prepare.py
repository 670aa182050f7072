"""From a profile to batches: which provider gets which settings, how the text is split, what is cached and said."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.builtin.plugin import apt_register_providers
from apt.core.config import RunConfig
from apt.core.errors import AptWarning, ConfigError, DataError, ProviderNotFoundError
from apt.core.in_use import ProvidersInUse
from apt.core.providers.dataset import DatasetProvider, Piece
from apt.core.registry import Registry
from apt.data.loader import TokenLoader
from apt.data.prepare import Data, prepare_data
from apt.data.sources import FilesDataset
from apt.data.tokenizers import CharTokenizer

TEXT = "".join(f"{n} bottles of beer on the wall, take one down and pass it around.\n" for n in range(60))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APT_CACHE_DIR", str(tmp_path / "cache"))


def prepare(registry: Registry | None = None, **data: Any) -> tuple[Data, ProvidersInUse]:
    arguments: dict[str, Any] = {
        "tokenizer_path": data.pop("tokenizer_path", None),
        "progress": data.pop("progress", None),
    }
    shape = data.pop("shape", {"block": 8, "batch": 4})
    config = RunConfig.model_validate(
        {
            "data": data,
            "model": {"max_seq_len": shape["block"]},
            "training": {
                "batch_size": shape["batch"],
                "gradient_accumulation": shape.get("accumulation", 1),
                "seed": 1,
            },
        }
    )
    if registry is None:
        registry = Registry()
        apt_register_providers(registry)
    in_use = ProvidersInUse(registry, {"data": config.data.sections})
    return prepare_data(config, in_use, **arguments), in_use


def write(path: Path, text: str = TEXT) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return str(path)


def stream(data: Data, loader: TokenLoader) -> str:
    return data.tokenizer.decode(loader.tokens.ids.tolist())


class Poems(DatasetProvider):
    """A dataset such as a plugin would bring."""

    def get_name(self) -> str:
        return "poems"

    def get_version(self) -> str:
        return "1"

    def pieces(self) -> Iterator[Piece]:
        for line in TEXT.splitlines():
            yield Piece(line)

    def fingerprint(self) -> str:
        return "the same"


def with_poems(target: type[DatasetProvider] = Poems) -> Registry:
    registry = Registry()
    apt_register_providers(registry)
    registry.register("dataset", "poems", target)
    return registry


# The split


@settings(max_examples=50, deadline=None)
@given(text=st.text("abc \n", min_size=200, max_size=400), fraction=st.sampled_from([0.1, 0.25, 0.5]))
def test_one_text_at_char_level_is_cut_as_nanogpt_cuts_it(
    tmp_path_factory: pytest.TempPathFactory, text: str, fraction: float
) -> None:
    path = write(tmp_path_factory.mktemp("data") / "a.txt", text)
    data, _ = prepare(train_path=path, tokenizer="char", val_fraction=fraction)
    cut = int(len(text) * (1 - fraction))
    assert stream(data, data.train) == text[:cut]
    assert stream(data, data.val) == text[cut:]
    assert data.tokenizer.vocab_size == len(set(text))


def test_documents_are_joined_by_what_ends_one(tmp_path: Path) -> None:
    for n in range(30):
        write(tmp_path / "texts" / f"{n:02}.txt", f"document {n:02}")
    data, _ = prepare(train_path=str(tmp_path / "texts"), document_mask=True)
    whole = stream(data, data.train) + stream(data, data.val)
    assert whole == "\0".join(f"document {n:02}" for n in range(30))
    assert data.train.tokens.starts[:3].tolist() == [0, 12, 24]
    assert data.val.tokens.starts[0] == 0
    assert next(data.train.epoch(0)).document_ids is not None


def test_a_validation_text_is_held_out_whole_and_shares_the_vocabulary(tmp_path: Path) -> None:
    val = write(tmp_path / "val.jsonl", "\n".join(json.dumps({"body": f"\u00fcber {n}"}) for n in range(9)))
    train = write(tmp_path / "train.txt")
    for tokenizer in ("char", "byte"):
        data, _ = prepare(train_path=train, val_path=val, text_field="body", tokenizer=tokenizer)
        assert stream(data, data.train) == TEXT
        assert stream(data, data.val) == "\0".join(f"\u00fcber {n}" for n in range(9))


def test_a_batch_holds_a_whole_step(tmp_path: Path) -> None:
    data, _ = prepare(train_path=write(tmp_path / "a.txt"), shape={"block": 8, "batch": 3, "accumulation": 5})
    batch = next(data.train.epoch(0))
    assert batch.tokens.shape == (15, 8) and len(batch.split(5)) == 5
    again, _ = prepare(train_path=str(tmp_path / "a.txt"), shape={"block": 8, "batch": 15})
    assert next(again.train.epoch(0)).tokens.tolist() == batch.tokens.tolist(), "accumulation changes no order"


# Which provider, with which settings


def test_settings_of_data_are_handed_down_and_sections_win(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"body": line}) for line in TEXT.splitlines()))
    data, in_use = prepare(train_path=path, text_field="body", tokenizer="bpe", vocab_size=280)
    assert data.tokenizer.vocab_size == 280
    assert in_use.slots["dataset", "files"].config == {"train_path": path, "text_field": "body"}
    assert in_use.slots["tokenizer", "bpe"].config == {"vocab_size": 280, "min_frequency": 2}

    data, in_use = prepare(train_path="nowhere.txt", files={"train_path": path, "text_field": "body"},
                           tokenizer="bpe", vocab_size=280, bpe={"vocab_size": 270})  # fmt: skip
    assert data.tokenizer.vocab_size == 270
    assert in_use.slots["dataset", "files"].config["train_path"] == path
    data, _ = prepare(files={"train_path": path, "text_field": "body"})
    assert stream(data, data.train).startswith("0 bottles")


def test_a_dataset_gets_its_own_section() -> None:
    data, in_use = prepare(dataset="stdlib", stdlib={"max_bytes": 20_000})
    assert len(data.train.tokens) + len(data.val.tokens) >= 20_000
    assert in_use.slots["dataset", "stdlib"].config == {"max_bytes": 20_000, "tests": False}


def test_a_tokenizer_may_be_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt")
    CharTokenizer(TEXT).save(tmp_path / "mine.json")
    (tmp_path / "bare").write_bytes((tmp_path / "mine.json").read_bytes())
    monkeypatch.chdir(tmp_path)
    for tokenizer in ("mine.json", str(tmp_path / "mine.json"), "./bare"):
        data, in_use = prepare(train_path=path, tokenizer=tokenizer)
        assert stream(data, data.train) == TEXT[: int(len(TEXT) * 0.9)]
        assert in_use.slots["tokenizer", "file"].config == {"path": tokenizer}


def test_a_tokenizer_that_was_saved_is_loaded_by_the_provider_of_the_profile(tmp_path: Path) -> None:
    path, saved = write(tmp_path / "a.txt"), tmp_path / "saved.json"
    CharTokenizer(TEXT + "xyz\u00fc").save(saved)
    data, in_use = prepare(train_path=path, tokenizer="char", tokenizer_path=saved)
    assert data.tokenizer.vocab_size == len(set(TEXT + "xyz\u00fc"))
    assert ("tokenizer", "char") in in_use.slots
    CharTokenizer("abc").save(saved)
    with pytest.raises(DataError, match=r"a\.txt: the character") as caught:
        prepare(train_path=path, tokenizer="char", tokenizer_path=saved)
    assert caught.value.hint


def test_a_plugins_dataset_serves_as_well() -> None:
    data, in_use = prepare(with_poems(), dataset="poems", tokenizer="char")
    assert ("dataset", "poems") in in_use.slots
    assert stream(data, data.train).startswith(
        "0 bottles of beer on the wall, take one down and pass it around.\x001 b"
    )


# What is refused, and what is said


def test_no_dataset_at_all_names_both_ways() -> None:
    with pytest.raises(ConfigError, match="no text to train on") as caught:
        prepare()
    assert "data.train_path" in str(caught.value.hint) and "data.dataset" in str(caught.value.hint)
    with pytest.raises(ConfigError, match=r"'files' needs data.train_path"):
        prepare(dataset="files")


def test_nothing_stands_in_for_a_dataset_or_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ProviderNotFoundError, match="did you mean 'stdlib'"):
        prepare(dataset="stdlb")
    with pytest.raises(ProviderNotFoundError, match="dataset:wikipedia is not installed"):
        prepare(dataset="wikipedia")
    with pytest.raises(ProviderNotFoundError, match="tokenizer:words is not installed"):
        prepare(train_path=write(tmp_path / "a.txt"), tokenizer="words")
    with pytest.raises(DataError, match=r"tokenizer .*none.json cannot be read"):
        prepare(train_path=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "none.json"))


def test_a_path_that_is_not_read_is_said_aloud(tmp_path: Path) -> None:
    with pytest.warns(AptWarning, match=r"a\.txt is not read: data.dataset is 'stdlib'"):
        prepare(dataset="stdlib", stdlib={"max_bytes": 1000}, train_path=write(tmp_path / "a.txt"))


def test_a_text_too_short_for_a_block_or_a_step_is_told_in_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x" * 100)
    with pytest.raises(DataError, match=r"the training part of .*a\.txt has 90 tokens; one block .* 128 needs 129"):
        prepare(train_path=path, shape={"block": 128, "batch": 1})
    with pytest.raises(DataError, match=r"the held-out part of .*a\.txt has 10 tokens; one block .* 16 needs 17"):
        prepare(train_path=path, shape={"block": 16, "batch": 1})
    with pytest.raises(DataError, match="has 90 tokens; one step of 12 blocks of 8 needs 97") as caught:
        prepare(train_path=path, shape={"block": 8, "batch": 4, "accumulation": 3})
    assert "training.gradient_accumulation" in str(caught.value.hint)
    prepare(train_path=path, shape={"block": 8, "batch": 11})
    with pytest.raises(DataError, match=r"b\.txt has 8 tokens"):
        prepare(train_path=path, val_path=write(tmp_path / "b.txt", "x" * 8))


def test_errors_of_the_text_come_through_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^\S*a\.jsonl:1: not JSON"):
        prepare(train_path=write(tmp_path / "a.jsonl"), tokenizer="char")
    with pytest.raises(DataError, match="is empty"):
        prepare(train_path=write(tmp_path / "a.txt", ""), tokenizer="byte")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"folder.gone\.txt cannot be read"):
        prepare(train_path=str(tmp_path / "folder"))

    class Unplugged(Poems):
        def pieces(self) -> Iterator[Piece]:
            raise OSError(5, "Input/output error")

    with pytest.raises(DataError, match=r"the dataset 'poems' cannot be read: .*Input/output error"):
        prepare(with_poems(Unplugged), dataset="poems")


def test_documents_that_nothing_separates_are_said_aloud(tmp_path: Path) -> None:
    hf.Tokenizer(hf.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "t.json"))
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n' * 400)
    for _ in range(2):
        with pytest.warns(AptWarning, match=r"a\.jsonl has 400 documents, and the tokenizer no token to end one"):
            data, _ = prepare(train_path=path, tokenizer=str(tmp_path / "t.json"))
    assert len(data.train.tokens) == 360


# The cache


def test_what_was_tokenized_is_not_tokenized_again_unless_text_or_tokenizer_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[str] = []
    pieces = FilesDataset.pieces

    def counted(self: FilesDataset) -> Iterator[Piece]:
        passes.append(self.config.train_path)
        return pieces(self)

    monkeypatch.setattr(FilesDataset, "pieces", counted)
    path = write(tmp_path / "a.txt")
    first, _ = prepare(train_path=path)
    second, _ = prepare(train_path=path, val_fraction=0.2)
    assert len(passes) == 1 and first.fingerprint != second.fingerprint
    assert prepare(train_path=path)[0].fingerprint == first.fingerprint

    for saved in (tmp_path / "one.json", tmp_path / "two.json"):
        CharTokenizer(TEXT).save(saved)
        char, _ = prepare(train_path=path, tokenizer="char", tokenizer_path=saved)
    assert len(passes) == 2 and char.fingerprint != first.fingerprint
    write(tmp_path / "a.txt", TEXT.replace("beer", "milk"))
    changed, _ = prepare(train_path=path)
    assert len(passes) == 3 and changed.fingerprint != first.fingerprint
    assert "milk" in stream(changed, changed.train) and "beer" in stream(first, first.train)


def test_two_datasets_of_one_fingerprint_are_kept_apart() -> None:
    class Verses(Poems):
        def get_name(self) -> str:
            return "verses"

        def pieces(self) -> Iterator[Piece]:
            yield Piece(TEXT.upper())

    poems, _ = prepare(with_poems(), dataset="poems")
    verses, _ = prepare(with_poems(Verses), dataset="poems")
    assert stream(poems, poems.train) != stream(verses, verses.train)
    assert poems.fingerprint != verses.fingerprint


def test_the_cache_lies_where_the_profile_says(tmp_path: Path) -> None:
    prepare(train_path=write(tmp_path / "a.txt"), cache_dir=str(tmp_path / "mine"))
    assert len(list((tmp_path / "mine").rglob("*.tokens"))) == 1
    assert not (tmp_path / "cache").exists()


# Progress


def test_each_stage_tells_how_far_it_is_and_that_it_is_over(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt")
    calls: list[tuple[str, int, int | None]] = []
    prepare(train_path=path, tokenizer="char", progress=lambda *call: calls.append(call))
    assert list(dict.fromkeys(label for label, _, _ in calls)) == ["reading", "building the tokenizer", "tokenizing"]
    for stage in {label for label, _, _ in calls}:
        done = [done for label, done, _ in calls if label == stage]
        assert done == sorted(done) and done[-1] == len(TEXT)
        assert {total for label, _, total in calls if label == stage} == {len(TEXT)}


def test_progress_is_told_seldom_and_ends_even_where_the_size_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(n / 1000 for n in range(10_000))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    calls: list[tuple[str, int, int | None]] = []
    prepare(with_poems(), dataset="poems", progress=lambda *call: calls.append(call))
    told = [call for call in calls if call[0] == "tokenizing"]
    assert len(told) <= 4, "60 pieces, a millisecond each, told every 50"
    assert told[0][2] is None and told[-1][1] == told[-1][2] == len(TEXT) - 60


def test_a_plain_run_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(train_path=write(tmp_path / "a.txt"), tokenizer="bpe", vocab_size=280)
