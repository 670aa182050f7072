"""The provider `flash_sdpa`: torch's own fused kernels, on CPUs and GPUs, and a word where none of them can serve.

It is what the other attentions of this package do where their own kernels cannot.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from apt.api import AptWarning, ConfigError
from apt.modeling.layers.attention_mha import MHAAttention, MHAAttentionLayer
from apt.modeling.layers.masks import Limits, Mask, attend, build_mask
from apt_plugin_flash.config import WindowedMHAConfig


class SDPALayer(MHAAttentionLayer):
    """The weights of `mha`, scored by `torch.nn.functional.scaled_dot_product_attention` on a fused kernel.

    Args:
        d_model, num_heads, options: as those of `MHAAttentionLayer`.
        config: the section `model.mha`, with `window`.

    Raises:
        ConfigError: the heads do not fit, or a window is set where attention is not causal.
    """

    name = "flash_sdpa"

    def __init__(self, d_model: int, num_heads: int, config: WindowedMHAConfig, **options: Any) -> None:
        super().__init__(d_model, num_heads, config, **options)
        self.window = config.window
        if self.window is not None and not self.causal:
            raise ConfigError(
                "model.mha.window: a window looks back, and this attention is not causal", hint="leave it out"
            )
        self.said: set[str] = set()

    def mix(
        self, q_BTHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, limits: Limits, *, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See `MHAAttentionLayer.mix`; where weights are asked for it is what computes them."""
        if self.window is not None:
            if not need_weights:
                k_BSKd, v_BSKd, limits = newest(k_BSKd, v_BSKd, limits, self.window + q_BTHd.shape[1] - 1)
            limits = within(limits, q_BTHd.shape[1], k_BSKd.shape[1], self.window, q_BTHd.device)
        if need_weights:
            return super().mix(q_BTHd, k_BSKd, v_BSKd, limits, need_weights=True)
        mask = build_mask(q_BTHd.shape[1], k_BSKd.shape[1], q_BTHd, causal=self.causal, **limits._asdict())
        q_BHTd, k_BKSd, v_BKSd = (x.transpose(1, 2) for x in (q_BTHd, k_BSKd, v_BSKd))
        dropout = self.dropout if self.training else 0.0
        # At one position the scores are one row, for which `attend` needs neither a kernel nor groups of heads.
        if q_BTHd.shape[1] > 1 and not torch.compiler.is_compiling():
            groups = q_BHTd.shape[1] // k_BKSd.shape[1]
            if groups > 1 and not is_fused(q_BHTd, k_BKSd, v_BKSd, mask, dropout):
                # On GPUs the kernel that takes masks takes no groups of heads.
                k_BKSd, v_BKSd = (x.repeat_interleave(groups, 1) for x in (k_BKSd, v_BKSd))
            if not is_fused(q_BHTd, k_BKSd, v_BKSd, mask, dropout):
                self.say(_why_not(self.name, q_BHTd, mask, dropout))
        out_BHTd, _ = attend(q_BHTd, k_BKSd, v_BKSd, mask, dropout=dropout)
        return out_BHTd.transpose(1, 2), None

    def say(self, text: str) -> None:
        """Warn of something, once in a model."""
        if text not in self.said:
            self.said.add(text)
            warnings.warn(text, AptWarning, stacklevel=2)


def newest(k_BSKd: Tensor, v_BSKd: Tensor, limits: Limits, count: int) -> tuple[Tensor, Tensor, Limits]:
    """Keys, values and what limits them without all but the `count` newest positions, which a window hides anyway."""
    if k_BSKd.shape[1] <= count:
        return k_BSKd, v_BSKd, limits
    attn_mask, key_padding_mask, query_documents_BT, key_documents_BS = limits
    return (
        k_BSKd[:, -count:],
        v_BSKd[:, -count:],
        Limits(
            None if attn_mask is None else attn_mask[..., -count:],
            None if key_padding_mask is None else key_padding_mask[:, -count:],
            query_documents_BT,
            None if key_documents_BS is None else key_documents_BS[:, -count:],
        ),
    )


def within(limits: Limits, query_length: int, key_length: int, window: int, device: torch.device) -> Limits:
    """`limits` with what lies before a causal window blocked as well; the queries are the last of the positions."""
    if key_length <= window:
        return limits
    at_T = torch.arange(key_length - query_length, key_length, device=device)
    past_TS = at_T[:, None] - torch.arange(key_length, device=device) >= window
    mask = limits.attn_mask
    if mask is None:
        return limits._replace(attn_mask=past_TS)
    blocked = mask | past_TS if mask.dtype == torch.bool else mask.masked_fill(past_TS, -torch.inf)
    return limits._replace(attn_mask=blocked)


def is_fused(q_BHTd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, mask: Mask, dropout: float) -> bool:
    """Whether torch has a fused kernel for this call on a device that has such kernels."""
    if q_BHTd.device.type not in ("cpu", "cuda"):
        return True  # nothing is known of others that could be said
    groups = q_BHTd.shape[1] // k_BKSd.shape[1]
    # What scaled_dot_product_attention asks itself: there is no public function that answers for every device.
    chosen = torch._fused_sdp_choice(q_BHTd, k_BKSd, v_BKSd, mask.visible, dropout, mask.causal, enable_gqa=groups > 1)
    return SDPBackend(chosen) != SDPBackend.MATH


def _why_not(name: str, q_BHTd: Tensor, mask: Mask, dropout: float) -> str:
    facts = [f"{str(q_BHTd.dtype).removeprefix('torch.')}, heads of {q_BHTd.shape[-1]}"]
    if mask.visible is not None:
        facts.append("a mask that is learned" if mask.visible.requires_grad else "a mask")
    if dropout:
        facts.append(f"dropout of {dropout:g} on the weights")
    return (
        f"{name}: torch has no fused kernel on {q_BHTd.device.type} for {' and '.join(facts)}; the scores are computed "
        "in plain steps, which are slower and hold them all in memory"
    )


class SDPAAttention(MHAAttention):
    """Multi-head and grouped-query attention on torch's fused kernels, which are there on CPUs and GPUs."""

    Config = WindowedMHAConfig
    Layer = SDPALayer

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.said: set[str] = set()

    def get_name(self) -> str:
        return self.Layer.name

    def create_layer(self, d_model: int, num_heads: int, **options: Any) -> SDPALayer:
        """See `AttentionProvider.create_layer`."""
        layer = super().create_layer(d_model, num_heads, **options)
        assert isinstance(layer, SDPALayer)
        layer.said = self.said
        return layer


__all__ = ["SDPAAttention", "SDPALayer", "is_fused", "newest", "within"]
