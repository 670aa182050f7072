"""The attention layer of 1.x, on the kernel's default attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from apt.core.providers.attention import AttentionContext
from apt.modeling.compose import ModelBuilder
from apt_model.config._options import UNREAD, say_once, tva_section


class AutopoieticAttention(nn.Module):
    """A layer of `tva_default`, called as `nn.MultiheadAttention` is.

    It adds no positions, as before: those of the tokens are in its input. What 1.x drew from the scores comes from the
    vein's own past now, which there is where attention is causal by construction; a causal `attn_mask` alone masks.

    Args:
        embed_dim: width D.
        num_heads: heads H.
        dropout: probability of dropping an attention weight in training.
        init_tau: temperature of self-generation, `tva.tau`.
        sr_ratio: compression, `tva.r`; one that does not fit becomes the nearest that does, with an AptWarning.
        use_autopoietic: whether a causal layer generates its vein.
        batch_first: whether inputs and output are [B, T, D] and not [T, B, D].
        causal: whether a position sees only itself and what came before it.
        eps, alpha, **stabilisers: of 1.x's formula; passed over, with an AptWarning where they are given.

    Raises:
        ConfigError: the heads do not fit `embed_dim`.
        TypeError: an option that 1.x did not have.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        eps: float | None = None,
        alpha: float | None = None,
        init_tau: float = 1.0,
        sr_ratio: int = 4,
        use_autopoietic: bool = True,
        batch_first: bool = True,
        *,
        causal: bool = False,
        **stabilisers: Any,
    ) -> None:
        super().__init__()
        if strange := [name for name in stabilisers if name not in UNREAD]:
            raise TypeError(f"AutopoieticAttention has no option {strange[0]!r}")
        given = {"eps": eps, "alpha": alpha, **stabilisers}
        if unread := [name for name, value in given.items() if value is not None]:
            say_once(f"AutopoieticAttention: {', '.join(unread)} not used: nothing reads it any more")
        self.embed_dim, self.num_heads, self.batch_first = embed_dim, num_heads, batch_first
        model = {
            "d_model": embed_dim,
            "num_heads": num_heads,
            "num_layers": 1,
            "dropout": dropout,
            "positions": "learned",  # the layer then rotates nothing
            "tva": tva_section(embed_dim, num_heads, sr_ratio, init_tau, use_autopoietic),
        }
        self.attention = ModelBuilder({"model": model}).build_attention(embed_dim, num_heads, causal=causal)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend. The masks are given by name: 1.x had them in another order than `nn.MultiheadAttention`.

        Args:
            query: [B, T, D], or [T, B, D] without `batch_first`.
            key, value: [B, S, D] likewise, one tensor: keys and values come from one latent.
            key_padding_mask: bool [B, S], True where a key is padding.
            attn_mask: [T, S] or [B, T, S]; True is blocked, a float mask is added to the scores.
            average_attn_weights: whether the weights are the mean over the heads.

        Returns:
            The output, shaped as `query`, and the weights [B, T, S] (or [B, H, T, S]), None without `need_weights`.

        Raises:
            ProviderError: `value` is another tensor than `key`, or a mask does not fit.
        """
        turned: dict[int, Tensor] = {}

        def batched(x: Tensor) -> Tensor:
            # One tensor stays one: that is how the layer knows self-attention.
            return x if self.batch_first else turned.setdefault(id(x), x.transpose(0, 1))

        output, weights = self.attention(
            batched(query),
            batched(key),
            batched(value),
            attn_mask,
            key_padding_mask,
            context=AttentionContext(need_weights=need_weights),
        )
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        return output if self.batch_first else output.transpose(0, 1), weights
