"""Norms: LayerNorm and RMSNorm for the residual stream, and the RMS norm of queries and keys."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-6) over the last dimension (Zhang and Sennrich, 2019), without a gain."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def make_norm(kind: str, d_model: int, eps: float | None = None) -> nn.Module:
    """The norm of a profile's `model.norm`: "layernorm" (no bias) or "rmsnorm", with a gain [d_model].

    Args:
        eps: added under the root; the kind's usual one if left out: 1e-5 and 1e-6.
    """
    if kind == "rmsnorm":
        return nn.RMSNorm(d_model, eps=EPS if eps is None else eps)
    assert kind == "layernorm", kind
    return nn.LayerNorm(d_model, eps=1e-5 if eps is None else eps, bias=False)


__all__ = ["EPS", "make_norm", "rms_norm"]
