"""An encoder-decoder: one stack reads a source as a whole, another writes a target while it looks at what was read.

Vaswani et al., "Attention Is All You Need" (2017), section 3.1, with pre-norm blocks. Source and target share the
embedding and its positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apt.core.config import ModelConfig
from apt.core.errors import ConfigError
from apt.core.providers.attention import AttentionContext, LayerCache, supports
from apt.modeling.backbones.backbone import Backbone, ModelOutput, lacking, sum_of, takes_context
from apt.modeling.backbones.gpt import TransformerBlock
from apt.modeling.layers.counting import flops_per_token
from apt.modeling.layers.kv_cache import ModelCache
from apt.modeling.layers.norm import make_norm


class Memory(NamedTuple):
    """A source as the encoder has read it."""

    states_BSD: Tensor
    """[B, S, D], after the encoder's final norm."""
    padding_BS: Tensor | None = None
    """bool [B, S], True where a row has ended; None: all are of one length."""
    aux_loss: Tensor | None = None
    """0-d, the sum of the encoder's auxiliary losses; None if there are none."""

    def select_rows(self, rows_B: Tensor) -> Memory:
        """The rows `rows_B` (int64 [B']), in that order; a row may be repeated."""
        padding_BS = None if self.padding_BS is None else self.padding_BS[rows_B]
        return Memory(self.states_BSD[rows_B], padding_BS, self.aux_loss)


class DecoderBlock(TransformerBlock):
    """A block that looks at the memory, x + cross_attention(norm(x), memory), between its attention and its FFN.

    Args:
        attention, ffn, norm, dropout, norm_eps: as for `TransformerBlock`.
        cross_attention: a layer as `AttentionProvider` describes it, built with `causal=False`, that says
            "cross_attention".
    """

    def __init__(
        self,
        attention: nn.Module,
        cross_attention: nn.Module,
        ffn: nn.Module,
        *,
        norm: str = "layernorm",
        dropout: float = 0.0,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__(attention, ffn, norm=norm, dropout=dropout, norm_eps=norm_eps)
        self.norm_cross = make_norm(norm, cross_attention.d_model, norm_eps)  # type: ignore[arg-type]
        self.cross_attention = cross_attention
        self.cross_takes_context = takes_context(cross_attention)

    def forward(
        self,
        x_BTD: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        context: AttentionContext | None = None,
        memory: Memory | None = None,
        memory_cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `TransformerBlock.forward`; the masks and the context are those of the target.

        Args:
            memory: what the block looks at; left out only by mistake.
            memory_cache: of the cross-attention.
        """
        assert memory is not None
        x_BTD = self._add_attention(x_BTD, attn_mask, key_padding_mask, context)
        options: dict[str, Any] = {"key_padding_mask": memory.padding_BS}
        if context is not None and self.cross_takes_context:
            options["context"] = AttentionContext(context.positions, cache=memory_cache)
        mixed = self.cross_attention(self.norm_cross(x_BTD), memory.states_BSD, memory.states_BSD, **options)
        x_BTD = x_BTD + self.dropout(mixed[0] if isinstance(mixed, tuple) else mixed)
        return self._add_ffn(x_BTD)

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs per token at a target and a source of `length` tokens each."""
        return super().flops_per_token(length) + flops_per_token(self.cross_attention, length)


class DecoderCache(ModelCache):
    """The caches of a decoder's layers, and of their cross-attentions, which hold the source.

    Args:
        layers: one per block, all of one length.
        memory: one per block, None where a cross-attention keeps nothing.
    """

    def __init__(self, layers: Sequence[LayerCache], memory: Sequence[LayerCache | None]) -> None:
        super().__init__(layers)
        self.memory = list(memory)

    def select_rows(self, rows_B: Tensor) -> None:
        """Keep the batch rows `rows_B` (int64 [B']), in that order; a row may be repeated."""
        super().select_rows(rows_B)
        for layer in self.memory:
            if layer is not None:
                layer.select_rows(rows_B)


class EncoderDecoder(Backbone):
    """A model of targets given their sources.

    Args:
        config: sizes, norm, kind of positions, tying and dropout.
        encoder: its blocks, whose attention is not causal.
        decoder: its blocks, whose self-attention is.
        vocab_size: rows V of the embedding.
    """

    encoder: nn.ModuleList
    decoder: nn.ModuleList

    def __init__(
        self,
        config: ModelConfig,
        encoder: Sequence[TransformerBlock],
        decoder: Sequence[DecoderBlock],
        vocab_size: int,
    ) -> None:
        super().__init__(config, vocab_size, encoder=encoder, decoder=decoder)
        self.encoder_norm = make_norm(config.norm, config.d_model, config.norm_eps)

    def encode(self, source_BS: Tensor, source_padding: Tensor | None = None) -> Memory:
        """Read a source.

        Args:
            source_BS: int64 [B, S], below `vocab_size`; shorter rows are padded on the right, with whatever token.
            source_padding: bool [B, S], True there.

        Raises:
            ConfigError: a learned position of `max_seq_len` or more.
        """
        x_BSD = self.embed(source_BS)
        aux_loss: Tensor | None = None
        for block in self.encoder:
            x_BSD, aux = block(x_BSD, key_padding_mask=source_padding)
            aux_loss = sum_of(aux_loss, aux)
        return Memory(self.encoder_norm(x_BSD), source_padding, aux_loss)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        source: Tensor | None = None,
        source_padding: Tensor | None = None,
        memory: Memory | None = None,
        cache: DecoderCache | None = None,
        last_only: bool = False,
    ) -> ModelOutput:
        """Predict the next token of the target at each position.

        Args:
            tokens_BT: int64 [B, T], below `vocab_size`: the token that starts a target, then the target so far. Shorter
                rows may be padded on the right, with whatever token: what comes before does not see it.
            source, source_padding: as `encode` takes them.
            memory: from `encode`, in their place: a source is read once and a target written token by token.
            cache: from `make_cache`; the new positions see what it holds and join it.
            last_only: compute logits for the last position alone.

        Raises:
            ConfigError: there is no source, or a learned position of `max_seq_len` or more.
            ProviderError: an attention layer cannot serve the request.
        """
        if memory is None:
            if source is None:
                raise ConfigError("an encoder-decoder needs a source", hint="give source=, or memory= from encode()")
            memory = self.encode(source, source_padding)
        aux_loss = memory.aux_loss
        start, length = 0 if cache is None else cache.length, tokens_BT.shape[1]
        x_BTD = self.embed(tokens_BT, None, start)
        # A cross-attention cannot tell from its cache, which holds the source, where in the target its queries are.
        positions_T = None if cache is None else torch.arange(start, start + length, device=tokens_BT.device)
        for index, block in enumerate(self.decoder):
            context, memory_cache = None, None
            if cache is not None:
                context, memory_cache = AttentionContext(positions_T, cache=cache.layers[index]), cache.memory[index]
            x_BTD, aux = block(x_BTD, context=context, memory=memory, memory_cache=memory_cache)
            aux_loss = sum_of(aux_loss, aux)
        return self.project(x_BTD, aux_loss, last_only=last_only)

    def make_cache(self, memory: Memory, max_length: int, *, dtype: torch.dtype | None = None) -> DecoderCache:
        """An empty cache with room for `max_length` tokens of each target, and for what the layers make of `memory`.

        Args:
            dtype: of what is kept; the model's own if left out.

        Raises:
            ProviderError: an attention layer has none.
        """
        weight = self.token_embedding.weight
        options: dict[str, Any] = {"device": weight.device, "dtype": dtype or weight.dtype}
        rows, source_length = memory.states_BSD.shape[:2]
        layers, crossing = [], []
        for block in self.decoder:
            attention: Any = block.attention
            cross: Any = block.cross_attention
            if not self._decodes(block):
                raise lacking(attention, "cache")
            layers.append(attention.make_cache(rows, max_length, **options))
            holds = supports(cross, "cross_cache")
            crossing.append(cross.make_cache(rows, source_length, **options) if holds else None)
        return DecoderCache(layers, crossing)

    def supports(self, capability: str) -> bool:
        """Whether every self-attention of the decoder can serve `capability` (see `AttentionProvider`)."""
        if capability == "cache":
            return all(self._decodes(block) for block in self.decoder)
        return all(supports(block.attention, capability) for block in self.decoder)

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs for one token of a source and one of a target, each of `length` tokens, output projection
        included."""
        blocks = sum(flops_per_token(block, length) for block in (*self.encoder, *self.decoder))
        return blocks + 2 * self.vocab_size * self.d_model

    @staticmethod
    def _decodes(block: Any) -> bool:
        """Whether a block can go on from a cache: its cross-attention must be told of its queries' positions."""
        return supports(block.attention, "cache") and block.cross_takes_context


__all__ = ["DecoderBlock", "DecoderCache", "EncoderDecoder", "Memory"]
