"""Attention: decoding with a cache gives what a full pass gives, however the positions are dealt out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apt.core.providers.attention import AttentionContext
from apt.testing.check import CheckFailure, check
from apt.testing.compare import require, require_equal
from apt.testing.subjects import AttentionSubject, B, T

ADVICE = (
    "the new queries are the last T of the cache.length + T positions: their rotation starts at cache.length, and row "
    "t of the causal mask shows keys 0 to cache.length + t"
)


def in_steps(
    subject: AttentionSubject, layer: Any, x_BTD: Tensor, lengths: Sequence[int], cache: Any = None, **given: Tensor
) -> Tensor:
    """The outputs of all positions, fed so many at a time. `given` are tensors over all positions, [B, T, ...]."""
    cache = subject.make_cache(layer, batch=x_BTD.shape[0]) if cache is None else cache
    outputs, start = [], 0
    for length in lengths:
        stop = start + length
        now = {name: t[:, :stop] if name == "key_padding_mask" else t[:, start:stop] for name, t in given.items()}
        outputs.append(subject.step(layer, cache, x_BTD[:, start:stop], **now))
        start = stop
    require(start == x_BTD.shape[1], f"{lengths} does not add up to {x_BTD.shape[1]}")
    return torch.cat(outputs, 1)


def full_pass(subject: AttentionSubject, layer: Any, x_BTD: Tensor, **given: Tensor) -> Tensor:
    """The outputs of all positions at once, without a cache."""
    padding = given.pop("key_padding_mask", None)
    context = (
        AttentionContext(positions=given.get("positions"), document_ids=given.get("document_ids")) if given else None
    )
    with torch.no_grad():
        return subject.attend(layer, x_BTD, key_padding_mask=padding, context=context)[0]


@check("attention", needs="cache")
def cache_one_by_one(subject: AttentionSubject) -> None:
    """One position at a time through the cache gives what the full pass gives: that is how text is generated, and
    a rotation that starts over at each step spoils it without an error."""
    layer, x_BTD = subject.layer(), subject.x()
    out = in_steps(subject, layer, x_BTD, [1] * T)
    require_equal(out, full_pass(subject, layer, x_BTD), "one position at a time, beside the full pass", ADVICE)


@check("attention", needs="cache")
def cache_in_chunks(subject: AttentionSubject) -> None:
    """Several positions at a time through the cache give what the full pass gives: T queries meet S > T keys, where a
    causal mask anchored at the upper left corner hides the wrong ones."""
    layer, x_BTD = subject.layer(), subject.x()
    expected = full_pass(subject, layer, x_BTD)
    for lengths in ([3, 4], [2, 2, 3]):
        out = in_steps(subject, layer, x_BTD, lengths)
        require_equal(out, expected, f"in chunks of {lengths}, beside the full pass", ADVICE)


@check("attention", needs="cache")
def cache_in_mixed_steps(subject: AttentionSubject) -> None:
    """A prompt, single steps, and a chunk between them give what the full pass gives, over more positions than a first
    guess at a table's size: so chat goes, turn by turn."""
    layer, x_BTD = subject.layer(), subject.x(length=21)
    out = in_steps(subject, layer, x_BTD, [4, 1, 1, 5, 1, 3, 1, 4, 1])
    require_equal(out, full_pass(subject, layer, x_BTD), "in steps of 4, 1, 1, 5, ..., beside the full pass", ADVICE)


@check("attention", needs="cache")
def cache_counts_its_positions(subject: AttentionSubject) -> None:
    """`cache.length` is the number of positions fed so far: the model places the next ones by it."""
    layer, x_BTD = subject.layer(), subject.x()
    cache = subject.make_cache(layer)
    require(cache.length == 0, f"a new cache has the length {cache.length}, not 0")
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        subject.step(layer, cache, x_BTD[:, start:stop])
        require(cache.length == stop, f"after {stop} positions the cache has the length {cache.length}")


@check("attention", needs="cache")
def cache_can_be_truncated(subject: AttentionSubject) -> None:
    """After `truncate` the positions that were dropped are gone: what follows is as if they had never been. Drafts that
    are rejected and answers that are sampled again rely on it."""
    layer, x_BTD, other = subject.layer(), subject.x(), subject.x(seed=5)
    for kept in (3, 0):
        cache = subject.make_cache(layer)
        subject.step(layer, cache, x_BTD[:, :5])
        cache.truncate(kept)
        require(cache.length == kept, f"truncate({kept}) leaves the length {cache.length}")
        row = torch.cat((x_BTD[:, :kept], other[:, kept:]), 1)
        out = [subject.step(layer, cache, row[:, kept : kept + 1]), subject.step(layer, cache, row[:, kept + 1 :])]
        require_equal(
            torch.cat(out, 1),
            full_pass(subject, layer, row)[:, kept:],
            f"other content after truncate({kept}), beside the full pass over it",
            "truncate must drop whatever belongs to the later positions, statistics and partial sums too",
        )


@check("attention", needs="cache")
def cache_rows_can_be_selected(subject: AttentionSubject) -> None:
    """After `select_rows` the cache holds those rows in that order, repeated ones too: sampling several answers to one
    prompt, and beam search, are built on it."""
    layer, x_BTD = subject.layer(), subject.x()
    cache = subject.make_cache(layer)
    subject.step(layer, cache, x_BTD[:, :4])
    rows = torch.tensor([1, 0, 1], device=subject.device)
    cache.select_rows(rows)
    row = torch.cat((x_BTD[rows, :4], subject.x(seed=5, batch=3, length=3)), 1)
    out = torch.cat([subject.step(layer, cache, row[:, 4:5]), subject.step(layer, cache, row[:, 5:])], 1)
    require_equal(
        out,
        full_pass(subject, layer, row)[:, 4:],
        "after select_rows([1, 0, 1]), beside the full pass over these rows",
        "select_rows must reorder every tensor that the cache holds",
    )


@check("attention", needs="cache")
def caches_are_apart(subject: AttentionSubject) -> None:
    """Two caches of one layer, filled in turns, do not touch, and passes without a cache between them neither: two
    texts are generated by one model at the same time."""
    layer, texts = subject.layer(), [subject.x(seed=1), subject.x(seed=2)]
    caches = [subject.make_cache(layer) for _ in texts]
    outputs: list[list[Tensor]] = [[], []]
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        for index, x_BTD in enumerate(texts):
            outputs[index].append(subject.step(layer, caches[index], x_BTD[:, start:stop]))
            full_pass(subject, layer, x_BTD)
    for index, x_BTD in enumerate(texts):
        require_equal(
            torch.cat(outputs[index], 1),
            full_pass(subject, layer, x_BTD),
            f"text {index} of two that were fed in turns, beside its full pass",
            "what is remembered belongs into the cache, nothing of it onto the layer or a class",
        )


@check("attention", needs="cache")
def cache_that_is_full_says_so(subject: AttentionSubject) -> None:
    """A position for which there is no room raises an error, or is kept all the same: one that is dropped or written
    over silently changes every text longer than the cache."""
    layer, x_BTD = subject.layer(), subject.x()
    cache = subject.make_cache(layer, length=5)
    subject.step(layer, cache, x_BTD[:, :5])
    try:
        out = subject.step(layer, cache, x_BTD[:, 5:])
    except Exception:
        return
    expected = full_pass(subject, layer, x_BTD)[:, 5:]
    try:
        require_equal(out, expected, "positions 5 and 6 in a cache of 5", "")
    except CheckFailure as failure:
        raise CheckFailure(
            "two positions more than the cache has room for are accepted and give a wrong output: raise a "
            "ProviderError that says how many there is room for"
        ) from failure


@check("attention", needs="cache")
def cache_with_padding(subject: AttentionSubject) -> None:
    """A prompt padded on the left and continued through the cache gives what the full pass gives under the same
    `key_padding_mask`, which counts cached positions too: so prompts of different lengths share a batch."""
    layer, x_BTD = subject.layer(), subject.x()
    padding = torch.zeros(B, T, dtype=torch.bool, device=subject.device)
    padding[0, :2] = True
    expected = full_pass(subject, layer, x_BTD, key_padding_mask=padding)
    for lengths in ([4, 1, 1, 1], [4, 3]):
        out = in_steps(subject, layer, x_BTD, lengths, key_padding_mask=padding)
        require_equal(
            out[~padding],
            expected[~padding],
            f"a prompt padded on the left, in steps of {lengths}, beside the full pass",
            "key_padding_mask is [B, S] with S = cache.length + T: apply it to all keys, cached ones included",
        )


@check("attention", needs="cache")
def cache_with_positions(subject: AttentionSubject) -> None:
    """Positions of each row given with every step give what the full pass gives with them: what was cached keeps the
    positions that it came with."""
    layer, x_BTD = subject.layer(), subject.x()
    positions = torch.stack((torch.arange(T), torch.arange(T).sub(2).clamp(min=0))).to(subject.device)
    expected = full_pass(subject, layer, x_BTD, positions=positions)
    for lengths in ([1] * T, [3, 1, 3]):
        out = in_steps(subject, layer, x_BTD, lengths, positions=positions)
        require_equal(
            out,
            expected,
            f"with positions {positions[1].tolist()} in row 1, in steps of {lengths}, beside the full pass",
            "keys are rotated by context.positions where they are given, and by their place in the cache where not",
        )


@check("attention", needs=("cache", "documents"))
def cache_with_documents(subject: AttentionSubject) -> None:
    """Documents stay apart through the cache: what was cached keeps the document that it came with."""
    layer, x_BTD = subject.layer(), subject.x()
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 2, 2]], device=subject.device)
    expected = full_pass(subject, layer, x_BTD, document_ids=documents)
    for lengths in ([1] * T, [2, 3, 2]):
        out = in_steps(subject, layer, x_BTD, lengths, document_ids=documents)
        require_equal(
            out,
            expected,
            f"rows of several documents in steps of {lengths}, beside the full pass",
            "keep the document ids of cached positions in the cache",
        )
