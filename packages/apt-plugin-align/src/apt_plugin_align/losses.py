"""The two losses between the model's state and the stable one. Both are zero, and have no gradient, where they agree.

B batch, T length, V vocabulary, D width, N = B T tokens, G groups of C tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NO_TARGET = -100
"""The target of a position that takes no part."""


def kl_divergence(logits_BTV: Tensor, stable_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """KL(stable's predictions || the model's), nats per token, 0-d fp32: distillation (Hinton et al. 2015) from the
    stable state, as mean teachers do it (Tarvainen & Valpola 2017).

    Args:
        logits_BTV: the model's, with their graph.
        stable_BTV: the stable state's, without one.
        targets_BT: int64; positions of -100 take no part.
    """
    log_p_BTV, log_q_BTV = stable_BTV.float().log_softmax(-1), logits_BTV.float().log_softmax(-1)
    kl_BT = F.kl_div(log_q_BTV, log_p_BTV, reduction="none", log_target=True).sum(-1)
    return _mean(kl_BT, targets_BT != NO_TARGET)


def contrast(hidden_BTD: Tensor, stable_BTD: Tensor, targets_BT: Tensor, tau: float, group_size: int) -> Tensor:
    """Token-level InfoNCE of the model's hidden states against the stable ones, nats per token, 0-d fp32.

    Each token of the model is to be found among the stable state's tokens k: its scores are cosines over `tau`. Plain
    InfoNCE (van den Oord et al. 2018, eq. 4) wants all of the probability on its own position, and so pushes apart
    tokens that are alike. Here the target is how the stable state itself finds the token (Zheng et al. 2021, "ReSSL",
    eq. 4): its own position is still the likeliest one, for the cosine there is 1.

        q_tj = softmax_j(cos(hidden_t, k_j) / tau)    p_tj = softmax_j(cos(k_t, k_j) / tau)    loss_t = KL(p_t || q_t)

    So that the cost grows as N and not as N^2, more than `group_size` tokens are dealt out into groups of at most that
    size, one to each in turn, and a token is sought in its own group.

    Args:
        hidden_BTD: the model's, with their graph.
        stable_BTD: the stable state's, without one.
        targets_BT: int64; positions of -100 take no part, neither as queries nor as keys.
        tau: the temperature.
        group_size: C.
    """
    taking_part_N = (targets_BT != NO_TARGET).flatten()
    groups = -(-len(taking_part_N) // group_size)
    taking_part_GC = _deal(taking_part_N[:, None], groups).squeeze(-1)
    # Under autocast the products would be in bf16, whose cosines have two digits.
    with torch.autocast(hidden_BTD.device.type, enabled=False):
        query_GCD, key_GCD = (
            F.normalize(_deal(x_BTD.flatten(0, 1).float(), groups), dim=-1) for x_BTD in (hidden_BTD, stable_BTD)
        )
        log_q_GCC, log_p_GCC = (
            (x_GCD @ key_GCD.mT / tau)
            .masked_fill(~taking_part_GC[:, None, :], torch.finfo(torch.float32).min)
            .log_softmax(-1)
            for x_GCD in (query_GCD, key_GCD)
        )
        kl_GC = F.kl_div(log_q_GCC, log_p_GCC, reduction="none", log_target=True).sum(-1)
    return _mean(kl_GC, taking_part_GC)


def _deal(x_Nx: Tensor, groups: int) -> Tensor:
    """[N, x] to [G, C, x]: row i goes to group i mod G; the last rows are filled up with zeros, or False."""
    size = -(-len(x_Nx) // groups)
    filled_up: Tensor = F.pad(x_Nx, (0, 0, 0, size * groups - len(x_Nx)))
    return filled_up.view(size, groups, -1).transpose(0, 1)


def _mean(values: Tensor, taking_part: Tensor) -> Tensor:
    """The mean over what takes part; zero if nothing does."""
    return (values * taking_part).sum() / taking_part.sum().clamp(min=1)
