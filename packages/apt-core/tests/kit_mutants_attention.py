"""Attention providers that are wrong in one thing each: the plain one of `kit_references`, with one method replaced."""

from __future__ import annotations

import math
from typing import Any

import torch
from kit_references import PlainAttention, PlainAttentionLayer, PlainCache
from torch import Tensor

from apt.core.providers.attention import AttentionContext

MUTANTS: dict[str, tuple[str, type[Any], str]] = {}
"""{name: (kind, provider, the check that is aimed at it)}; what is wrong with it is its docstring."""


def mutant(aim: str) -> Any:
    """Make a layer a mutant that the check `aim` has to catch."""

    def add(cls: Any) -> Any:
        provider = type(cls.__name__, (PlainAttention,), {"Layer": cls, "__doc__": cls.__doc__})
        MUTANTS[cls.__name__] = ("attention", provider, aim)
        return cls

    return add


Layer = PlainAttentionLayer


# Who sees whom


@mutant("causality")
class SeesTheNextPosition(Layer):
    """The causal mask begins one diagonal too high."""

    def future(self, T: int, S: int) -> Tensor:
        return torch.ones(T, S, dtype=torch.bool).triu(S - T + 2)


@mutant("causality")
class LooksAheadAtEvenLengthsAlone(Layer):
    """Rows of two positions are not masked."""

    def future(self, T: int, S: int) -> Tensor:
        return super().future(T, S) & (T != 2)


@mutant("past_is_used")
class SeesItselfAlone(Layer):
    """Every position but one's own is hidden."""

    def future(self, T: int, S: int) -> Tensor:
        return ~torch.eye(T, S, dtype=torch.bool).roll(S - T, 1)


@mutant("without_causality_the_future_is_seen")
class AlwaysCausal(Layer):
    """`causal=False` is taken and ignored."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.causal = True


@mutant("the_output_depends_on_the_input")
class HidesTheFirstFromItself(Layer):
    """The causal mask hides the diagonal, so the first position sees nothing."""

    def future(self, T: int, S: int) -> Tensor:
        return torch.ones(T, S, dtype=torch.bool).triu(S - T)


@mutant("batch_independence")
class LeaksAcrossTheBatch(Layer):
    """Values are centred over the batch."""

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        q, k, v = super().project(query, key, value)
        return q, k, v - v.mean(0, keepdim=True) / 8


@mutant("batch_independence")
class MixesBatchAndHeads(Layer):
    """Heads are put together with a reshape that takes the batch for a head where there are three rows."""

    def merge(self, out_BHTd: Tensor) -> Tensor:
        B, H, T, d = out_BHTd.shape
        return out_BHTd.permute(2, 0, 1, 3).reshape(B, T, H * d) if B == 3 else super().merge(out_BHTd)


# Masks


@mutant("boolean_mask_blocks")
class MaskReadTheOtherWayRound(Layer):
    """True means seen, as in F.scaled_dot_product_attention."""

    def widen(self, attn_mask: Tensor) -> Tensor:
        wide = super().widen(attn_mask)
        return ~wide if wide.dtype == torch.bool else wide


@mutant("float_mask_is_added")
class FloatMaskTakenForBoolean(Layer):
    """A float mask blocks where it is negative, and adds nothing."""

    def widen(self, attn_mask: Tensor) -> Tensor:
        wide = super().widen(attn_mask)
        return wide if wide.dtype == torch.bool else wide < 0


@mutant("masks_of_each_row")
class FirstRowsMaskForAll(Layer):
    """Of masks [B, T, S] the first row's serves every row."""

    def widen(self, attn_mask: Tensor) -> Tensor:
        return super().widen(attn_mask[:1] if attn_mask.dim() == 3 else attn_mask)


@mutant("blocked_keys_have_no_influence")
class PaddingReplacesTheMask(Layer):
    """Where padding is given, `attn_mask` is passed over."""

    def masks(self, T: int, S: int, attn_mask: Any, padding: Any, *documents: Any) -> Any:
        return super().masks(T, S, attn_mask if padding is None else None, padding, *documents)


@mutant("blocked_keys_have_no_influence")
class MasksAfterTheSoftmax(Layer):
    """What is blocked is set to zero after the softmax, which it has taken part in."""

    def softmax(self, scores_BHTS: Tensor, blocked: Tensor) -> Tensor:
        if self.causal:
            return super().softmax(scores_BHTS, blocked)
        return scores_BHTS.softmax(-1).masked_fill(blocked, 0)


@mutant("padding_has_no_influence")
class PaddingIgnored(Layer):
    """`key_padding_mask` is taken and ignored."""

    def masks(self, T: int, S: int, attn_mask: Any, padding: Any, *documents: Any) -> Any:
        return super().masks(T, S, attn_mask, None, *documents)


@mutant("padding_has_no_influence")
class PaddingHidesQueries(Layer):
    """`key_padding_mask` takes rows out of the scores in place of columns."""

    def masks(self, T: int, S: int, attn_mask: Any, padding: Any, *documents: Any) -> Any:
        blocked, added = super().masks(T, S, attn_mask, None, *documents)
        if padding is None or padding.dtype != torch.bool or T != S:
            return blocked, added
        return blocked | padding[:, None, :, None], added


@mutant("rows_that_see_nothing_are_finite")
class SoftmaxOverNothing(Layer):
    """A row that sees nothing is NaN."""

    def softmax(self, scores_BHTS: Tensor, blocked: Tensor) -> Tensor:
        return scores_BHTS.masked_fill(blocked, -math.inf).softmax(-1)


@mutant("rows_that_see_nothing_are_finite")
class WindowBesideTheMask(Layer):
    """A window of four positions is put into the scores, where the masks know nothing of it."""

    def masks(self, T: int, S: int, *masks: Any) -> Any:
        blocked, added = super().masks(T, S, *masks)
        far_TS = torch.ones(T, S, dtype=torch.bool).tril(S - T - 4)
        return blocked, added.masked_fill(far_TS, -math.inf)


@mutant("rows_that_see_nothing_are_finite")
class RowsThatSeeNothingSeeAll(Layer):
    """What is blocked gets a score of -1e9, so a row in which all is blocked sees all alike."""

    def softmax(self, scores_BHTS: Tensor, blocked: Tensor) -> Tensor:
        return scores_BHTS.masked_fill(blocked, -1e9).softmax(-1)


@mutant("rows_that_see_nothing_have_finite_gradients")
class NaNCoveredUp(Layer):
    """The NaN of rows that see nothing is replaced after the softmax, and comes back in the gradient."""

    def softmax(self, scores_BHTS: Tensor, blocked: Tensor) -> Tensor:
        weights = (scores_BHTS + torch.zeros_like(scores_BHTS).masked_fill(blocked, -math.inf)).exp()
        return torch.where(blocked.all(-1, keepdim=True), 0.0, weights / weights.sum(-1, keepdim=True))


# Plain softmax


@mutant("equals_plain_softmax")
class NoScale(Layer):
    """Scores are not divided by sqrt(Dh)."""

    def scores(self, q_BHTd: Tensor, k_BHSd: Tensor) -> Tensor:
        return q_BHTd @ k_BHSd.mT


@mutant("equals_plain_softmax")
class ScaledByTheWidth(Layer):
    """Scores are divided by sqrt(D) in place of sqrt(Dh)."""

    def scores(self, q_BHTd: Tensor, k_BHSd: Tensor) -> Tensor:
        return q_BHTd @ k_BHSd.mT / math.sqrt(self.d_model)


@mutant("equals_plain_softmax")
class SwappedQueryGroups(Layer):
    """Head h reads keys and values of head h mod K."""

    def spread(self, x_BSKd: Tensor) -> Tensor:
        return x_BSKd.repeat(1, 1, self.num_heads // self.kv_heads, 1).transpose(1, 2)


@mutant("equals_plain_softmax")
class HalvesRotated(Layer):
    """Dimension i turns with i + Dh / 2, as in other models, and not with its neighbour."""

    def rotate(self, x_BTHd: Tensor, positions: Tensor) -> Tensor:
        if self.theta is None:
            return x_BTHd
        order = torch.arange(self.head_dim).view(2, -1).T.flatten()
        return super().rotate(x_BTHd[..., order], positions)[..., order.argsort()]


@mutant("equals_plain_softmax_under_masks")
class DenserMasksAreCut(Layer):
    """Of what is blocked in a row only the first key is."""

    def widen(self, attn_mask: Tensor) -> Tensor:
        wide = super().widen(attn_mask)
        return wide & (wide.cumsum(-1) == 1) if wide.dtype == torch.bool and not self.causal else wide


@mutant("equals_plain_softmax_at_positions")
class PositionsWrapAround(Layer):
    """Positions are taken modulo 512."""

    def rotate(self, x_BTHd: Tensor, positions: Tensor) -> Tensor:
        return super().rotate(x_BTHd, positions % 512)


@mutant("equals_plain_softmax_without_rotation")
class AlwaysRotates(Layer):
    """`rope_theta=None` is taken for the usual angles."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.theta = self.theta or 10_000.0


# Positions, documents, cross-attention, weights


@mutant("default_positions_count_from_zero")
class GivenPositionsCountFromOne(Layer):
    """Positions that are given are one higher than those that are not, for the queries."""

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        self.turn = 0
        return super().project(query, key, value)

    def positions(self, context: Any, start: int, x: Tensor) -> Tensor:
        self.turn += 1
        shift = int(context.positions is not None and self.turn == 1)
        return super().positions(context, start, x) + shift


@mutant("positions_are_per_row")
class PositionsOfTheFirstRow(Layer):
    """Of positions [B, T] the first row's serve every row."""

    def positions(self, context: Any, start: int, x: Tensor) -> Tensor:
        return torch.atleast_2d(super().positions(context, start, x))[0]


@mutant("the_context_stays_as_it_is")
class WritesIntoTheMask(Layer):
    """Padding is joined to the mask in place."""

    def masks(self, T: int, S: int, attn_mask: Any, padding: Any, *documents: Any) -> Any:
        if attn_mask is not None and attn_mask.is_floating_point() and padding is not None:
            attn_mask.masked_fill_(padding[0], -math.inf)
        return super().masks(T, S, attn_mask, padding, *documents)


@mutant("documents_are_apart")
class DocumentsIgnored(Layer):
    """Document ids are taken and ignored."""

    def masks(self, T: int, S: int, attn_mask: Any, padding: Any, *documents: Any) -> Any:
        return super().masks(T, S, attn_mask, padding, None, None)


@mutant("cross_attention_reads_the_memory")
class KeysFromTheQuery(Layer):
    """Values come from the memory, and the keys of its first position only."""

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        q, k, v = super().project(query, key, value)
        return (q, k, v) if key is query else (q, k[:, :1].expand_as(k), v[:, :1].expand_as(v))


@mutant("cross_attention_depends_on_the_query")
class QueriesMixed(Layer):
    """In cross-attention each query is added to the next one."""

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        q, k, v = super().project(query, key, value)
        return (q, k, v) if key is query else (q + q.roll(1, 1), k, v)


@mutant("cross_attention_padding")
class PaddingForSelfAttentionAlone(Layer):
    """Padding is applied where there are as many keys as queries."""

    def masks(self, T: int, S: int, attn_mask: Any, padding: Any, *documents: Any) -> Any:
        return super().masks(T, S, attn_mask, None if S < T else padding, *documents)


@mutant("cross_cache_holds_the_memory")
class ValuesOfTheMemoryForgotten(Layer):
    """In cross-attention the values are not what the cache holds."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, context: Any = None, **options: Any
    ) -> Any:
        if key is not query and context is not None and context.cache is not None:
            context.cache.length = 0
        return super().forward(query, key, value, *args, context=context, **options)


@mutant("cross_cache_holds_the_memory")
class QueriesBehindTheMemory(Layer):
    """In cross-attention queries are placed behind the positions that the cache holds."""

    def positions(self, context: Any, start: int, x: Tensor) -> Tensor:
        held = 0 if self.causal or context.cache is None else context.cache.length
        return super().positions(context, start, x) + held


class StaysInPlace(PlainCache):
    """Its rows stay where they are."""

    def select_rows(self, rows_B: Tensor) -> None:
        super().select_rows(torch.arange(len(rows_B)) % len(self.k))


@mutant("cross_cache_rows_can_be_selected")
class MemoryRowsStay(Layer):
    """`select_rows` reorders what is kept of its own sequence, and not what is kept of another one."""

    def make_cache(self, *sizes: Any, **options: Any) -> PlainCache:
        self.Cache = PlainCache if self.causal else StaysInPlace  # type: ignore[misc]
        return super().make_cache(*sizes, **options)


@mutant("weights_are_a_distribution")
class WeightsBeforeTheMask(Layer):
    """The weights that come back are those of an unmasked softmax."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        out, weights = super().forward(query, key, value, *args, **options)
        if weights is not None:
            weights = (weights + 1e-3) / (weights + 1e-3).sum(-1, keepdim=True)
        return out, weights


@mutant("weights_change_no_output")
class OtherCodeForWeights(Layer):
    """Where weights are asked for, rows that see nothing are forgotten."""

    wanted = False

    def forward(self, *args: Any, context: Any = None, **options: Any) -> Any:
        self.wanted = context is not None and context.need_weights
        return super().forward(*args, context=context, **options)

    def out(self, x_BTD: Tensor) -> Tensor:
        return super().out(x_BTD) * (1.001 if self.wanted else 1)


@mutant("weights_count_cached_keys")
class WeightsOfTheNewestAlone(Layer):
    """With a cache the weights are over the new keys alone."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        out, weights = super().forward(query, key, value, *args, **options)
        return out, None if weights is None else weights[..., -key.shape[1] :]


@mutant("output_comes_with_weights_or_none")
class WeightsUnasked(Layer):
    """Weights come back whether they are asked for or not."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, context: Any = None, **more: Any) -> Any:
        asked = AttentionContext(need_weights=True) if context is None else context
        return super().forward(query, key, value, *args, context=asked, **more)


@mutant("capabilities_are_known")
class MisspeltCapability(Layer):
    """It claims "document", which nothing reads."""

    capabilities = frozenset({"cache", "document", "cross_attention", "weights"})


@mutant("heads_that_do_not_fit_are_refused")
class AnyNumberOfHeads(Layer):
    """Heads that do not fit end in an AssertionError."""

    def __init__(self, d_model: int, num_heads: int, *args: Any) -> None:
        assert d_model % num_heads == 0
        super().__init__(d_model, num_heads, *args)
