"""From next-token logits to a token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens alone."""
    top_p: float | None = None
    """Keep the smallest set of likeliest tokens whose probabilities sum to p (nucleus sampling, Holtzman et al. 2020,
    section 3.1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}", hint="use 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}", hint="use 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}", hint="use more than 0 and at most 1")


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Choose one token for each row; returns int64 [B]."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        probabilities_BV = sorted_BV.softmax(dim=-1)
        # A token stays if the likelier ones have not reached p without it; so the likeliest always stays.
        outside_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV >= sampling.top_p
        logits_BV = logits_BV.masked_fill(outside_BV.scatter(-1, order_BV, outside_BV), -torch.inf)
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator).squeeze(-1)
