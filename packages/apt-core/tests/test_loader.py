"""The loader: which tokens a batch holds, in which order, and that any batch can be made at any time."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.core.errors import DataError
from apt.data.loader import NO_TARGET, Batch, TokenLoader
from apt.data.token_store import Tokens

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(2, 200)).filter(lambda s: s[2] > s[0])
"""(block size, batch size, tokens), at least one block."""


def text(n: int, *starts: int, dtype: type = np.uint16) -> Tokens:
    """Tokens that are their own positions."""
    return Tokens(np.arange(n).astype(dtype), np.array([0, *starts]))


def rows(batches: list[Batch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.tokens.tolist()]


# Training


@settings(deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_an_epoch_is_blocks_that_do_not_overlap_each_with_what_follows(
    sizes: tuple[int, int, int], seed: int, epoch: int
) -> None:
    block, batch_size, n = sizes
    loader = TokenLoader(text(n), block, batch_size, seed=seed)
    batches = list(loader.epoch(epoch))
    assert len(batches) == len(loader)
    seen: set[int] = set()
    for batch in batches:
        assert batch.tokens.shape == batch.targets.shape == (batch_size, block)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert batch.document_ids is None and batch.positions is None
        assert batch.tokens.is_contiguous() and batch.targets.is_contiguous()
        assert torch.equal(batch.targets, batch.tokens + 1) and int(batch.targets.max()) < n
        assert torch.equal(batch.tokens, batch.tokens[:, :1] + torch.arange(block)), "consecutive tokens"
        found = set(batch.tokens.flatten().tolist())
        assert len(found) == batch.tokens.numel() and not found & seen
        seen |= found
    # Nothing worth a batch is left out: less than a batch, and less than two blocks at the ends.
    assert n - len(seen) < (batch_size + 2) * block
    if n > block * batch_size:
        assert len(loader) >= 1, "whatever suffices for one step makes one"


def test_nanogpts_split_of_tiny_shakespeare_makes_1307_steps() -> None:
    loader = TokenLoader(Tokens(np.zeros(1_003_854, np.uint8), np.array([0])), 64, 12)
    assert (len(loader), loader.tokens_per_batch) == (1307, 768)


def test_order_and_offset_change_with_epoch_and_seed_and_with_nothing_else() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return rows(list(TokenLoader(text(1000), 8, 4, seed=seed).epoch(epoch)))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = order(0, 0)
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert order(0, 0) == first
    others = [order(0, 1), order(1, 0), order(1, 1)]
    assert all(other != first for other in others) and others[0] != others[1]
    offsets = {order(0, epoch)[0][0] % 8 for epoch in range(64)}
    assert offsets == set(range(8)), "every offset has its turn"
    assert sorted(first) != first


def test_the_global_generators_are_not_touched() -> None:
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    list(TokenLoader(text(1000), 8, 4).epoch(3))
    assert random.getstate() == before[0]
    assert str(np.random.get_state()) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_the_order_is_written_in_stone() -> None:
    """A run that resumes under another version of numpy or of this library goes on with the same batches."""
    found = [row[0] for row in rows(list(TokenLoader(text(100), 8, 2, seed=5).epoch(7)))]
    assert found == STONE


STONE = [42, 66, 26, 74, 2, 82, 34, 58, 18, 50]


@settings(deadline=None)
@given(sizes=SIZES, start=st.integers(0, 60))
def test_any_batch_of_an_epoch_can_be_the_first(sizes: tuple[int, int, int], start: int) -> None:
    block, batch_size, n = sizes
    loader = TokenLoader(text(n), block, batch_size, seed=3)
    whole = rows(list(loader.epoch(2)))
    assert rows(list(loader.epoch(2, start=start))) == whole[start * batch_size :]


def test_training_can_reach_every_token() -> None:
    loader = TokenLoader(text(50), 8, 2)
    seen = {token for epoch in range(100) for row in rows(list(loader.epoch(epoch))) for token in row}
    assert seen == set(range(49)), "all but the last, which has nothing after it"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_every_width_of_tokens_is_read(dtype: type) -> None:
    loader = TokenLoader(text(100, dtype=dtype), 8, 4)
    assert rows(list(loader.epoch(0))) == rows(list(TokenLoader(text(100), 8, 4).epoch(0)))


def test_a_text_shorter_than_a_block_is_refused_in_numbers() -> None:
    assert len(TokenLoader(text(9), 8, 1)) == 1
    with pytest.raises(DataError, match=r"a\.txt has 8 tokens; one block of model.max_seq_len 8 needs 9") as caught:
        TokenLoader(text(8), 8, 1, name="a.txt")
    assert caught.value.hint


# Evaluation


@settings(deadline=None)
@given(sizes=SIZES, eval_size=st.integers(1, 7), masked=st.booleans())
def test_evaluation_predicts_every_token_but_the_first_exactly_once_in_order(
    sizes: tuple[int, int, int], eval_size: int, masked: bool
) -> None:
    block, batch_size, n = sizes
    loader = TokenLoader(text(n, *range(5, n, 5)), block, batch_size, document_mask=masked)
    batches = list(loader.eval_batches(eval_size))
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    inputs = torch.cat([batch.tokens.flatten() for batch in batches])
    predicted = targets != NO_TARGET
    assert targets[predicted].tolist() == list(range(1, n))
    assert torch.equal(inputs[predicted], targets[predicted] - 1)
    assert int((~predicted).sum()) < block, "only the last row is padded"
    assert bool(predicted[: n - 1].all()), "and only at its end"
    assert inputs.max() < n, "padding is a token that there is"
    assert all(len(batch.tokens) == eval_size for batch in batches[:-1])
    if masked:
        for batch in batches:
            assert batch.document_ids is not None and batch.positions is not None
            assert batch.document_ids.shape == batch.positions.shape == batch.tokens.shape


def test_evaluation_can_stop_early() -> None:
    loader = TokenLoader(text(100), 8, 4)
    whole = rows(list(loader.eval_batches(3)))
    assert rows(list(loader.eval_batches(3, limit=2))) == whole[:6]
    assert rows(list(loader.eval_batches(3, limit=99))) == whole


# Documents


@settings(deadline=None)
@given(starts=st.sets(st.integers(1, 199), max_size=20), seed=st.integers(0, 99))
def test_documents_are_numbered_and_positions_start_anew(starts: set[int], seed: int) -> None:
    loader = TokenLoader(text(200, *sorted(starts)), 8, 3, seed=seed, document_mask=True)
    batches = [*loader.epoch(0), *list(loader.eval_batches(3))[:-1]]
    for batch in batches:
        assert batch.document_ids is not None and batch.positions is not None
        assert batch.document_ids.dtype == batch.positions.dtype == torch.int64
        assert torch.equal(batch.targets, batch.tokens + 1), "the first token of a document is a target too"
        for tokens, ids, positions in zip(batch.tokens, batch.document_ids, batch.positions, strict=True):
            position = -1
            for i, token in enumerate(tokens.tolist()):
                position = 0 if i == 0 or token in starts else position + 1
                assert positions[i] == position
                if i:
                    assert (ids[i] != ids[i - 1]) == (token in starts)


# Batches


def test_split_gives_views_in_order() -> None:
    batch = next(TokenLoader(text(200, 50, 120), 8, 6, document_mask=True).epoch(0))
    parts = batch.split(3)
    for name in ("tokens", "targets", "document_ids", "positions"):
        whole = getattr(batch, name)
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), whole)
        assert getattr(parts[0], name).data_ptr() == whole.data_ptr()
    assert batch.split(1) == [batch]
    assert next(TokenLoader(text(200), 8, 6).epoch(0)).split(2)[1].positions is None
    with pytest.raises(AssertionError, match="6 rows do not make 4"):
        batch.split(4)


def test_to_moves_what_there_is() -> None:
    batch = next(TokenLoader(text(200), 8, 6).epoch(0))
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    assert moved.tokens.is_meta and moved.targets.is_meta and moved.document_ids is None
