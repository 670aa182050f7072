"""Pairs: how they are read, split and dealt out, and what is said of those that cannot be used."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.core.config import RunConfig
from apt.core.errors import AptWarning, ConfigError, DataError, ProviderError
from apt.core.in_use import ProvidersInUse
from apt.core.providers.dataset import DatasetProvider, Piece
from apt.core.registry import registry as installed
from apt.data.loader import NO_TARGET, Batch
from apt.data.pairs import PairLoader, PairsDataset, split_pairs
from apt.data.prepare import Data, prepare_data
from apt.data.token_store import Tokens

EOS = 0
Pair = tuple[list[int], list[int]]
TEXTS = st.lists(st.integers(1, 9), max_size=7)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=40)


def stored(pairs: list[Pair]) -> Tokens:
    """The pairs as the token store keeps them: each document behind the token that ends the one before it."""
    ids: list[int] = []
    starts = []
    for document in [document for pair in pairs for document in pair]:
        ids += [EOS] if starts else []
        starts.append(len(ids))
        ids += document
    return Tokens(np.array(ids or [EOS], np.uint8)[: len(ids) or None], np.array(starts))


def taken(batches: list[Batch]) -> list[Pair]:
    """The pairs that batches hold, told from their masks."""
    found = []
    for batch in batches:
        assert batch.source is not None
        blocked = batch.source_padding
        blocked = torch.zeros_like(batch.source, dtype=torch.bool) if blocked is None else blocked
        assert batch.tokens.dtype == batch.targets.dtype == batch.source.dtype == torch.int64
        for tokens, targets, source, padding in zip(batch.tokens, batch.targets, batch.source, blocked, strict=True):
            assert padding.tolist() == sorted(padding.tolist()), "padded on the right"
            target = targets[targets != NO_TARGET].tolist()
            assert targets.tolist() == target + [NO_TARGET] * (len(targets) - len(target))
            assert target[-1] == EOS and tokens.tolist()[: len(target)] == [EOS, *target[:-1]]
            assert set(tokens.tolist()[len(target) :]) <= {EOS} and set(source[padding].tolist()) <= {EOS}
            found.append((source[~padding].tolist(), target[:-1]))
    return found


@settings(deadline=None)
@given(pairs=PAIRS, batch_size=st.integers(1, 5), seed=st.integers(0, 2**63), epoch=st.integers(0, 99))
def test_an_epoch_deals_out_each_pair_once(pairs: list[Pair], batch_size: int, seed: int, epoch: int) -> None:
    loader = PairLoader(stored(pairs), 9, batch_size, eos_id=EOS, seed=seed)
    batches = list(loader.epoch(epoch))
    assert len(batches) == len(loader) == len(pairs) // batch_size
    assert all(len(batch.tokens) == batch_size for batch in batches)
    left = list(pairs)
    for pair in taken(batches):
        left.remove(pair)
    assert len(left) == len(pairs) % batch_size


@settings(deadline=None)
@given(pairs=PAIRS, batch_size=st.integers(1, 5))
def test_evaluation_goes_through_all_pairs_in_order(pairs: list[Pair], batch_size: int) -> None:
    loader = PairLoader(stored(pairs), 9, 2, eos_id=EOS)
    assert taken(list(loader.eval_batches(batch_size))) == pairs
    assert taken(list(loader.eval_batches(batch_size, limit=2))) == pairs[: 2 * batch_size]


@settings(deadline=None)
@given(pairs=PAIRS.filter(lambda pairs: len(pairs) > 1), fraction=st.floats(0.01, 0.99))
def test_a_split_keeps_pairs_whole(pairs: list[Pair], fraction: float) -> None:
    split = split_pairs(stored(pairs), fraction)
    parts = [taken(list(PairLoader(part, 9, 1, eos_id=EOS).eval_batches(3))) for part in split]
    assert parts[0] + parts[1] == pairs
    assert parts[0] and parts[1]
    assert abs(len(parts[1]) - fraction * len(pairs)) <= 1 or 1 in map(len, parts)


def test_any_batch_can_be_made_at_any_time() -> None:
    pairs = [([1] * (n % 7), [2] * (n % 5)) for n in range(100)]
    loader = PairLoader(stored(pairs), 9, 3, eos_id=EOS, seed=4)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    whole = list(loader.epoch(2))
    for start in (1, 17, len(loader)):
        for batch, wanted in zip(loader.epoch(2, start=start), whole[start:], strict=True):
            assert torch.equal(batch.tokens, wanted.tokens) and torch.equal(batch.source, wanted.source)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    assert taken(list(loader.epoch(3))) != taken(whole), "another epoch, another order"


def test_pairs_alike_in_length_share_a_batch() -> None:
    generator = np.random.default_rng(0)
    pairs = [([1] * int(n), [2] * int(n)) for n in generator.integers(1, 60, 2000)]
    loader = PairLoader(stored(pairs), 64, 16, eos_id=EOS)
    padded = sum(int(batch.source_padding.sum()) for batch in loader.epoch(0) if batch.source_padding is not None)
    real = sum(len(source) for source, _ in pairs)
    assert padded < 0.08 * real, "at random it would be 0.9 of it"
    assert loader.tokens_per_batch == round(16 * (real / 2000 + 1))
    lengths = [batch.tokens.shape[1] for batch in loader.epoch(0)]
    assert lengths != sorted(lengths)


def test_pairs_that_are_too_long_are_left_out_aloud() -> None:
    pairs = [([1] * 4, [2]), ([1] * 5, [2]), ([1], [2] * 3), ([1], [2] * 4)]
    with pytest.warns(AptWarning, match="two: 2 of 4 pairs are left out: they are longer than model.max_seq_len 4"):
        loader = PairLoader(stored(pairs), 4, 1, eos_id=EOS, name="two")
    assert taken(list(loader.eval_batches(9))) == [pairs[0], pairs[2]]
    assert loader.size == "2 pairs"
    with pytest.raises(DataError, match=r"all 4 pairs are longer than model.max_seq_len 1; .*to 5 for all"):
        PairLoader(stored(pairs), 1, 1, eos_id=EOS)


def test_a_batch_splits_and_says_what_the_model_is_given() -> None:
    pairs = [([1, 2], [3]), ([4], [5, 6])]
    (batch,) = PairLoader(stored(pairs), 9, 2, eos_id=EOS).epoch(0)
    assert batch.context.keys() == {"source", "source_padding"}
    assert taken(batch.split(2)) == taken([batch])
    (even,) = PairLoader(stored([([1], [2])]), 9, 1, eos_id=EOS).epoch(0)
    assert even.context.keys() == {"source"}, "without padding there is no mask, and attention runs without one"


# Reading


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def pieces(path: str, **config: Any) -> list[str]:
    return [piece.text for piece in PairsDataset({"train_path": path, **config}).pieces()]


def test_both_ways_to_write_pairs_say_the_same(tmp_path: Path) -> None:
    wanted = ["eins", "one", "zwei ", " two"]
    table = write(tmp_path / "a.txt", "eins\tone", "", "zwei \t two")
    records = write(
        tmp_path / "b.jsonl", *(json.dumps({"source": s, "target": t, "id": 1}) for s, t in (wanted[:2], wanted[2:]))
    )
    assert pieces(table) == pieces(records) == wanted
    (tmp_path / "c.tsv").write_bytes(b"\xef\xbb\xbfeins\tone\r\nzwei \t two")
    assert pieces(str(tmp_path / "c.tsv")) == wanted
    assert pieces(str(tmp_path)) == wanted * 3
    others = write(tmp_path / "d.jsonl", '{"de": "eins", "en": "one"}')
    assert pieces(others, source_field="de", target_field="en") == ["eins", "one"]
    fields = {"source_field": "de", "target_field": "en"}, {"source_field": "en", "target_field": "de"}
    here, there = (PairsDataset({"train_path": others, **named}).fingerprint() for named in fields)
    assert here != there


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("a.txt", "no tab", r"a.txt:2: no tab in the line, .*; write source<TAB>target in each line"),
        ("a.txt", "a\tb\tc", "a.txt:2: 2 tabs in the line, and one stands between source and target"),
        ("a.txt", "a\t", "a.txt:2: the target is empty; leave such pairs out"),
        ("a.txt", "\tb", "a.txt:2: the source is empty"),
        ("a.txt", "a\0\tb", "a.txt:2: the text has a NUL character"),
        ("a.jsonl", '{"source": "a"}', "a.jsonl:2: no field 'target'; set data.pairs.target_field to one of: source"),
        ("a.jsonl", '{"source": 1, "target": "b"}', "'source' holds a number, not text; set data.pairs.source"),
        ("a.jsonl", "[1]", r'not an object; .* such as {"source": "...", "target": "..."}'),
        ("a.jsonl", '{"source": "a", "target": ""}', "a.jsonl:2: the target is empty"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_pair_is_told_with_its_number(tmp_path: Path, name: str, line: str, said: str) -> None:
    good = "x\ty" if name == "a.txt" else '{"source": "x", "target": "y"}'
    with pytest.raises(DataError, match=said):
        pieces(write(tmp_path / name, good, line))


def test_a_file_of_another_kind_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a file of an unknown kind; known are .jsonl, .txt, .tsv"):
        pieces(write(tmp_path / "a.parquet", "x"))


# From a profile


def prepare(tmp_path: Path, provider: Any = None, model: Any = None, **data: Any) -> Data:
    shape = {"backbone": "encdec", "max_seq_len": 12, **(model or {})}
    given = {"cache_dir": str(tmp_path / "cache"), "tokenizer": "char", **data}
    config = RunConfig.model_validate({"model": shape, "data": given, "training": {"batch_size": 2}})
    view = installed.view()
    if provider is not None:
        view.register("dataset", "mine", provider)
    return prepare_data(config, ProvidersInUse(view, config.sections))


def test_a_profile_with_an_encoder_reads_pairs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", *(f"{n:03}\t{'xyz'[: 1 + n % 3]}" for n in range(20)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = prepare(tmp_path, train_path=path, val_fraction=0.25)
    assert (data.train.size, data.val.size, len(data.train)) == ("15 pairs", "5 pairs", 7)
    decode, found = data.tokenizer.decode, []
    for batch in data.val.eval_batches(2):
        assert batch.source is not None
        blocked = torch.zeros_like(batch.source) if batch.source_padding is None else batch.source_padding
        found += [decode(row[~mask.bool()].tolist()) for row, mask in zip(batch.source, blocked, strict=True)]
    assert found == [f"{n:03}" for n in range(15, 20)]
    apart = prepare(tmp_path, train_path=path, val_path=write(tmp_path / "v.jsonl", '{"source": "0", "target": "1"}'))
    assert (apart.train.size, apart.val.size) == ("20 pairs", "1 pairs")
    assert apart.fingerprint != data.fingerprint


class Mine(DatasetProvider):
    """Pairs by a third party."""

    pairs = True
    texts: tuple[str, ...] = ("a", "b", "c", "d", "e", "f")

    def get_name(self) -> str:
        return "mine"

    def get_version(self) -> str:
        return "1.0"

    def pieces(self) -> Any:
        return map(Piece, self.texts)

    def fingerprint(self) -> str:
        return " ".join(self.texts)


class Odd(Mine):
    texts = ("a", "b", "c")


class Texts(Mine):
    pairs = False


def test_pairs_of_a_third_party(tmp_path: Path) -> None:
    data = prepare(tmp_path, Mine, dataset="mine")
    assert (data.train.size, data.val.size) == ("2 pairs", "1 pairs")
    with pytest.raises(ProviderError, match="the dataset 'mine' has a source without a target"):
        prepare(tmp_path, Odd, dataset="mine")
    with pytest.raises(ConfigError, match=r"'mine' yields texts, and model\.backbone encdec learns pairs"):
        prepare(tmp_path, Texts, dataset="mine")
    with pytest.raises(ConfigError, match=r"'mine' yields pairs, and model\.backbone gpt learns texts"):
        prepare(tmp_path, Mine, {"backbone": "gpt"}, dataset="mine")


def test_what_a_profile_lacks_for_pairs_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a\tb", "c\td")
    with pytest.raises(ConfigError, match="the profile names no text to train on"):
        prepare(tmp_path)
    with pytest.raises(ConfigError, match=r"the dataset 'pairs' needs data\.train_path"):
        prepare(tmp_path, dataset="pairs")
    with pytest.warns(AptWarning, match="data.document_mask says nothing here"), pytest.raises(DataError):
        prepare(tmp_path, train_path=path, document_mask=True)
    with pytest.raises(DataError, match="has 1 pairs; one step takes 2"):
        prepare(tmp_path, train_path=path)
    with pytest.raises(DataError, match=r"one pair alone: none can be held out; .* or set data\.val_path"):
        prepare(tmp_path, train_path=write(tmp_path / "b.txt", "a\tb"))
