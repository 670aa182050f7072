"""Multi-head attention with rotary positions, and its grouped-query form.

Vaswani et al., "Attention Is All You Need" (2017), section 3.2; Ainslie et al., "GQA" (2023): with K < H heads of keys
and values, head h reads those of number h // (H / K).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apt.core.errors import ConfigError
from apt.core.providers.attention import AttentionContext, AttentionProvider
from apt.modeling.layers.checks import check_heads, check_request
from apt.modeling.layers.config import MHAConfig
from apt.modeling.layers.counting import Part
from apt.modeling.layers.kv_cache import PositionCache
from apt.modeling.layers.masks import Limits, attend, build_mask
from apt.modeling.layers.norm import rms_norm
from apt.modeling.layers.rope import RotaryEmbedding, rotate


class MHAAttentionLayer(Part):
    """Multi-head or grouped-query attention; `forward` keeps the contract of `AttentionProvider`.

    A layer of the same weights that scores on another kernel overrides `mix` alone.

    Args:
        d_model: width D.
        num_heads: heads H of size Dh = D / H.
        config: the section `model.mha`.
        causal: whether a position sees only itself and what came before it.
        dropout: probability of dropping an attention weight in training.
        num_layers: depth of the model, for the initial scale of the output projection.
        rope_theta: base of the rotary angles; None: nothing is rotated.

    Raises:
        ConfigError: the heads do not fit.
    """

    name: ClassVar[str] = "mha"
    capabilities = frozenset({"cache", "documents", "cross_attention", "cross_cache", "weights"})

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        config: MHAConfig,
        *,
        causal: bool = True,
        dropout: float = 0.0,
        num_layers: int = 1,
        rope_theta: float | None = 10_000.0,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.num_heads = num_heads
        self.head_dim = check_heads(d_model, num_heads)
        self.num_kv_heads = config.num_kv_heads or num_heads
        if num_heads % self.num_kv_heads:
            fits = ", ".join(str(k) for k in range(1, num_heads + 1) if num_heads % k == 0)
            raise ConfigError(
                f"model.mha.num_kv_heads: {self.num_kv_heads} does not divide num_heads {num_heads}",
                hint=f"num_kv_heads that fit: {fits}",
            )
        if rope_theta is not None and self.head_dim % 2:
            raise ConfigError(
                f"heads of size {self.head_dim} cannot be rotated in pairs",
                hint="choose num_heads so that d_model / num_heads is even, or model.positions: learned",
            )
        self.causal = causal
        self.dropout = dropout
        self.num_layers = num_layers
        self.qk_norm = config.qk_norm
        self.rope = RotaryEmbedding(self.head_dim, rope_theta) if rope_theta is not None else None

        heads = num_heads + 2 * self.num_kv_heads
        self.w_qkv = nn.Linear(d_model, heads * self.head_dim, bias=config.bias)
        self.w_o = nn.Linear(d_model, d_model, bias=config.bias)
        if self.qk_norm:
            self.q_gain = nn.Parameter(torch.empty(self.head_dim))
            self.k_gain = nn.Parameter(torch.empty(self.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights: std 0.02, the output projection's less by sqrt(2 * num_layers), as in GPT-2."""
        nn.init.normal_(self.w_qkv.weight, std=0.02)
        nn.init.normal_(self.w_o.weight, std=0.02 / math.sqrt(2 * self.num_layers))
        for linear in (self.w_qkv, self.w_o):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.qk_norm:
            nn.init.ones_(self.q_gain)
            nn.init.ones_(self.k_gain)

    def make_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> PositionCache:
        """A cache for rotated keys and for values: 2 * K * Dh numbers per position."""
        shape = (self.num_kv_heads, self.head_dim)
        return PositionCache(batch_size, max_length, {"keys": shape, "values": shape}, device=device, dtype=dtype)

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs per token at a context of `length` tokens, all of which count, as in a full score matrix."""
        return 2 * (self.w_qkv.weight.numel() + self.w_o.weight.numel()) + 4 * self.d_model * length

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        context: AttentionContext | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `AttentionProvider`. Cross-attention rotates its keys by their own index."""
        context = context or AttentionContext()
        check_request(self.name, query, key, causal=self.causal, context=context)
        cache = context.cache
        assert cache is None or isinstance(cache, PositionCache)
        crosses = key is not query
        holds_keys = crosses and cache is not None and cache.length > 0
        start = cache.length if cache is not None and not crosses else 0
        T = query.shape[1]

        if holds_keys:
            assert cache is not None
            q_BTHd = self._project_query(query)
            k_BSKd, v_BSKd = cache.read("keys", query), cache.read("values", query)
        else:
            q_BTHd, k_BSKd, v_BSKd = self._project(query, key, value)
        if self.rope is not None:
            q_turns = self.rope.turns(context.positions, start, start + T, query)
            q_BTHd = rotate(q_BTHd, q_turns)
            if not holds_keys:
                k_BSKd = rotate(k_BSKd, self.rope.turns(None, 0, key.shape[1], key) if crosses else q_turns)
        if self.qk_norm:
            # A score knows no more than the product of both gains, and the keys are the fewer.
            q_BTHd = rms_norm(q_BTHd)
            if not holds_keys:
                k_BSKd = rms_norm(k_BSKd) * (self.q_gain * self.k_gain).to(k_BSKd.dtype)

        documents_BT = documents_BS = context.document_ids
        if cache is not None and not holds_keys:
            documents_BS = cache.write_documents(documents_BT)
            k_BSKd, v_BSKd = cache.write("keys", k_BSKd), cache.write("values", v_BSKd)
            cache.advance(key.shape[1])
        limits = Limits(attn_mask, key_padding_mask, documents_BT, documents_BS)
        out_BTHd, weights_BHTS = self.mix(q_BTHd, k_BSKd, v_BSKd, limits, need_weights=context.need_weights)
        return self.w_o(out_BTHd.flatten(2)), weights_BHTS

    def mix(
        self, q_BTHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, limits: Limits, *, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The values, mixed as queries and keys score: what `forward` does between its projections.

        Args:
            q_BTHd, k_BSKd, v_BSKd: rotated and normed; if causal, the queries are the last T of the S positions.
            limits: what restricts who sees whom beside `self.causal`.
            need_weights: whether to return the weights as well.

        Returns:
            The output [B, T, H, Dh], zeros where a row sees nothing; the weights [B, H, T, S] or None.

        Raises:
            ProviderError: a mask does not fit.
        """
        mask = build_mask(q_BTHd.shape[1], k_BSKd.shape[1], q_BTHd, causal=self.causal, **limits._asdict())
        out_BHTd, weights_BHTS = attend(
            q_BTHd.transpose(1, 2),
            k_BSKd.transpose(1, 2),
            v_BSKd.transpose(1, 2),
            mask,
            dropout=self.dropout if self.training else 0.0,
            need_weights=need_weights,
        )
        return out_BHTd.transpose(1, 2), weights_BHTS

    def _project_query(self, query: Tensor) -> Tensor:
        """Queries alone, [B, T, H, Dh]."""
        bias = None if self.w_qkv.bias is None else self.w_qkv.bias[: self.d_model]
        q_BTD = F.linear(query, self.w_qkv.weight[: self.d_model], bias)
        q_BTHd: Tensor = q_BTD.unflatten(-1, (self.num_heads, -1))
        return q_BTHd

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, Dh], keys and values [B, S, K, Dh]; one product where all three come from one tensor."""
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        if query is key and key is value:
            qkv = self.w_qkv(query).unflatten(-1, (-1, self.head_dim))
            q, k, v = qkv.split(heads, dim=2)
            return q, k, v
        sizes = [count * self.head_dim for count in heads]
        weights = self.w_qkv.weight.split(sizes)
        biases = self.w_qkv.bias.split(sizes) if self.w_qkv.bias is not None else (None, None, None)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (-1, self.head_dim))
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        return q, k, v


class MHAAttention(AttentionProvider):
    """Multi-head and grouped-query attention with RoPE on the fused kernels."""

    Config = MHAConfig
    Layer: ClassVar[type[MHAAttentionLayer]] = MHAAttentionLayer
    weights_layout = "mha"

    def get_name(self) -> str:
        return "mha"

    def get_version(self) -> str:
        return "1.0.0"

    def create_layer(
        self,
        d_model: int,
        num_heads: int,
        *,
        causal: bool = True,
        dropout: float = 0.0,
        num_layers: int = 1,
        rope_theta: float | None = 10_000.0,
        **config: Any,
    ) -> MHAAttentionLayer:
        return self.Layer(
            d_model,
            num_heads,
            self.config,
            causal=causal,
            dropout=dropout,
            num_layers=num_layers,
            rope_theta=rope_theta,
        )


__all__ = ["MHAAttention", "MHAAttentionLayer", "MHAConfig"]
