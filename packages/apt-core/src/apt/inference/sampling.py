"""From next-token logits to a token."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from apt.core.errors import ConfigError

BLOCK = 64
"""Numbers that are drawn at once."""


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling`, as keyword arguments."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: the repetition penalty first, then temperature, top_k, top_p and min_p."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens alone."""
    top_p: float | None = None
    """Keep the smallest set of likeliest tokens whose probabilities sum to p (nucleus sampling, Holtzman et al. 2020,
    section 3.1)."""
    min_p: float | None = None
    """Keep the tokens that are at least p times as likely as the likeliest (Nguyen et al. 2024, section 3)."""
    repetition_penalty: float = 1.0
    """Divides the logits above zero, and multiplies those below, of tokens that are in the text already (Keskar et al.
    2019, section 4.1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}", hint="use 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}", hint="use 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}", hint="use more than 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is {self.min_p}", hint="use 0 to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty is {self.repetition_penalty}", hint="use more than 0; 1 is none")


class Draws:
    """The numbers that chance decides by: for each stream and each place in the text, one that depends on nothing else.

    So a text does not depend on what is generated beside it.

    Args:
        seed: of the stream, 0 to 2**64 - 1.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._streams: dict[int, np.random.Generator] = {}
        self._drawn: dict[int, list[float]] = {}

    def at(self, place: int, stream: int = 0) -> float:
        """The number, at least 0 and below 1, for the token number `place` of `stream`."""
        drawn = self._drawn.setdefault(stream, [])
        while len(drawn) <= place:
            generator = self._streams.setdefault(stream, np.random.default_rng((self.seed, stream)))
            drawn += generator.random(BLOCK).tolist()
        return drawn[place]


def seed_of_row(seed: int | None, row: int) -> int:
    """The seed of one text among those that are generated together; a new one each time if `seed` is None.

    Raises:
        ConfigError: the seed is out of range.
    """
    if seed is None:
        return secrets.randbits(63)
    if not 0 <= seed < 2**63:
        raise ConfigError(f"the seed is {seed}", hint="use 0 to 2**63 - 1")
    return seed + row


def sample(logits_BV: Tensor, sampling: Sampling, draws_B: Sequence[float], tokens_BT: Tensor | None = None) -> Tensor:
    """Choose one token for each row.

    Args:
        logits_BV: scores; -inf for what cannot be chosen.
        draws_B: one number for each row, at least 0 and below 1: where in the distribution the choice falls.
        tokens_BT: int64, the text so far, for the repetition penalty.

    Returns:
        int64 [B].
    """
    if sampling.repetition_penalty != 1 and tokens_BT is not None:
        logits_BV = _penalised(logits_BV, tokens_BT, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = _truncated(logits_BV.float() / sampling.temperature, sampling)
    # In float32 a sum over a large vocabulary would leave out the rarest tokens; Apple's GPUs have nothing better.
    exact = torch.float32 if logits_BV.device.type == "mps" else torch.float64
    cumulative_BV = logits_BV.softmax(dim=-1, dtype=exact).cumsum(dim=-1)
    place_B1 = torch.tensor(draws_B, dtype=exact, device=logits_BV.device)[:, None] * cumulative_BV[:, -1:]
    # The first token whose sum is above the place: one of probability 0 adds nothing and is never the first.
    return torch.searchsorted(cumulative_BV, place_B1, right=True).squeeze(-1)


def _penalised(logits_BV: Tensor, tokens_BT: Tensor, penalty: float) -> Tensor:
    seen_BT = logits_BV.gather(1, tokens_BT)
    return logits_BV.scatter(1, tokens_BT, torch.where(seen_BT > 0, seen_BT / penalty, seen_BT * penalty))


def _truncated(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """-inf where top_k, top_p or min_p leave a token out; the likeliest always stays."""
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        probabilities_BV = sorted_BV.softmax(dim=-1)
        # A token stays if the likelier ones have not reached p without it.
        outside_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV >= sampling.top_p
        logits_BV = logits_BV.masked_fill(outside_BV.scatter(-1, order_BV, outside_BV), -torch.inf)
    if sampling.min_p:
        least_B1 = logits_BV.max(dim=-1, keepdim=True).values + math.log(sampling.min_p)
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    return logits_BV
