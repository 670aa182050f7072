"""Plain correct providers of the kinds that build or change models, written so that a mutant can change one thing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from apt.core.errors import ConfigError, ProviderError
from apt.core.providers.align import AlignProvider
from apt.core.providers.attention import AttentionContext, AttentionProvider
from apt.core.providers.ffn import FFNProvider
from apt.core.providers.quant import QuantProvider
from apt.core.providers.router import RouterProvider
from apt.core.registry import Provider


class Plain(Provider):
    """A name, a version, and a config without keys."""

    class Config(BaseModel):
        model_config = ConfigDict(extra="forbid")

    def get_name(self) -> str:
        return "plain"

    def get_version(self) -> str:
        return "1.0"


# Attention


class PlainCache:
    """Rotated keys, values and document ids."""

    def __init__(self, batch: int, room: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.length = 0
        self.room = room
        self.k = torch.zeros(batch, room, heads, head_dim, dtype=dtype)
        self.v = torch.zeros(batch, room, heads, head_dim, dtype=dtype)
        self.documents = torch.zeros(batch, room, dtype=torch.int64)

    def truncate(self, length: int) -> None:
        self.length = min(length, self.length)

    def select_rows(self, rows_B: Tensor) -> None:
        self.k, self.v, self.documents = self.k[rows_B], self.v[rows_B], self.documents[rows_B]


class PlainAttentionLayer(nn.Module):
    """Grouped-query attention with rotary positions, step by step."""

    capabilities = frozenset({"cache", "documents", "cross_attention", "cross_cache", "weights"})
    Cache: ClassVar[type[PlainCache]] = PlainCache

    def __init__(self, d_model: int, num_heads: int, causal: bool, dropout: float, rope_theta: float | None) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ConfigError(f"d_model {d_model} is not divisible by num_heads {num_heads}")
        self.d_model, self.num_heads, self.head_dim = d_model, num_heads, d_model // num_heads
        self.kv_heads = num_heads // 2
        self.causal, self.dropout, self.theta = causal, dropout, rope_theta
        self.w_qkv = nn.Linear(d_model, (num_heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.w_o = nn.Linear(d_model, d_model, bias=False)

    def make_cache(self, batch_size: int, max_length: int, *, device: Any = None, dtype: Any = None) -> PlainCache:
        return self.Cache(batch_size, max_length, self.kv_heads, self.head_dim, dtype)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        context: AttentionContext | None = None,
    ) -> Any:
        context = context or AttentionContext()
        cache: Any = context.cache
        crosses = key is not query
        start = 0 if cache is None or crosses else cache.length
        q_BTHd, k_BSKd, v_BSKd = self.project(query, key, value)
        q_BTHd = self.rotate(q_BTHd, self.positions(context, start, query))
        k_BSKd = self.rotate(k_BSKd, torch.arange(key.shape[1]) if crosses else self.positions(context, start, key))
        documents_BT = documents_BS = context.document_ids
        if crosses and cache is not None and cache.length:
            k_BSKd, v_BSKd = self.recall(cache)
        elif cache is not None:
            k_BSKd, v_BSKd, documents_BS = self.remember(cache, k_BSKd, v_BSKd, documents_BT)
        T, S = query.shape[1], k_BSKd.shape[1]
        scores_BHTS = self.scores(q_BTHd.transpose(1, 2), self.spread(k_BSKd))
        blocked, added = self.masks(T, S, attn_mask, key_padding_mask, documents_BT, documents_BS)
        weights_BHTS = self.softmax(scores_BHTS + added, blocked)
        out_BHTd = self.drop(weights_BHTS) @ self.spread(v_BSKd)
        out_BTD = self.out(self.merge(out_BHTd))
        return out_BTD, weights_BHTS if context.need_weights else None

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [heads * self.head_dim for heads in (self.num_heads, self.kv_heads, self.kv_heads)]
        w_q, w_k, w_v = self.w_qkv.weight.split(sizes)
        q, k, v = (F.linear(x, w) for x, w in ((query, w_q), (key, w_k), (value, w_v)))
        return tuple(x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))  # type: ignore[return-value]

    def positions(self, context: AttentionContext, start: int, x: Tensor) -> Tensor:
        return torch.arange(start, start + x.shape[1]) if context.positions is None else context.positions

    def rotate(self, x_BTHd: Tensor, positions: Tensor) -> Tensor:
        if self.theta is None:
            return x_BTHd
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64)
        angles = positions[..., None, None].to(torch.float64) * self.theta ** (-pairs / self.head_dim)
        cos, sin = angles.cos().to(x_BTHd.dtype), angles.sin().to(x_BTHd.dtype)
        a, b = x_BTHd[..., 0::2], x_BTHd[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    def remember(self, cache: Any, k: Tensor, v: Tensor, documents: Tensor | None) -> tuple[Any, Any, Any]:
        start, stop = cache.length, cache.length + k.shape[1]
        if stop > cache.room:
            raise ProviderError(f"there is room for {cache.room} positions")
        cache.k[:, start:stop], cache.v[:, start:stop] = k, v
        if documents is not None:
            cache.documents[:, start:stop] = documents
        cache.length = stop
        return cache.k[:, :stop].to(k.dtype), cache.v[:, :stop].to(v.dtype), cache.documents[:, :stop]

    def recall(self, cache: Any) -> tuple[Tensor, Tensor]:
        return cache.k[:, : cache.length], cache.v[:, : cache.length]

    def spread(self, x_BSKd: Tensor) -> Tensor:
        return x_BSKd.repeat_interleave(self.num_heads // self.kv_heads, 2).transpose(1, 2)

    def scores(self, q_BHTd: Tensor, k_BHSd: Tensor) -> Tensor:
        return q_BHTd @ k_BHSd.mT / math.sqrt(self.head_dim)

    def future(self, T: int, S: int) -> Tensor:
        return torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)

    def masks(
        self, T: int, S: int, attn_mask: Any, padding: Any, documents_BT: Any, documents_BS: Any
    ) -> tuple[Tensor, Tensor]:
        """What is blocked, and what is added to the scores, both broadcastable to [B, H, T, S]."""
        blocked, added = torch.zeros(1, 1, T, S, dtype=torch.bool), torch.zeros(1, 1, T, S)
        if self.causal:
            blocked = blocked | self.future(T, S)
        for mask in (attn_mask, padding):
            if mask is not None:
                wide = mask[:, None, None, :] if mask is padding else self.widen(mask)
                if mask.dtype == torch.bool:
                    blocked = blocked | wide
                else:
                    blocked, added = blocked | (wide == -math.inf), added + wide.masked_fill(wide == -math.inf, 0)
        if documents_BT is not None:
            blocked = blocked | (documents_BT[:, None, :, None] != documents_BS[:, None, None, :])
        return blocked, added.to(self.w_o.weight.dtype)

    def widen(self, attn_mask: Tensor) -> Tensor:
        return attn_mask.unsqueeze(1) if attn_mask.dim() == 3 else attn_mask

    def softmax(self, scores_BHTS: Tensor, blocked: Tensor) -> Tensor:
        blind = blocked.all(-1, keepdim=True)
        weights = scores_BHTS.masked_fill(blocked & ~blind, -math.inf).softmax(-1)
        return weights.masked_fill(blind, 0)

    def drop(self, weights: Tensor) -> Tensor:
        return F.dropout(weights, self.dropout, self.training)

    def merge(self, out_BHTd: Tensor) -> Tensor:
        return out_BHTd.transpose(1, 2).flatten(2)

    def out(self, x_BTD: Tensor) -> Tensor:
        return self.w_o(x_BTD)


class PlainAttention(Plain, AttentionProvider):
    weights_layout = "mha"
    Layer: ClassVar[type[nn.Module]] = PlainAttentionLayer

    def create_layer(
        self,
        d_model: int,
        num_heads: int,
        *,
        causal: bool = True,
        dropout: float = 0.0,
        rope_theta: float | None = 10_000.0,
        **config: Any,
    ) -> nn.Module:
        return self.Layer(d_model, num_heads, causal, dropout, rope_theta)


# FFN


class PlainFFNLayer(nn.Module):
    def __init__(self, d_model: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.d_model, self.rate = d_model, dropout
        self.up, self.down = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Any:
        return F.dropout(self.down(F.gelu(self.up(x))), self.rate, self.training)


class PlainFFN(Plain, FFNProvider):
    Layer: ClassVar[type[nn.Module]] = PlainFFNLayer

    def create_layer(self, d_model: int, d_ff: int, *, dropout: float = 0.0, **config: Any) -> nn.Module:
        return self.Layer(d_model, d_ff, dropout)


# Router


class PlainMoE(nn.Module):
    """Every expert computes every token, and the two best are weighed: nothing to go wrong in a dispatch."""

    EXPERTS = 4

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.d_model = base.d_model
        self.experts = nn.ModuleList([self.copy_of(base) for _ in range(self.EXPERTS)])
        self.router = nn.Linear(base.d_model, self.EXPERTS, bias=False, device=next(base.parameters()).device)

    def copy_of(self, base: nn.Module) -> nn.Module:
        import copy

        return copy.deepcopy(base)

    def forward(self, x_BTD: Tensor) -> Any:
        probs_BTE = self.router(x_BTD).softmax(-1)
        chosen_BTE = self.choose(probs_BTE)
        gates_BTE = self.gates(probs_BTE * chosen_BTE)
        each = [result[0] if isinstance(result := e(x_BTD), tuple) else result for e in self.experts]
        out_BTD = (torch.stack(each, -2) * gates_BTE[..., None]).sum(-2)
        return out_BTD, self.aux(probs_BTE, chosen_BTE)

    def choose(self, probs_BTE: Tensor) -> Tensor:
        return torch.zeros_like(probs_BTE).scatter(-1, probs_BTE.topk(2, -1).indices, 1.0)

    def gates(self, chosen_BTE: Tensor) -> Tensor:
        return chosen_BTE / chosen_BTE.sum(-1, keepdim=True)

    def aux(self, probs_BTE: Tensor, chosen_BTE: Tensor) -> Tensor:
        load_E = chosen_BTE.mean((0, 1))
        return 0.01 * self.EXPERTS * (load_E * probs_BTE.mean((0, 1))).sum()


class PlainRouter(Plain, RouterProvider):
    Layer: ClassVar[type[nn.Module]] = PlainMoE

    def wrap_ffn(self, base_ffn: nn.Module, config: Mapping[str, Any]) -> nn.Module:
        return self.Layer(base_ffn)


# Align


class PlainAlign(Plain, AlignProvider):
    """KL(stable || model), a mean over the positions with a target."""

    def compute_align_loss(self, logits: Tensor, targets: Tensor, model_state: Mapping[str, Any]) -> Tensor:
        stable = model_state.get("stable")
        if stable is None:
            return logits.new_zeros(())
        kl_BT = F.kl_div(
            self.log_probs(logits), self.log_probs(stable["logits"]), reduction="none", log_target=True
        ).sum(-1)
        return self.mean(kl_BT, self.mask(targets))

    def log_probs(self, logits: Tensor) -> Tensor:
        return logits.float().log_softmax(-1)

    def mask(self, targets: Tensor) -> Tensor:
        return targets != -100

    def mean(self, kl_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return (kl_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1)


# Quant


class PlainQuantLinear(nn.Module):
    """Eight bits for each weight and a scale for each row."""

    q: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach()
        scale_O1 = self.scale_of(weight_OI)
        self.register_buffer("q", self.rounded(weight_OI / scale_O1))
        self.register_buffer("scale", scale_O1)
        self.bias = linear.bias

    def scale_of(self, weight_OI: Tensor) -> Tensor:
        return weight_OI.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127

    def rounded(self, ratio_OI: Tensor) -> Tensor:
        return ratio_OI.round().clamp(-127, 127).to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.q.to(x.dtype) * self.scale, self.bias)


class PlainQuant(Plain, QuantProvider):
    Linear: ClassVar[type[nn.Module]] = PlainQuantLinear

    def quantize(self, model: nn.Module) -> nn.Module:
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    setattr(parent, name, self.Linear(child))
        return model

    def prepare(self, model: nn.Module) -> None:
        """Its rounding is so fine that training needs no preparation."""
