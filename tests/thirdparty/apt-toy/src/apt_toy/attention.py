"""Differential attention (Ye et al., "Differential Transformer", 2024, section 2.1): the difference of two softmaxes,
in which what both attend to for no reason cancels out."""

import math
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn import functional as F

from apt.api import ConfigError
from apt.core.providers.attention import AttentionContext, AttentionProvider
from apt.modeling.layers.checks import check_request
from apt.modeling.layers.kv_cache import PositionCache
from apt.modeling.layers.masks import build_mask, masked_softmax
from apt.modeling.layers.norm import rms_norm
from apt.modeling.layers.rope import RotaryEmbedding, rotate


class DifferentialConfig(BaseModel):
    """The section `model.toy_diff` of a profile."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    lambda_init: float = Field(0.8, gt=0, lt=1)
    """How much of the second softmax is taken away at the beginning; a constant does as well as one by depth (3.8)."""


class DifferentialAttention(AttentionProvider):
    """softmax(q1 k1) - lambda softmax(q2 k2), lambda learned; in training each layer's joins the metrics."""

    Config = DifferentialConfig
    expected_failures: ClassVar = {
        "dropout_keeps_the_mean": "each head is normed behind its weights, which undoes the scale of a dropout"
    }

    def __init__(self, config=None):
        super().__init__(config)
        self._layers = []

    def get_name(self):
        return "toy_diff"

    def get_version(self):
        return "0.1.0"

    def create_layer(
        self, d_model, num_heads, *, causal=True, dropout=0.0, num_layers=1, rope_theta=10_000.0, **config
    ):
        layer = DifferentialAttentionLayer(d_model, num_heads, self.config, causal, dropout, rope_theta)
        layer.reset_parameters(num_layers)
        return layer

    def on_model_built(self, model):
        self._layers = [module for module in model.modules() if isinstance(module, DifferentialAttentionLayer)]

    def on_step_end(self, trainer):
        for index, layer in enumerate(self._layers):
            trainer.extra_metrics[f"toy_lambda.{index}"] = layer.mixing().detach()


class DifferentialAttentionLayer(nn.Module):
    """H heads of two queries and two keys of size d = D / 2H each, and of one value of size 2d."""

    capabilities = frozenset({"cache", "documents", "cross_attention"})

    def __init__(self, d_model, num_heads, config, causal, dropout, rope_theta):
        super().__init__()
        if d_model % (2 * num_heads):
            fits = [heads for heads in range(1, d_model // 2 + 1) if d_model % (2 * heads) == 0]
            raise ConfigError(
                f"toy_diff: d_model {d_model} is not divisible by twice num_heads {num_heads}",
                hint=f"heads that fit: {', '.join(map(str, fits))}",
            )
        self.d_model, self.num_heads, self.size = d_model, num_heads, d_model // (2 * num_heads)
        if rope_theta is not None and self.size % 2:
            raise ConfigError(f"toy_diff: queries of size {self.size} cannot be rotated", hint="choose fewer heads")
        self.lambda_init, self.causal, self.dropout = config.lambda_init, causal, dropout
        self.rope = None if rope_theta is None else RotaryEmbedding(self.size, rope_theta)
        self.w_q, self.w_k, self.w_v, self.w_o = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.gain = nn.Parameter(torch.empty(2 * self.size))
        self.lambdas = nn.Parameter(torch.empty(4, self.size))

    def reset_parameters(self, num_layers):
        for linear in (self.w_q, self.w_k, self.w_v):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.normal_(self.w_o.weight, std=0.02 / math.sqrt(2 * num_layers))
        nn.init.ones_(self.gain)
        nn.init.normal_(self.lambdas, std=0.1)

    def mixing(self):
        """lambda = exp(lq1 lk1) - exp(lq2 lk2) + lambda_init, equation 3."""
        q1, k1, q2, k2 = self.lambdas
        return (q1 @ k1).exp() - (q2 @ k2).exp() + self.lambda_init

    def make_cache(self, batch_size, max_length, *, device=None, dtype=None):
        shapes = {"keys": (2 * self.num_heads, self.size), "values": (self.num_heads, 2 * self.size)}
        return PositionCache(batch_size, max_length, shapes, device=device, dtype=dtype)

    def forward(self, query, key, value, attn_mask=None, key_padding_mask=None, *, context=None):
        context = context or AttentionContext()
        check_request("toy_diff", query, key, causal=self.causal, context=context)
        cache, T = context.cache, query.shape[1]
        start = 0 if cache is None else cache.length
        q_BTXd, k_BSXd = (x.unflatten(-1, (2 * self.num_heads, -1)) for x in (self.w_q(query), self.w_k(key)))
        v_BSHe = self.w_v(value).unflatten(-1, (self.num_heads, -1))
        if self.rope is not None:
            q_turns = k_turns = self.rope.turns(context.positions, start, start + T, query)
            if key is not query:
                k_turns = self.rope.turns(None, 0, key.shape[1], key)
            q_BTXd, k_BSXd = rotate(q_BTXd, q_turns), rotate(k_BSXd, k_turns)
        documents_BT = documents_BS = context.document_ids
        if cache is not None:
            documents_BS = cache.write_documents(documents_BT)
            k_BSXd, v_BSHe = cache.write("keys", k_BSXd), cache.write("values", v_BSHe)
            cache.advance(T)
        mask = build_mask(
            T,
            k_BSXd.shape[1],
            q_BTXd,
            causal=self.causal,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            query_documents_BT=documents_BT,
            key_documents_BS=documents_BS,
        )
        scores_BXTS = q_BTXd.transpose(1, 2) @ k_BSXd.transpose(1, 2).mT / math.sqrt(self.size)
        one_BHTS, two_BHTS = masked_softmax(scores_BXTS, mask).chunk(2, dim=1)
        weights_BHTS = F.dropout(one_BHTS - self.mixing() * two_BHTS, self.dropout, self.training)
        out_BHTe = rms_norm(weights_BHTS @ v_BSHe.transpose(1, 2)) * (self.gain * (1 - self.lambda_init))
        return self.w_o(out_BHTe.transpose(1, 2).flatten(2)), None
