"""Attention layers whose cache is wrong in one thing each: the plain one of `kit_references`, one method replaced."""

from __future__ import annotations

from typing import Any

import torch
from kit_mutants_attention import mutant
from kit_references import PlainAttentionLayer, PlainCache
from torch import Tensor

from apt.core.providers.attention import AttentionContext

Layer = PlainAttentionLayer


@mutant("cache_one_by_one")
class RotationStartsOverInTheCache(Layer):
    """Each step through the cache is rotated as if it began at position 0."""

    def positions(self, context: Any, start: int, x: Tensor) -> Tensor:
        return super().positions(context, 0, x)


@mutant("cache_one_by_one")
class RotationIsOneOffInTheCache(Layer):
    """With a cache, positions are counted from 1 behind what is held."""

    def positions(self, context: Any, start: int, x: Tensor) -> Tensor:
        return super().positions(context, start + (start > 0), x)


@mutant("cache_in_chunks")
class MaskAnchoredAtTheWrongCorner(Layer):
    """The causal mask of T queries on S > T keys begins at the upper left corner."""

    def future(self, T: int, S: int) -> Tensor:
        return torch.ones(T, S, dtype=torch.bool).triu(1 if T > 1 else S)


@mutant("cache_in_chunks")
class NoMaskBehindACache(Layer):
    """With something in the cache, nothing is hidden."""

    def future(self, T: int, S: int) -> Tensor:
        return super().future(T, S) & (T == S)


@mutant("cache_in_mixed_steps")
class TableOfSixteen(Layer):
    """With a cache, positions from 16 on are rotated as position 15."""

    def positions(self, context: Any, start: int, x: Tensor) -> Tensor:
        positions = super().positions(context, start, x)
        return positions if context.cache is None else positions.clamp(max=15)


@mutant("cache_counts_its_positions")
class CountsSteps(Layer):
    """The cache counts calls, and keeps the positions apart under another name."""

    class Cache(PlainCache):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.held = 0

    def remember(self, cache: Any, k: Tensor, v: Tensor, documents: Any) -> Any:
        calls, cache.length = cache.length, cache.held
        found = super().remember(cache, k, v, documents)
        cache.held, cache.length = cache.length, calls + 1
        return found


@mutant("cache_can_be_truncated")
class TruncateKeepsTheKeys(Layer):
    """`truncate` lowers the length, and the next write goes behind what was dropped."""

    class Cache(PlainCache):
        behind = 0

        def truncate(self, length: int) -> None:
            self.behind += self.length - length
            self.length = length
            self.k, self.v = (
                torch.cat((x[:, :length], x[:, length:].flip(1)), 1).roll(self.behind, 1) for x in (self.k, self.v)
            )


@mutant("cache_can_be_truncated")
class TruncateDoesNothing(Layer):
    """`truncate` to zero is taken for no request."""

    class Cache(PlainCache):
        def truncate(self, length: int) -> None:
            if length:
                super().truncate(length)


@mutant("cache_rows_can_be_selected")
class SelectsRowsOfTheKeysAlone(Layer):
    """`select_rows` reorders the keys and leaves the values, repeating them where rows are."""

    class Cache(PlainCache):
        def select_rows(self, rows_B: Tensor) -> None:
            self.k, self.documents = self.k[rows_B], self.documents[rows_B]
            self.v = self.v[torch.arange(len(rows_B)) % len(self.v)]


@mutant("caches_are_apart")
class KeepsTheCacheOnTheLayer(Layer):
    """Keys and values lie on the layer, and the cache only counts."""

    def make_cache(self, batch_size: int, max_length: int, **options: Any) -> PlainCache:
        cache = super().make_cache(batch_size, max_length, **options)
        self.k, self.v = cache.k, cache.v
        return cache

    def remember(self, cache: Any, k: Tensor, v: Tensor, documents: Any) -> Any:
        cache.k, cache.v = self.k, self.v
        return super().remember(cache, k, v, documents)


@mutant("cache_that_is_full_says_so")
class DropsWhatDoesNotFit(Layer):
    """Positions beyond the cache's room take the place of the last one."""

    def remember(self, cache: Any, k: Tensor, v: Tensor, documents: Any) -> Any:
        cache.length = min(cache.length, cache.room - k.shape[1])
        return super().remember(cache, k, v, documents)


@mutant("cache_with_padding")
class PaddingOfTheNewestAlone(Layer):
    """With a cache, padding hides what is new and nothing that is held."""

    def masks(self, T: int, S: int, attn_mask: Any, padding: Any, *documents: Any) -> Any:
        if padding is not None and S > T:
            padding = padding.clone()
            padding[:, : S - T] = False
        return super().masks(T, S, attn_mask, padding, *documents)


@mutant("cache_with_positions")
class CachedStepsIgnorePositions(Layer):
    """With something in the cache, given positions are passed over."""

    def positions(self, context: Any, start: int, x: Tensor) -> Tensor:
        return super().positions(AttentionContext() if start else context, start, x)


@mutant("cache_with_documents")
class CacheForgetsDocuments(Layer):
    """What is cached belongs to the document of the newest position."""

    def remember(self, cache: Any, k: Tensor, v: Tensor, documents: Any) -> Any:
        k, v, held = super().remember(cache, k, v, documents)
        return k, v, held if documents is None else documents[:, -1:].expand_as(held)
