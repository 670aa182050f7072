"""The three functions of flash-attn 2.8 that are called, written from their documentation with loops over positions.

They check what the library checks, and they note each call. `install` puts them in the library's place.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from apt_plugin_flash import flash

calls: list[tuple[str, dict[str, Any]]] = []


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    calls.append(("full", {"causal": causal, "window_size": window_size, "dropout_p": dropout_p}))
    return torch.stack([attention(*row, causal, window_size, dropout_p) for row in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    calls.append(("varlen", {"segments": len(cu_seqlens_q) - 1, "window_size": window_size, "dropout_p": dropout_p}))
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert len(cu_seqlens_q) == len(cu_seqlens_k)
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert (queries[0], queries[-1], keys[0], keys[-1]) == (0, len(q), 0, len(k))
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    pieces = []
    for n in range(len(queries) - 1):
        own, seen = slice(queries[n], queries[n + 1]), slice(keys[n], keys[n + 1])
        pieces.append(attention(q[own], k[seen], v[seen], causal, window_size, dropout_p))
    return torch.cat(pieces)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    calls.append(("cached", {"causal": causal, "window_size": window_size}))
    assert k_cache.stride(-1) == 1 and v_cache.stride(-1) == 1
    assert not (torch.is_grad_enabled() and q.requires_grad), "it has no backward pass"
    assert k is None and v is None and cache_seqlens is None, "the whole of what is passed as cache counts"
    return torch.stack([attention(*row, causal, window_size, 0.0) for row in zip(q, k_cache, v_cache, strict=True)])


def attention(
    q_THd: Tensor, k_SKd: Tensor, v_SKd: Tensor, causal: bool, window_size: tuple[int, int], dropout_p: float
) -> Tensor:
    """One sequence. Query i stands at i + S - T; zeros where it sees nothing."""
    assert q_THd.dtype == k_SKd.dtype == v_SKd.dtype and q_THd.dtype in flash.DTYPES
    assert q_THd.shape[-1] <= 256 and k_SKd.shape == v_SKd.shape
    (T, H, d), (S, K, _) = q_THd.shape, k_SKd.shape
    left, right = window_size
    k_SHd, v_SHd = (x.repeat_interleave(H // K, 1) for x in (k_SKd, v_SKd))
    rows = []
    for i in range(T):
        at = i + S - T
        first = 0 if left < 0 else max(0, at - left)
        last = at if causal else S - 1 if right < 0 else at + right
        keys, values = k_SHd[first : last + 1], v_SHd[first : last + 1]
        if not len(keys):
            rows.append(torch.zeros_like(q_THd[i]))
            continue
        scores_SH = torch.einsum("hd,shd->sh", q_THd[i], keys) * d**-0.5
        rows.append(torch.einsum("sh,shd->hd", F.dropout(scores_SH.softmax(0), dropout_p), values))
    return torch.stack(rows) if rows else q_THd


def install(monkeypatch: pytest.MonkeyPatch, *dtypes: torch.dtype) -> list[tuple[str, dict[str, Any]]]:
    """Put these in flash-attn's place, on the CPU, for bf16 and `dtypes`; returns the list of calls, empty."""
    module = ModuleType("flash_attn")
    for function in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(flash, "DTYPES", (torch.float16, torch.bfloat16, *dtypes))
    calls.clear()
    return calls
