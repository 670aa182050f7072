"""Attention: what mixes information between positions."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from apt.core.registry import Provider

if TYPE_CHECKING:
    from torch import Tensor, nn


class LayerCache(Protocol):
    """What one attention layer remembers of the positions it has seen. Its content is the layer's own affair."""

    length: int
    """How many positions are held; the same for every row of the batch."""

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""

    def select_rows(self, rows_B: Tensor) -> None:
        """Keep the batch rows `rows_B` (int64 [B']), in that order; a row may be repeated."""


@dataclass(slots=True)
class AttentionContext:
    """What a layer may want to know beyond query, key, value and masks.

    A layer that takes no `context` still works for full passes without documents.
    """

    positions: Tensor | None = None
    """int64 [T] or [B, T]: the query's positions. None: 0 to T-1, or from the cache's length on."""
    document_ids: Tensor | None = None
    """int64 [B, T]: a position sees only its own document. None: one document per row."""
    cache: LayerCache | None = None
    """Filled by the layer; the queries then see every cached position as well as themselves."""
    need_weights: bool = False
    """Ask for the attention weights [B, H, T, S] as the second result."""


class AttentionProvider(Provider):
    """Builds attention layers.

    A layer is a module whose `forward(query, key, value, attn_mask=None, key_padding_mask=None, *, context=None)`
    takes query [B, T, D], key and value [B, S, D] and returns `(output [B, T, D], weights [B, H, T, S] or None)`.
    `attn_mask` is [T, S] or [B, T, S]; `key_padding_mask` is [B, S], S counting cached positions too. In a boolean
    mask True means *blocked*, as in `torch.nn.MultiheadAttention`; a float mask is added to the scores. A row that is
    wholly masked gives zeros. `context` (an `AttentionContext`) may be left out by layers that serve full passes only.

    A layer says what it can serve beyond that in its attribute `capabilities`, a frozenset of:

    - `"cache"`: it has `make_cache(batch_size, max_length, *, device, dtype) -> LayerCache` and fills `context.cache`;
    - `"documents"`: it keeps the documents of `context.document_ids` apart;
    - `"cross_attention"`: key and value may come from another sequence than query, whose positions are then
      `context.positions` or 0 to T-1, and the other sequence's 0 to S-1;
    - `"cross_cache"`: built with `causal=False`, it keeps what it makes of the other sequence in `context.cache`: an
      empty cache is filled from key and value, and one that holds them is read, whatever key and value then hold;
    - `"weights"`: it returns weights when `context.need_weights` is set.

    A layer has the attribute `d_model`, and may have `flops_per_token(length) -> int` (forward FLOPs per token at a
    context of `length` tokens), which else is estimated from its parameters.
    """

    weights_layout: ClassVar[str | None] = None
    """Providers whose layers share parameter names and shapes, and compute one function of them, share this name:
    checkpoints move between them.

    "mha" is softmax attention as it is defined, with the parameters of `mha`: `w_qkv` (queries of H heads, then keys
    and values of K heads, each Dh wide) and `w_o`, with biases or without, and the gains `q_gain` and `k_gain` of an
    RMS norm behind the rotation, if there are any. The conformance kit holds whoever claims it to that definition."""

    @abstractmethod
    def create_layer(
        self, d_model: int, num_heads: int, *, causal: bool = True, dropout: float = 0.0, **config: Any
    ) -> nn.Module:
        """Build one layer.

        Args:
            d_model: width D of the model.
            num_heads: heads H; D must be a multiple of H.
            causal: whether a position sees only itself and what came before it.
            dropout: probability of dropping an attention weight in training.
            **config: what the model around it knows: `num_layers` (for the scale of the initial weights),
                `rope_theta` (None: the model adds learned positions and the layer rotates nothing), `device` (where
                the layer will run; None: not known yet) and `trains` (whether gradients will be asked for).

        Raises:
            ConfigError: the sizes or the config do not fit this kind of attention; the message names what does.
            ProviderError: it cannot be built here (a missing GPU or library); the run falls back to the default.
        """


def supports(layer: object, capability: str) -> bool:
    """Whether an attention layer says that it can serve `capability`."""
    return capability in getattr(layer, "capabilities", frozenset())


__all__ = ["AttentionContext", "AttentionProvider", "LayerCache", "supports"]
