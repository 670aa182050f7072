"""Who sees whom: the masks of the attention contract, made into what the fused kernels take, in this one place.

In a boolean mask True means *blocked*; a float mask is added to the scores. A row that sees nothing gives zeros.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from apt.core.errors import ProviderError


class Mask(NamedTuple):
    """What `attend` needs to know."""

    visible: Tensor | None = None
    """Broadcastable to [B, H, T, S]: bool, True where the key is seen, or float, added to the scores; or None."""
    causal: bool = False
    """Whether T == S and a position sees itself and what came before it: the kernels know that without a mask."""
    blind: Tensor | None = None
    """bool, broadcastable to [B, H, T, 1]: rows that see nothing; `visible` shows them everything, to stay finite."""


class Limits(NamedTuple):
    """What restricts who sees whom beside causality: the arguments of `build_mask` of these names."""

    attn_mask: Tensor | None = None
    key_padding_mask: Tensor | None = None
    query_documents_BT: Tensor | None = None
    key_documents_BS: Tensor | None = None


def build_mask(
    query_length: int,
    key_length: int,
    like: Tensor,
    *,
    causal: bool,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    query_documents_BT: Tensor | None = None,
    key_documents_BS: Tensor | None = None,
) -> Mask:
    """Everything that restricts attention, in one mask; none at all where the kernels need none.

    Args:
        query_length: T.
        key_length: S; if causal, the queries are the last T of the S positions.
        like: the queries, [B, ...]: a float mask gets their dtype.
        causal: whether a position sees only itself and what came before it.
        attn_mask: bool or float, [T, S] or [B, T, S].
        key_padding_mask: bool or float, [B, S].
        query_documents_BT, key_documents_BS: int64; a position sees its own document alone.

    Raises:
        ProviderError: a mask of another shape, or one that is neither boolean nor floating.
    """
    T, S, B = query_length, key_length, like.shape[0]
    blocked: list[Tensor] = []
    added: list[Tensor] = []
    if attn_mask is not None:
        check_mask("attn_mask", attn_mask, (T, S), (B, T, S))
        mask_BHTS = attn_mask.unsqueeze(-3) if attn_mask.dim() == 3 else attn_mask
        (blocked if attn_mask.dtype == torch.bool else added).append(mask_BHTS)
    if key_padding_mask is not None:
        check_mask("key_padding_mask", key_padding_mask, (B, S))
        (blocked if key_padding_mask.dtype == torch.bool else added).append(key_padding_mask[:, None, None, :])
    # Whoever sees at least itself is never blind.
    may_be_blind = bool(blocked or added)
    if query_documents_BT is not None and key_documents_BS is not None:
        blocked.append((query_documents_BT[:, :, None] != key_documents_BS[:, None, :])[:, None])
    if causal and T > 1:
        if not blocked and not added and T == S:
            return Mask(causal=True)
        blocked.append(_future(T, S, like.device))
    if not blocked and not added:
        return Mask()
    if not added:
        visible_BHTS = ~reduce(torch.logical_or, blocked)
        if not may_be_blind:
            return Mask(visible_BHTS)
        blind = ~visible_BHTS.any(-1, keepdim=True)
        return Mask(visible_BHTS | blind, blind=blind)
    # The dtype comes first: what is finite in float32 may be -inf in fewer bits.
    bias_BHTS = reduce(torch.add, [mask.to(like.dtype) for mask in added])
    if blocked:
        bias_BHTS = bias_BHTS.masked_fill(reduce(torch.logical_or, blocked), -math.inf)
    blind = (bias_BHTS == -math.inf).all(-1, keepdim=True)
    return Mask(bias_BHTS.masked_fill(blind, 0.0), blind=blind)


def attend(
    q_BHTd: Tensor,
    k_BKSd: Tensor,
    v_BKSd: Tensor,
    mask: Mask,
    *,
    dropout: float = 0.0,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention; K heads of keys and values serve H = K * groups heads of queries.

    Returns:
        The output [B, H, T, d], and the weights [B, H, T, S] before dropout if `need_weights` asks for them.
    """
    B, H, T, d = q_BHTd.shape
    groups = H // k_BKSd.shape[1]
    weights_BHTS = None
    if need_weights:
        k_BHSd, v_BHSd = (x.repeat_interleave(groups, 1) for x in (k_BKSd, v_BKSd))
        weights_BHTS = masked_softmax(q_BHTd @ k_BHSd.transpose(-1, -2) / math.sqrt(d), mask)
        out_BHTd = F.dropout(weights_BHTS, dropout) @ v_BHSd
    elif T == 1 and groups > 1:
        # The queries of one group become the rows of one product: at one position no mask tells them apart.
        q_BKGd = q_BHTd.reshape(B, -1, groups, d)
        out_BKGd = F.scaled_dot_product_attention(q_BKGd, k_BKSd, v_BKSd, attn_mask=mask.visible, dropout_p=dropout)
        out_BHTd = out_BKGd.reshape(B, H, 1, -1)
    else:
        out_BHTd = F.scaled_dot_product_attention(
            q_BHTd,
            k_BKSd,
            v_BKSd,
            attn_mask=mask.visible,
            is_causal=mask.causal,
            dropout_p=dropout,
            enable_gqa=groups > 1,
        )
    # The weights of blind rows are already zero where weights were asked for.
    if mask.blind is not None and not need_weights:
        out_BHTd = out_BHTd.masked_fill(mask.blind, 0.0)
    return out_BHTd, weights_BHTS


def masked_softmax(scores_BHTS: Tensor, mask: Mask) -> Tensor:
    """The weights of `scores_BHTS` (already scaled) under `mask`, in float32 at least; blind rows are zeros."""
    visible = mask.visible
    if mask.causal:
        T, S = scores_BHTS.shape[-2:]
        visible = ~_future(T, S, scores_BHTS.device)
    if visible is not None:
        if visible.dtype == torch.bool:
            scores_BHTS = scores_BHTS.masked_fill(~visible, -math.inf)
        else:
            scores_BHTS = scores_BHTS + visible
    exact = torch.promote_types(scores_BHTS.dtype, torch.float32)
    weights_BHTS = scores_BHTS.softmax(-1, dtype=exact).to(scores_BHTS.dtype)
    return weights_BHTS if mask.blind is None else weights_BHTS.masked_fill(mask.blind, 0.0)


def padded(key_padding_mask: Tensor | None) -> Tensor | None:
    """Which positions are padding: bool [B, S]. In a float mask those are the ones at -inf."""
    if key_padding_mask is None or key_padding_mask.dtype == torch.bool:
        return key_padding_mask
    return key_padding_mask == -math.inf


def _future(query_length: int, key_length: int, device: torch.device) -> Tensor:
    """bool [T, S]: True where the key comes after the query, the queries being the last T of the S positions."""
    ones = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    return ones.triu(key_length - query_length + 1)


def check_mask(name: str, mask: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise ProviderError if `mask` has none of these shapes, or is neither boolean nor floating."""
    if tuple(mask.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ProviderError(
            f"{name} is {list(mask.shape)}, expected {wanted}", hint="count cached positions as keys too"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ProviderError(
            f"{name} is {mask.dtype}", hint="give a boolean mask (True = blocked) or a float mask (added)"
        )


__all__ = ["Limits", "Mask", "attend", "build_mask", "check_mask", "masked_softmax", "padded"]
