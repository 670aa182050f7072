"""Attention: documents kept apart, attention to another sequence, and weights, where a layer claims them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from apt.core.providers.attention import AttentionContext
from apt.testing.check import check
from apt.testing.compare import require, require_change, require_equal
from apt.testing.subjects import AttentionSubject, B, T

S = 5
"""Positions of the other sequence."""


@check("attention", needs="documents")
def documents_are_apart(subject: AttentionSubject) -> None:
    """Documents packed into one row, each with positions from 0, give what each gives alone: packing must not let one
    text read another."""
    layer, x_BTD = subject.layer(), subject.x()
    borders = ((0, 3, 7), (0, 1, 5, 7))
    documents, positions = torch.zeros(B, T, dtype=torch.int64), torch.zeros(B, T, dtype=torch.int64)
    for row, stops in enumerate(borders):
        for number, (start, stop) in enumerate(pairwise(stops)):
            documents[row, start:stop] = number
            positions[row, start:stop] = torch.arange(stop - start)
    context = AttentionContext(positions=positions.to(subject.device), document_ids=documents.to(subject.device))
    packed = subject.attend(layer, x_BTD, context=context)[0]
    for row, stops in enumerate(borders):
        for start, stop in pairwise(stops):
            require_equal(
                packed[row : row + 1, start:stop],
                subject.forward(layer, x_BTD[row : row + 1, start:stop]),
                f"the document at positions {start} to {stop - 1} of row {row}, packed beside alone",
                "a position sees only keys with its own document id",
            )


@check("attention", needs="cross_attention")
def cross_attention_reads_the_memory(subject: AttentionSubject) -> None:
    """With `causal=False`, key and value may be another, shorter or longer, sequence: the output has the query's shape
    and depends on the memory from end to end."""
    layer, x_BTD = subject.layer(causal=False), subject.x()
    for length in (1, S, 11):
        memory = subject.x(seed=3, length=length)
        before = subject.attend(layer, x_BTD, memory)[0]
        require(
            before.shape == x_BTD.shape,
            f"{T} queries on {length} keys give {list(before.shape)}, not {list(x_BTD.shape)}",
        )
        if length > 1:
            for position in (0, length - 1):
                after = subject.attend(layer, x_BTD, subject.perturbed(memory, slice(None), position))[0]
                require_change(
                    after[:, 0],
                    before[:, 0],
                    f"with another memory at position {position} of {length}, the first output",
                    "keys and values come from `key` and `value`, not from `query`, and no causal mask hides them",
                )


@check("attention", needs="cross_attention")
def cross_attention_depends_on_the_query(subject: AttentionSubject) -> None:
    """In cross-attention an output depends on its own query and on no other one: a decoder's queries must not read each
    other past its causal self-attention."""
    layer, x_BTD, memory = subject.layer(causal=False), subject.x(), subject.x(seed=3, length=S)
    before = subject.attend(layer, x_BTD, memory)[0]
    after = subject.attend(layer, subject.perturbed(x_BTD, slice(None), 2), memory)[0]
    require_change(after[:, 2], before[:, 2], "with another query at position 2, its output", "use the query")
    others = [t for t in range(T) if t != 2]
    require_equal(
        after[:, others],
        before[:, others],
        "with another query at position 2, the outputs of the others",
        "queries see the memory alone: look for keys that are made from the query",
    )


@check("attention", needs="cross_attention")
def cross_attention_padding(subject: AttentionSubject) -> None:
    """In cross-attention `key_padding_mask` [B, S] is about the memory: what is padded there has no influence."""
    layer, x_BTD, memory = subject.layer(causal=False), subject.x(), subject.x(seed=3, length=S)
    padding = torch.zeros(B, S, dtype=torch.bool, device=subject.device)
    padding[0, 3:] = True
    before = subject.attend(layer, x_BTD, memory, key_padding_mask=padding)[0]
    other = torch.where(padding[..., None], memory * -3, memory)
    after = subject.attend(layer, x_BTD, other, key_padding_mask=padding)[0]
    require_equal(after, before, "with other content in the memory's padding, the output", "mask keys, not queries")


@check("attention", needs="cross_cache")
def cross_cache_holds_the_memory(subject: AttentionSubject) -> None:
    """In cross-attention with a cache, the first step fills it from the memory and every later one reads it, and each
    gives what a full pass gives: a decoder computes keys and values of what it looks at once, and not at each token."""
    layer, x_BTD, memory = subject.layer(causal=False), subject.x(), subject.x(seed=3, length=S)
    padding = torch.zeros(B, S, dtype=torch.bool, device=subject.device)
    padding[0, 3:] = True
    expected = subject.attend(layer, x_BTD, memory, key_padding_mask=padding)[0]
    nothing = torch.full_like(memory, torch.nan)
    for lengths in ([1] * T, [3, 1, 3]):
        cache, start = subject.make_cache(layer, S), 0
        for length in lengths:
            stop = start + length
            context = AttentionContext(torch.arange(start, stop, device=subject.device), cache=cache)
            with torch.no_grad():
                out = subject.attend(
                    layer, x_BTD[:, start:stop], nothing if start else memory, key_padding_mask=padding, context=context
                )[0]
            require(cache.length == S, f"with a memory of {S} positions the cache has the length {cache.length}")
            require_equal(
                out,
                expected[:, start:stop],
                f"queries {start} to {stop - 1} in steps of {lengths}, beside the full pass",
                "an empty cache is filled from key and value, and one that holds them is read in their place; queries "
                "are placed by context.positions, not behind what the cache holds",
            )
            start = stop


@check("attention", needs="cross_cache")
def cross_cache_rows_can_be_selected(subject: AttentionSubject) -> None:
    """After `select_rows` the memory's cache holds those rows in that order, repeated ones too: several answers to one
    question share what was read of it."""
    layer, x_BTD, memory = subject.layer(causal=False), subject.x(), subject.x(seed=3, length=S)
    cache, rows = subject.make_cache(layer, S), torch.tensor([1, 0, 1], device=subject.device)
    with torch.no_grad():
        for start in (0, 1):
            places = torch.arange(start, start + 1, device=subject.device)
            chosen = rows if start else torch.arange(B, device=subject.device)
            out = subject.attend(
                layer, x_BTD[chosen, start : start + 1], memory[chosen], context=AttentionContext(places, cache=cache)
            )[0]
            cache.select_rows(rows)
    expected = subject.attend(layer, x_BTD[rows], memory[rows])[0][:, 1:2]
    require_equal(
        out,
        expected,
        "after select_rows([1, 0, 1]), beside the full pass over these rows",
        "select_rows must reorder every tensor that the cache holds",
    )


@check("attention", needs="weights")
def weights_are_a_distribution(subject: AttentionSubject) -> None:
    """The weights are [B, H, T, S], not negative, add up to one, and are zero where a key is not seen: they are what a
    user looks at to understand a model."""
    layer, x_BTD = subject.layer(), subject.x()
    padding = torch.zeros(B, T, dtype=torch.bool, device=subject.device)
    padding[1, 5:] = True
    cases: tuple[tuple[str, dict[str, Any]], ...] = (("no mask", {}), ("padding", {"key_padding_mask": padding}))
    for what, masks in cases:
        weights = subject.attend(layer, x_BTD, context=AttentionContext(need_weights=True), **masks)[1]
        require(weights is not None, "weights are asked for and None comes back")
        assert weights is not None
        wanted = (B, subject.num_heads, T, T)
        require(tuple(weights.shape) == wanted, f"the weights are {list(weights.shape)}, not {list(wanted)}")
        weights = weights.detach()
        require(bool((weights >= 0).all()), f"the smallest weight is {float(weights.min()):.3g}: return the softmax")
        require_equal(
            weights.sum(-1),
            torch.ones_like(weights[..., 0]),
            f"with {what}, the sums of the weights over the keys",
            "return the weights after the softmax and before dropout",
        )
        unseen = torch.ones(T, T, dtype=torch.bool, device=subject.device).triu(1).expand(B, 1, T, T)
        if masks:
            unseen = unseen | padding[:, None, None, :]
        largest = float(weights.masked_select(unseen).max())
        require(largest == 0, f"with {what}, a key that is not seen has the weight {largest:.3g}: mask before softmax")


@check("attention", needs="weights")
def weights_change_no_output(subject: AttentionSubject) -> None:
    """Asking for weights gives the same output as not asking: the two often run through different code."""
    layer, x_BTD = subject.layer(), subject.x()
    blocked = torch.zeros(T, T, dtype=torch.bool, device=subject.device)
    blocked[4, 0] = blocked[3] = True
    cases: tuple[tuple[str, dict[str, Any]], ...] = (("no mask", {}), ("an attn_mask", {"attn_mask": blocked}))
    for what, masks in cases:
        require_equal(
            subject.attend(layer, x_BTD, context=AttentionContext(need_weights=True), **masks)[0],
            subject.attend(layer, x_BTD, **masks)[0],
            f"with {what}, the output where weights are asked for, beside where not",
            "one of the two ways of computing differs: scale, mask, or order of heads",
        )


@check("attention", needs=("weights", "cache"))
def weights_count_cached_keys(subject: AttentionSubject) -> None:
    """With a cache the weights are over all keys, the cached ones first, as in the full pass: what a generated token
    looked at lies mostly behind it."""
    layer, x_BTD = subject.layer(), subject.x()
    with torch.no_grad():
        expected = subject.attend(layer, x_BTD, context=AttentionContext(need_weights=True))[1]
        cache = subject.make_cache(layer)
        for start, stop in ((0, 4), (4, 5), (5, T)):
            context = AttentionContext(cache=cache, need_weights=True)
            weights = subject.attend(layer, x_BTD[:, start:stop], context=context)[1]
            require(weights is not None, "weights are asked for and None comes back")
            assert weights is not None
            assert expected is not None
            require_equal(
                weights,
                expected[:, :, start:stop, :stop],
                f"the weights of positions {start} to {stop - 1} behind {start} cached ones, beside the full pass",
                "weights are [B, H, T, S] with S = cache.length + T",
            )
