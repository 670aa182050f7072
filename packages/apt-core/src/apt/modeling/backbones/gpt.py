"""GPT: a stack of pre-norm transformer blocks between an embedding and a projection to the vocabulary.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apt.core.config import ModelConfig
from apt.core.errors import ConfigError, ProviderError
from apt.core.providers.attention import AttentionContext, supports
from apt.modeling.layers.counting import Part, flops_per_token
from apt.modeling.layers.kv_cache import ModelCache
from apt.modeling.layers.norm import make_norm


class ModelOutput(NamedTuple):
    """What a model returns."""

    logits: Tensor
    """[B, T, V], or [B, 1, V] where only the last position was asked for."""
    hidden: Tensor
    """[B, T, D], after the final norm."""
    aux_loss: Tensor | None
    """0-d, the sum of the FFN layers' auxiliary losses; None if none has one."""


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
        parameters = inspect.signature(attention.forward).parameters
        self.takes_context = "context" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

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
        normed = self.norm1(x_BTD)
        options: dict[str, Any] = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        if context is not None:
            self._check(context)
            if self.takes_context:
                options["context"] = context
        mixed = self.attention(normed, normed, normed, **options)
        # An output without weights beside it must not be taken apart: its first row would be added to every row.
        x_BTD = x_BTD + self.dropout(mixed[0] if isinstance(mixed, tuple) else mixed)
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


def lacking(layer: nn.Module, capability: str) -> ProviderError:
    """The error for a layer that cannot serve what it is asked for."""
    return ProviderError(
        f"{type(layer).__name__} does not support {capability!r}", hint="choose another model.attention_name"
    )


class GPT(Part):
    """A decoder-only language model.

    Args:
        config: sizes, norm, kind of positions, tying and dropout.
        blocks: its blocks, first one first.
        vocab_size: rows V of the embedding.
    """

    def __init__(self, config: ModelConfig, blocks: Sequence[TransformerBlock], vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.d_model = config.d_model
        self.max_seq_len = config.max_seq_len
        self.token_embedding = nn.Embedding(vocab_size, config.d_model)
        self.position_embedding = (
            nn.Embedding(config.max_seq_len, config.d_model) if config.positions == "learned" else None
        )
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = make_norm(config.norm, config.d_model, config.norm_eps)
        # A tied projection is the embedding itself and no second name for it: a state dict holds each tensor once.
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, vocab_size, bias=False)
        for module in (self.token_embedding, self.position_embedding, self.head):
            if module is not None:
                nn.init.normal_(module.weight, std=0.02)

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
        x_BTD = self.token_embedding(tokens_BT)
        if self.position_embedding is not None:
            x_BTD = x_BTD + self._learned(self.position_embedding, tokens_BT.shape[1], positions, cache)
        x_BTD = self.dropout(x_BTD)
        context = None
        if positions is not None or document_ids is not None or cache is not None:
            context = AttentionContext(positions, document_ids)
        aux_loss: Tensor | None = None
        for index, block in enumerate(self.blocks):
            if context is not None and cache is not None:
                context = replace(context, cache=cache.layers[index])
            x_BTD, aux = block(x_BTD, key_padding_mask=key_padding_mask, context=context)
            if aux is not None:
                aux_loss = aux if aux_loss is None else aux_loss + aux
        hidden_BTD = self.norm(x_BTD)
        seen = hidden_BTD[:, -1:] if last_only else hidden_BTD
        weight_VD = self.token_embedding.weight if self.head is None else self.head.weight
        return ModelOutput(F.linear(seen, weight_VD), hidden_BTD, aux_loss)

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

    def _learned(
        self, embedding: nn.Embedding, count: int, positions: Tensor | None, cache: ModelCache | None
    ) -> Tensor:
        start = cache.length if cache is not None else 0
        last = start + count - 1
        if positions is not None and positions.is_cpu and not torch.compiler.is_compiling():
            last = int(positions.max())  # elsewhere it would wait for the device, and the embedding refuses by itself
        # Whoever exports the model says how long a text may be; to ask here would fix the length.
        if not torch.compiler.is_exporting() and last >= self.max_seq_len:
            raise ConfigError(
                f"position {last} lies beyond the {self.max_seq_len} that this model has learned",
                hint="shorten the text, or train with a larger model.max_seq_len or with model.positions: rope",
            )
        return embedding.weight[start : start + count] if positions is None else embedding(positions)


__all__ = ["GPT", "ModelOutput", "TransformerBlock", "lacking"]
