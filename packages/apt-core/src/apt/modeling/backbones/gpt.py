"""GPT: a stack of pre-norm transformer blocks between an embedding and a projection to the vocabulary.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from apt.core.config import ModelConfig
from apt.core.providers.attention import AttentionContext, supports
from apt.modeling.backbones.backbone import Backbone, ModelOutput, lacking, sum_of, takes_context
from apt.modeling.layers.counting import Part, flops_per_token
from apt.modeling.layers.kv_cache import ModelCache
from apt.modeling.layers.norm import make_norm


class TransformerBlock(Part):
    """x + attention(norm(x)), then x + ffn(norm(x)).

    Args:
        attention: a layer as `AttentionProvider` describes it; one that takes no `context` serves full passes only.
        ffn: a layer as `FFNProvider` describes it, which drops its own outputs.
        norm: "layernorm" or "rmsnorm".
        dropout: probability of dropping an output of the attention in training.
        norm_eps: see `make_norm`.
    """

    def __init__(
        self,
        attention: nn.Module,
        ffn: nn.Module,
        *,
        norm: str = "layernorm",
        dropout: float = 0.0,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        d_model: int = attention.d_model  # type: ignore[assignment]
        self.norm1 = make_norm(norm, d_model, norm_eps)
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.norm2 = make_norm(norm, d_model, norm_eps)
        self.ffn = ffn
        self.takes_context = takes_context(attention)

    def forward(
        self,
        x_BTD: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        context: AttentionContext | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The block's output [B, T, D], and the auxiliary loss of its FFN or None.

        Raises:
            ProviderError: the context asks for something that the attention layer cannot serve.
        """
        return self._add_ffn(self._add_attention(x_BTD, attn_mask, key_padding_mask, context))

    def _add_attention(
        self,
        x_BTD: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        context: AttentionContext | None,
    ) -> Tensor:
        normed = self.norm1(x_BTD)
        options: dict[str, Any] = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        if context is not None:
            self._check(context)
            if self.takes_context:
                options["context"] = context
        mixed = self.attention(normed, normed, normed, **options)
        # An output without weights beside it must not be taken apart: its first row would be added to every row.
        dropped: Tensor = self.dropout(mixed[0] if isinstance(mixed, tuple) else mixed)
        return x_BTD + dropped

    def _add_ffn(self, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        out = self.ffn(self.norm2(x_BTD))
        out_BTD, aux_loss = out if isinstance(out, tuple) else (out, None)
        return x_BTD + out_BTD, aux_loss

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs per token at a context of `length` tokens."""
        return flops_per_token(self.attention, length) + flops_per_token(self.ffn, length)

    def _check(self, context: AttentionContext) -> None:
        wanted = {"cache": context.cache, "documents": context.document_ids}
        for capability, given in wanted.items():
            if given is not None and not (self.takes_context and supports(self.attention, capability)):
                raise lacking(self.attention, capability)
        if context.positions is not None and not self.takes_context:
            raise lacking(self.attention, "positions")


class GPT(Backbone):
    """A decoder-only language model.

    Args:
        config: sizes, norm, kind of positions, tying and dropout.
        blocks: its blocks, first one first.
        vocab_size: rows V of the embedding.
    """

    blocks: nn.ModuleList

    def __init__(self, config: ModelConfig, blocks: Sequence[TransformerBlock], vocab_size: int) -> None:
        super().__init__(config, vocab_size, blocks=blocks)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cache: ModelCache | None = None,
        last_only: bool = False,
    ) -> ModelOutput:
        """Predict the next token at each position.

        Args:
            tokens_BT: int64 [B, T], below `vocab_size`.
            positions: int64 [T] or [B, T]; None: 0 to T - 1, or from the cache's length on.
            document_ids: int64 [B, T]; a position sees its own document alone.
            key_padding_mask: [B, S], S counting cached positions too; True is blocked, a float is added.
            cache: from `make_cache`; the new positions see what it holds and join it.
            last_only: compute logits for the last position alone.

        Raises:
            ConfigError: a learned position of `max_seq_len` or more.
            ProviderError: an attention layer cannot serve the request.
        """
        x_BTD = self.embed(tokens_BT, positions, 0 if cache is None else cache.length)
        context = None
        if positions is not None or document_ids is not None or cache is not None:
            context = AttentionContext(positions, document_ids)
        aux_loss: Tensor | None = None
        for index, block in enumerate(self.blocks):
            if context is not None and cache is not None:
                context = replace(context, cache=cache.layers[index])
            x_BTD, aux = block(x_BTD, key_padding_mask=key_padding_mask, context=context)
            aux_loss = sum_of(aux_loss, aux)
        return self.project(x_BTD, aux_loss, last_only=last_only)

    def make_cache(self, batch_size: int, max_length: int, *, dtype: torch.dtype | None = None) -> ModelCache:
        """An empty cache with room for `max_length` positions of `batch_size` rows, on the model's device.

        Args:
            dtype: of what is kept; the model's own if left out.

        Raises:
            ProviderError: an attention layer has none.
        """
        weight = self.token_embedding.weight
        layers = []
        for block in self.blocks:
            attention: Any = block.attention
            if not supports(attention, "cache"):
                raise lacking(attention, "cache")
            layers.append(
                attention.make_cache(batch_size, max_length, device=weight.device, dtype=dtype or weight.dtype)
            )
        return ModelCache(layers)

    def supports(self, capability: str) -> bool:
        """Whether every attention layer can serve `capability` (see `AttentionProvider`)."""
        return all(supports(block.attention, capability) for block in self.blocks)

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs per token at a context of `length` tokens, attention scores and output projection included."""
        return sum(flops_per_token(block, length) for block in self.blocks) + 2 * self.vocab_size * self.d_model


__all__ = ["GPT", "ModelOutput", "TransformerBlock", "lacking"]
