"""What attention layers refuse alike, in one line each."""

from __future__ import annotations

from torch import Tensor

from apt.core.errors import ConfigError, ProviderError
from apt.core.providers.attention import AttentionContext


def check_heads(d_model: int, num_heads: int) -> int:
    """The head size d_model / num_heads. Raises ConfigError if that is no whole number."""
    if num_heads < 1 or d_model % num_heads:
        fits = [str(h) for h in range(1, min(d_model, 2 * max(num_heads, 1)) + 1) if d_model % h == 0]
        raise ConfigError(
            f"d_model {d_model} is not divisible by num_heads {num_heads}", hint=f"heads that fit: {', '.join(fits)}"
        )
    return d_model // num_heads


def check_request(layer: str, query: Tensor, key: Tensor, *, causal: bool, context: AttentionContext) -> None:
    """Raise ProviderError for cross-attention (a key that is not the query itself) that the request rules out."""
    if key is query:
        return
    for what, given in (("a cache", context.cache if causal else None), ("document_ids", context.document_ids)):
        if given is not None:
            raise ProviderError(f"{layer}: {what} with cross-attention", hint="they serve self-attention: key is query")
    if causal and key.shape[1] != query.shape[1]:
        raise ProviderError(
            f"{layer} is causal and got {query.shape[1]} queries for {key.shape[1]} keys",
            hint="build a layer for cross-attention with causal=False",
        )


__all__ = ["check_heads", "check_request"]
