"""Attention: equality with softmax attention as it is defined, for providers that claim it by `weights_layout = "mha"`.

Written from the definitions, one head and one query at a time, and from no code of the layers under test:

    s_ts = q_t k_s / sqrt(Dh)      o_t = sum_s softmax_s(s_t + m_t)_s v_s      Vaswani et al. (2017), equation 1
    head h reads keys and values of head h // (H / K)                          Ainslie et al. (2023)
    dimensions 2i, 2i + 1 turn by p theta^(-2i / Dh) at position p             Su et al. (2021), equation 15
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from apt.core.providers.attention import AttentionContext
from apt.testing.check import check
from apt.testing.compare import require_equal
from apt.testing.subjects import AttentionSubject, B, T

ADVICE = (
    "look at the scale 1 / sqrt(Dh), at which head of keys a head of queries reads, at the order of q, k and v in "
    "w_qkv, and at the rotation, of pairs (2i, 2i + 1)"
)


def plain_attention(
    layer: Any,
    x_TD: Tensor,
    num_heads: int,
    *,
    positions_T: Tensor,
    theta: float | None = 10_000.0,
    causal: bool = True,
    blocked_TS: Tensor | None = None,
) -> Tensor:
    """The output [T, D] of one row by the definition, with the layer's weights in the layout "mha"."""
    length, d_model = x_TD.shape
    head_dim = d_model // num_heads
    qkv_TE = x_TD @ layer.w_qkv.weight.T
    if layer.w_qkv.bias is not None:
        qkv_TE = qkv_TE + layer.w_qkv.bias
    q_THd, rest_TXd = qkv_TE.unflatten(-1, (-1, head_dim)).tensor_split((num_heads,), dim=1)
    k_TKd, v_TKd = rest_TXd.chunk(2, dim=1)
    groups = num_heads // k_TKd.shape[1]
    out_THd = torch.zeros_like(q_THd)
    for h in range(num_heads):
        q_Td, k_Td, v_Td = q_THd[:, h], k_TKd[:, h // groups], v_TKd[:, h // groups]
        if theta is not None:
            q_Td, k_Td = _turned(q_Td, positions_T, theta), _turned(k_Td, positions_T, theta)
        if hasattr(layer, "q_gain"):
            q_Td, k_Td = _normed(q_Td) * layer.q_gain, _normed(k_Td) * layer.k_gain
        for t in range(length):
            seen = [s for s in range(length) if (s <= t or not causal) and (blocked_TS is None or not blocked_TS[t, s])]
            if seen:
                scores = k_Td[seen] @ q_Td[t] / math.sqrt(head_dim)
                out_THd[t, h] = scores.exp() / scores.exp().sum() @ v_Td[seen]
    out_TD: Tensor = out_THd.flatten(1) @ layer.w_o.weight.T
    if layer.w_o.bias is not None:
        out_TD = out_TD + layer.w_o.bias
    return out_TD


def _turned(x_Td: Tensor, positions_T: Tensor, theta: float) -> Tensor:
    out_Td = torch.empty_like(x_Td)
    d = x_Td.shape[1]
    for i in range(d // 2):
        angle_T = positions_T.to(x_Td.dtype) * theta ** (-2 * i / d)
        a, b = x_Td[:, 2 * i], x_Td[:, 2 * i + 1]
        out_Td[:, 2 * i] = a * angle_T.cos() - b * angle_T.sin()
        out_Td[:, 2 * i + 1] = a * angle_T.sin() + b * angle_T.cos()
    return out_Td


def _normed(x_Td: Tensor) -> Tensor:
    return x_Td / (x_Td.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@check("attention", needs="mha")
def equals_plain_softmax(subject: AttentionSubject) -> None:
    """A layer of the layout "mha" is causal softmax attention with rotary positions, exactly: checkpoints move between
    providers that name one layout, so they must be one function."""
    _compare(subject, "causal, with rotary positions")


@check("attention", needs="mha", may_refuse=True)
def equals_plain_softmax_under_masks(subject: AttentionSubject) -> None:
    """The same without causality and under masks, of which each row of the batch has its own: many keys of one query
    are blocked at once, as in real masks."""
    layer, x_BTD = subject.layer(causal=False), subject.x()
    blocked = torch.rand(B, T, T, generator=torch.Generator().manual_seed(8)) < 0.4
    blocked |= torch.eye(T, dtype=torch.bool).logical_not() & (torch.arange(T) == 2)
    blocked[:, range(T), range(T)] = False
    blocked = blocked.to(subject.device)
    out = subject.attend(layer, x_BTD, attn_mask=blocked)[0]
    for row in range(B):
        expected = plain_attention(
            layer,
            x_BTD[row],
            subject.num_heads,
            positions_T=torch.arange(T, device=subject.device),
            causal=False,
            blocked_TS=blocked[row],
        )
        require_equal(out[row], expected, "softmax attention without causality under a mask, by definition", ADVICE)


@check("attention", needs=("mha", "context"))
def equals_plain_softmax_at_positions(subject: AttentionSubject) -> None:
    """The same at positions that are given, far apart and large ones too: long contexts and packed documents have such,
    and a table of angles that is too short ends there."""
    positions = torch.tensor([0, 1, 2, 5, 60, 700, 5000], device=subject.device)
    _compare(subject, "at the positions 0, 1, 2, 5, 60, 700, 5000", positions)


@check("attention", needs="mha")
def equals_plain_softmax_without_rotation(subject: AttentionSubject) -> None:
    """The same with `rope_theta=None`, where the model adds learned positions: nothing may be rotated then."""
    _compare(subject, "with rope_theta=None", theta=None)


def _compare(
    subject: AttentionSubject, what: str, positions: Tensor | None = None, theta: float | None = 10_000.0
) -> None:
    layer, x_BTD = subject.layer(rope_theta=theta), subject.x()
    context = None if positions is None else AttentionContext(positions=positions)
    places_T = torch.arange(T, device=subject.device) if positions is None else positions
    out = subject.attend(layer, x_BTD, context=context)[0]
    for row in range(B):
        expected = plain_attention(layer, x_BTD[row], subject.num_heads, positions_T=places_T, theta=theta)
        require_equal(out[row], expected, f"softmax attention {what}, by definition", ADVICE)
