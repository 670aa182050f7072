"""Causal linear attention (Katharopoulos et al. 2020): a running sum of key-value products instead of a softmax."""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn import functional as F

from apt.core.providers.attention import AttentionProvider


class LinearConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    eps: float = Field(1e-6, gt=0)


class LinearAttention(AttentionProvider):
    Config = LinearConfig

    def get_name(self):
        return "toy_linear"

    def get_version(self):
        return "0.1.0"

    def create_layer(self, d_model, num_heads, *, causal=True, dropout=0.0, **config):
        return LinearAttentionLayer(d_model, num_heads, self.config.eps)


class LinearAttentionLayer(nn.Module):
    """Takes the five standard arguments alone: full passes, no cache."""

    def __init__(self, d_model, num_heads, eps):
        super().__init__()
        self.d_model, self.num_heads, self.eps = d_model, num_heads, eps
        self.w_in = nn.Linear(d_model, 3 * d_model, bias=False)
        self.w_out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, query, key, value, attn_mask=None, key_padding_mask=None):
        q_BHTK, k_BHTK, v_BHTK = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.w_in(query).chunk(3, dim=-1)
        )
        q_BHTK, k_BHTK = F.elu(q_BHTK) + 1, F.elu(k_BHTK) + 1
        state_BHTKV = torch.einsum("bhtk,bhtv->bhtkv", k_BHTK, v_BHTK).cumsum(dim=2)
        top = torch.einsum("bhtk,bhtkv->bhtv", q_BHTK, state_BHTKV)
        bottom = torch.einsum("bhtk,bhtk->bht", q_BHTK, k_BHTK.cumsum(dim=2))
        out = top / (bottom + self.eps)[..., None]
        return self.w_out(out.transpose(1, 2).flatten(2)), None
