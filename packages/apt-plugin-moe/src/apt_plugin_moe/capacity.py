"""Which experts a token visits when an expert takes only so many.

Tokens choose in the order of their positions, the sequences of a batch taking turns: the tokens at position 0 first,
then those at position 1, ... Each takes the best experts that still have room. So what a token gets depends on
no later token: capacity does not leak the future into the past, as it does where experts prefer the highest scores.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Assignment(NamedTuple):
    """What one batch came to."""

    experts_Nk: Tensor
    """int64 [N, k]: each token's experts, the best first."""
    kept_Nk: Tensor | None
    """bool [N, k]: False where a choice found no room; None where every one did."""
    demand_E: Tensor
    """int64 [E]: how many tokens have each expert among their best k, room or not."""
    overflow: Tensor | None
    """0-d int64: choices that their expert had no room for; None where none was."""


def places(tokens: int, top_k: int, experts: int, capacity: float) -> int:
    """How many tokens one expert takes in a batch of `tokens`."""
    return max(math.ceil(capacity * tokens * top_k / experts), 1)


@torch.no_grad()
def assign(scores_BTE: Tensor, top_k: int, limit: int | None, overflow: str) -> Assignment:
    """Choose the experts of every token.

    Args:
        scores_BTE: [B, T, E], higher is better; no NaN.
        limit: most tokens per expert; None for no limit.
        overflow: "next": what is turned away goes to the token's next-best expert with room. If `limit` is
            at least B T k / E every token finds one at least; it may find fewer than k. "drop": it goes nowhere.

    Returns:
        The assignment, N = B T tokens in the order of [B, T].
    """
    batch, length, experts = scores_BTE.shape
    chosen_NK = _best(scores_BTE.flatten(0, 1), top_k)[1]
    demand_E = chosen_NK.flatten().bincount(minlength=experts)
    if limit is None or limit >= batch * length or not bool((demand_E > limit).any()):
        return Assignment(chosen_NK, None, demand_E, None)
    turned_away = (demand_E - limit).clamp_min(0).sum()

    # In the order of choosing, rows are (position, sequence).
    scores_NE, chosen_NK = scores_BTE.transpose(0, 1).flatten(0, 1), _turned(chosen_NK, batch)
    choose = _drop if overflow == "drop" else _next_best
    chosen_NK, kept_NK = choose(scores_NE, chosen_NK, limit)
    chosen_NK, kept_NK = _turned(chosen_NK, length), _turned(kept_NK, length)
    return Assignment(chosen_NK, None if bool(kept_NK.all()) else kept_NK, demand_E, turned_away)


def _turned(rows: Tensor, outer: int) -> Tensor:
    """Rows in the order (i, j), i < `outer`, as rows in the order (j, i)."""
    return rows.view(outer, -1, rows.shape[1]).transpose(0, 1).flatten(0, 1)


def _drop(scores_NE: Tensor, chosen_NK: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    asked_NE = torch.zeros_like(scores_NE, dtype=torch.int32).scatter_(1, chosen_NK, 1)
    return chosen_NK, (asked_NE.cumsum(0) <= limit).gather(1, chosen_NK)


def _next_best(scores_NE: Tensor, chosen_NK: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """One token after the other taking the best that is left, found without a loop over tokens.

    Every token asks its best experts; an expert keeps the first `limit` that ask, in the order of choosing, and turns
    the others away for good; those ask their next-best. Where all experts share one order of preference, this ends in
    what choosing one after the other gives (Gale and Shapley, 1962: the stable matching, here the only one).
    """
    top_k, experts = chosen_NK.shape[1], scores_NE.shape[1]
    left_NE = scores_NE.clone()
    kept_NK = torch.ones_like(chosen_NK, dtype=torch.bool)
    while True:
        # What has no expert asks number E, which does not exist.
        asking_NK = chosen_NK.masked_fill(~kept_NK, experts)
        full_F = (asking_NK.flatten().bincount(minlength=experts + 1)[:experts] > limit).nonzero()[:, 0]
        if not len(full_F):
            return chosen_NK, kept_NK
        asked_NF = (asking_NK[:, :, None] == full_F).any(1)
        refused_NF = asked_NF & (asked_NF.cumsum(0, dtype=torch.int32) > limit)
        left_NE[:, full_F] = left_NE[:, full_F].masked_fill(refused_NF, -math.inf)
        rows = refused_NF.any(1).nonzero()[:, 0]
        values, chosen_NK[rows] = _best(left_NE[rows], top_k)
        kept_NK[rows] = values > -math.inf


def _best(scores_NE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row and where they are, the highest first; where fewer than k are above -inf, the places
    of the rest mean nothing."""
    if scores_NE.device.type != "cpu" or k > 4:
        best = scores_NE.topk(k, dim=-1)
        return best.values, best.indices
    # On CPUs `topk` takes several times as long as finding the highest, for the few that routers want.
    values, indices = [], []
    for _ in range(k):
        highest = scores_NE.max(dim=-1, keepdim=True)
        values.append(highest.values)
        indices.append(highest.indices)
        scores_NE = scores_NE.scatter(1, highest.indices, -math.inf)
    return torch.cat(values, dim=-1), torch.cat(indices, dim=-1)
