"""TVA, Tri-Vein attention: one narrow latent, the vein, carries keys and values, and is regenerated from its own past.

Where multi-head attention remembers 2 D numbers per position, TVA remembers the D / r of the vein. With x [B, T, D], H
heads of size Dh = D / H, a vein of width Dc = D / r, and (.) the product element by element:

1. [q | c] = x W_in. c is the vein.
2. Self-generation: c~_t = c_t + (s / tau) * sum_{j = 1, 2} w_j (.) c_{t-j}, where attention is causal and t-j to t are
   consecutive positions of one document, none of them padding. w starts at zero.
3. Keys: c~ is cut into n_v = Dc / dp slices of dp = gcd(Dc, Dh), and k_h = [U_h c~ ; RoPE(slice h mod n_v)], U_h only
   where dp < Dh. q_h turns on the same last dp dimensions. Then both go through an RMS norm with gains.
4. Values: v_h = V_h c~. Output: softmax(q_h k_h / sqrt(Dh)) v_h over all heads, times W_o.

The narrow latent for keys and values comes from multi-head latent attention (DeepSeek-V2, 2024, section 2.1), the norm
of queries and keys from Henry et al. (2020); step 2 is kin to the short convolutions of state-space models.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apt.core.errors import ConfigError, ProviderError
from apt.core.providers.attention import AttentionContext, AttentionProvider
from apt.modeling.layers.checks import check_heads, check_request
from apt.modeling.layers.config import TVAConfig
from apt.modeling.layers.counting import Part
from apt.modeling.layers.masks import Mask, attend, build_mask, masked_softmax, padded
from apt.modeling.layers.norm import EPS, rms_norm
from apt.modeling.layers.rope import RotaryEmbedding, rotate
from apt.modeling.layers.vein import TAPS, VeinCache, unbroken_steps


def slice_width(d_model: int, num_heads: int, r: int) -> int | None:
    """The width dp of the vein's slices, or None if this r does not fit: it must divide d_model, and dp must be even.

    The heads are then a multiple of the slices, of which there are H / gcd(H, r).
    """
    width = math.gcd(d_model // r, d_model // num_heads)
    return None if d_model % r or width % 2 else width


class TVAAttentionLayer(Part):
    """One layer of TVA; `forward` keeps the contract of `AttentionProvider`.

    Args:
        d_model: width D.
        num_heads: heads H.
        config: the section `model.tva`.
        causal: whether a position sees only itself and what came before it; without it nothing is self-generated.
        dropout: probability of dropping an attention weight in training.
        num_layers: depth of the model, for the initial scale of the output projection.
        rope_theta: base of the rotary angles; None: nothing is rotated.

    Raises:
        ConfigError: the heads or r do not fit; the message names what does.
    """

    capabilities = frozenset({"cache", "documents", "cross_attention", "cross_cache", "weights"})

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        config: TVAConfig,
        *,
        causal: bool = True,
        dropout: float = 0.0,
        num_layers: int = 1,
        rope_theta: float | None = 10_000.0,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.num_heads = num_heads
        self.head_dim = check_heads(d_model, num_heads)
        slice_dim = slice_width(d_model, num_heads, config.r)
        if slice_dim is None:
            fits = [str(r) for r in range(1, d_model + 1) if slice_width(d_model, num_heads, r)]
            raise ConfigError(
                f"model.tva.r: {config.r} does not fit d_model {d_model} with {num_heads} heads",
                hint=f"r that fit: {', '.join(fits)}"
                if fits
                else "choose num_heads so that d_model / num_heads is even",
            )
        self.d_vein = d_model // config.r
        self.slice_dim = slice_dim
        self.num_slices = self.d_vein // slice_dim
        self.free_dim = self.head_dim - slice_dim
        self.causal = causal
        self.dropout = dropout
        self.num_layers = num_layers
        self.gain = config.s / config.tau
        self.self_generates = causal and config.s > 0
        self.qk_norm = config.qk_norm
        self.rope = RotaryEmbedding(slice_dim, rope_theta) if rope_theta is not None else None

        self.w_in = nn.Linear(d_model, d_model + self.d_vein, bias=False)
        self.w_v = nn.Linear(self.d_vein, d_model, bias=False)
        self.w_u = nn.Linear(self.d_vein, num_heads * self.free_dim, bias=False) if self.free_dim else None
        self.w_o = nn.Linear(d_model, d_model, bias=False)
        if self.self_generates:
            self.w = nn.Parameter(torch.empty(TAPS, self.d_vein))
            # A matrix by its shape alone: the optimizer asks for this mark before it decays one.
            self.w.no_weight_decay = True  # type: ignore[attr-defined]
        if self.qk_norm:
            self.q_gain = nn.Parameter(torch.empty(self.head_dim))
            self.k_gain = nn.Parameter(torch.empty(self.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights.

        The vein starts as a semi-orthogonal projection of x, so that V and U, whose inputs are r times fewer, start
        sqrt(r) times as large as the std 0.02 of the rest.
        """
        q_DD, c_DcD = self.w_in.weight.detach().split((self.d_model, self.d_vein))
        nn.init.normal_(q_DD, std=0.02)
        c_DcD.copy_(nn.init.orthogonal_(torch.empty_like(c_DcD, dtype=torch.float32)))
        std = 0.02 * math.sqrt(self.d_model / self.d_vein)
        nn.init.normal_(self.w_v.weight, std=std)
        if self.w_u is not None:
            nn.init.normal_(self.w_u.weight, std=std)
        nn.init.normal_(self.w_o.weight, std=0.02 / math.sqrt(2 * self.num_layers))
        if self.self_generates:
            nn.init.zeros_(self.w)
        if self.qk_norm:
            nn.init.ones_(self.q_gain)
            nn.init.ones_(self.k_gain)

    def make_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> VeinCache:
        """A cache for D / r numbers per position."""
        return VeinCache(batch_size, max_length, {"vein": (self.d_vein,)}, device=device, dtype=dtype)

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs per token at a context of `length` tokens, all of which count, as in a full score matrix."""
        matrices = [self.w_in, self.w_v, self.w_o] + ([self.w_u] if self.w_u is not None else [])
        return 2 * sum(m.weight.numel() for m in matrices) + 4 * self.d_model * length

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        context: AttentionContext | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `AttentionProvider`. Keys and values come from one latent, so `value` must be `key` itself. A key that is
        not `query` itself is cross-attention: it is rotated by its own index, and nothing is generated.

        Raises:
            ProviderError: `value` is another tensor than `key`, or a mask or the context does not fit.
        """
        context = context or AttentionContext()
        check_request("tva_default", query, key, causal=self.causal, context=context)
        if value is not key:
            raise ProviderError(
                "tva_default makes keys and values from one latent and got two tensors",
                hint="pass key as value, or use mha",
            )
        cache = context.cache
        assert cache is None or isinstance(cache, VeinCache)
        crosses = key is not query
        holds_vein = crosses and cache is not None and cache.length > 0
        T = query.shape[1]
        start = cache.length if cache is not None and not crosses else 0
        S = cache.length if cache is not None and holds_vein else start + key.shape[1]

        q_BTD, c_BSDc = self._project(query, None if holds_vein else key)
        # What is known of every position, the cached ones included.
        positions, documents_BS = context.positions, context.document_ids
        if cache is not None and not crosses:
            positions = cache.write_positions(positions, T, query.device)
            documents_BS = cache.write_documents(documents_BS)
        mask = build_mask(
            T,
            S,
            q_BTD,
            causal=self.causal,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            query_documents_BT=context.document_ids,
            key_documents_BS=documents_BS,
        )
        if self.rope is None:
            q_turns = k_turns = None
        elif crosses:
            q_turns = self.rope.turns(positions, 0, T, query)
            k_turns = self.rope.turns(None, 0, S, key)
        else:
            k_turns = self.rope.turns(positions, 0, S, query)
            q_turns = k_turns[..., start:, :, :]

        if c_BSDc is None:
            assert cache is not None
            vein_BSDc = cache.read("vein", query)
        else:
            vein_BSDc = c_BSDc
            if self.self_generates and not crosses:
                past_BPDc = cache.recent_BPDc if cache is not None else None
                unbroken = unbroken_steps(start, S, positions, documents_BS, padded(key_padding_mask))
                vein_BSDc = self._regenerate(c_BSDc, past_BPDc, unbroken)
            if cache is not None:
                vein_BSDc = cache.write("vein", vein_BSDc)
                if self.self_generates:
                    cache.write_recent(c_BSDc)
                cache.advance(key.shape[1])

        q_BTHd = self._queries(q_BTD, q_turns)
        weights_BHTS: Tensor | None
        if cache is not None and T == 1:
            out_BHTd, weights_BHTS = self._attend_in_vein(q_BTHd, vein_BSDc, k_turns, mask)
        else:
            out_BHTd, weights_BHTS = attend(
                q_BTHd.transpose(1, 2),
                self._keys(vein_BSDc, k_turns).transpose(1, 2),
                self.w_v(vein_BSDc).unflatten(-1, (self.num_heads, -1)).transpose(1, 2),
                mask,
                dropout=self.dropout if self.training else 0.0,
                need_weights=context.need_weights,
            )
        output_BTD = self.w_o(out_BHTd.transpose(1, 2).flatten(2))
        return output_BTD, weights_BHTS if context.need_weights else None

    def _project(self, query: Tensor, key: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Queries [B, T, D] and the raw vein [B, S, Dc]; one product where both come from one tensor, and no vein where
        there is no key."""
        sizes = (self.d_model, self.d_vein)
        if query is key:
            q_BTD, c_BTDc = self.w_in(query).split(sizes, dim=-1)
            return q_BTD, c_BTDc
        q_DD, c_DcD = self.w_in.weight.split(sizes)
        return F.linear(query, q_DD), None if key is None else F.linear(key, c_DcD)

    def _regenerate(self, c_BTDc: Tensor, past_BPDc: Tensor | None, unbroken: Tensor | None) -> Tensor:
        """c~_t = c_t + (s / tau) * sum_j w_j (.) c_{t-j}.

        Args:
            c_BTDc: the raw vein of the new positions.
            past_BPDc: that of the positions before them, or None.
            unbroken: bool [B or 1, T + 1]: whether each position, from the last past one on, continues the one before
                it; None: all do.
        """
        T = c_BTDc.shape[1]
        run = c_BTDc if past_BPDc is None else torch.cat((past_BPDc[:, -TAPS:].to(c_BTDc.dtype), c_BTDc), 1)
        run = F.pad(run, (0, 0, T + TAPS - run.shape[1], 0))
        one_back, two_back = run[:, 1:-1], run[:, :-2]
        if unbroken is not None:
            one_back = one_back * unbroken[:, 1:, None]
            two_back = two_back * (unbroken[:, 1:] & unbroken[:, :-1])[..., None]
        w_1, w_2 = (self.gain * self.w).to(c_BTDc.dtype)
        return torch.addcmul(torch.addcmul(c_BTDc, one_back, w_1), two_back, w_2)

    def _queries(self, q_BTD: Tensor, turns: Tensor | None) -> Tensor:
        """[B, T, H, Dh], rotated on the last dp dimensions and normed; the gains are with the keys."""
        q_BTHd = q_BTD.unflatten(-1, (self.num_heads, -1))
        if turns is not None:
            free, turned = q_BTHd.split((self.free_dim, self.slice_dim), dim=-1)
            turned = rotate(turned, turns)
            q_BTHd = torch.cat((free, turned), -1) if self.free_dim else turned
        return rms_norm(q_BTHd) if self.qk_norm else q_BTHd

    def _slices(self, vein_BSDc: Tensor, turns: Tensor | None) -> Tensor:
        """The slices of the vein, rotated: [B, S, n_v, dp]."""
        slices_BSnd = vein_BSDc.unflatten(-1, (self.num_slices, -1))
        return slices_BSnd if turns is None else rotate(slices_BSnd, turns)

    def _keys(self, vein_BSDc: Tensor, turns: Tensor | None) -> Tensor:
        """k_h = [U_h c~ ; RoPE(c~[slice h mod n_v])], normed, for every head: [B, S, H, Dh]."""
        k_BSnd = self._slices(vein_BSDc, turns)
        if self.w_u is not None:
            free_BSHf = self.w_u(vein_BSDc).unflatten(-1, (self.num_heads, -1))
            k_BSnd = torch.cat((free_BSHf, self._spread(k_BSnd)), -1)
        if self.qk_norm:
            # A score knows no more than the product of both gains, and the keys are the fewer.
            k_BSnd = rms_norm(k_BSnd) * (self.q_gain * self.k_gain).to(k_BSnd.dtype)
        return k_BSnd if self.w_u is not None else self._spread(k_BSnd)

    def _spread(self, slices_BSnd: Tensor) -> Tensor:
        """For each head its slice h mod n_v: [B, S, H, dp]. With a single slice that is a view and copies nothing."""
        groups = self.num_heads // self.num_slices
        return slices_BSnd.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(2, 3)

    def _attend_in_vein(
        self, q_B1Hd: Tensor, vein_BSDc: Tensor, turns: Tensor | None, mask: Mask
    ) -> tuple[Tensor, Tensor]:
        """Attention of one query per row without making the keys and values of the positions it sees.

        q_h k_h = (U_h^T q_h) c~ + q_h RoPE(c~[slice]), and sum_t a_t V_h c~_t = V_h sum_t a_t c~_t: with the queries
        brought into the vein and the values out of it, the work per position falls from D Dc to about 2 H Dc. The key's
        norm is one number per position and slice (and head, where there is a U_h), by which the score is divided.

        Returns:
            The output [B, H, 1, Dh] and the weights [B, H, 1, S].
        """
        q_BHd = q_B1Hd.squeeze(1)
        q_BHd = (
            q_BHd * (self.q_gain * self.k_gain).to(q_BHd.dtype) if self.qk_norm else q_BHd / math.sqrt(self.head_dim)
        )
        free_BHf, turned_BHd = q_BHd.split((self.free_dim, self.slice_dim), dim=-1)
        slices_BSnd = self._slices(vein_BSDc, turns)
        turned_BGnd = turned_BHd.unflatten(1, (-1, self.num_slices))
        # One product per slice: a single batched one would first copy the whole vein, 3 to 4 times as slow at 8 rows.
        scores_BGnS = torch.stack(
            [q @ k.mT for q, k in zip(turned_BGnd.unbind(2), slices_BSnd.unbind(2), strict=True)], 2
        )
        # What the score is divided by: sqrt(Dh) times the key's root mean square, of which this is the square.
        square_BGnS = torch.linalg.vecdot(slices_BSnd, slices_BSnd).mT[:, None] if self.qk_norm else None
        if self.w_u is not None:
            u_HfDc = self.w_u.weight.unflatten(0, (self.num_heads, -1))
            scores_BHS = torch.einsum("bhf,hfc->bhc", free_BHf, u_HfDc) @ vein_BSDc.mT
            scores_BGnS = scores_BGnS + scores_BHS.unflatten(1, (-1, self.num_slices))
            if square_BGnS is not None:
                free_BSGnf = self.w_u(vein_BSDc).unflatten(-1, (-1, self.num_slices, self.free_dim))
                square_BGnS = square_BGnS + torch.linalg.vecdot(free_BSGnf, free_BSGnf).movedim(1, -1)
        if square_BGnS is not None:
            scores_BGnS = scores_BGnS * (square_BGnS + EPS * self.head_dim).rsqrt()
        weights_BH1S = masked_softmax(scores_BGnS.flatten(1, 2).unsqueeze(2), mask)
        weights_BHS = F.dropout(weights_BH1S.squeeze(2), self.dropout, self.training)
        v_HdDc = self.w_v.weight.unflatten(0, (self.num_heads, -1))
        out_HBd = (weights_BHS @ vein_BSDc).transpose(0, 1) @ v_HdDc.mT
        return out_HBd.transpose(0, 1).unsqueeze(2), weights_BH1S


class TVAAttention(AttentionProvider):
    """Tri-Vein attention, the default: one self-generating latent of d_model / r numbers carries keys and values."""

    Config = TVAConfig

    def get_name(self) -> str:
        return "tva_default"

    def get_version(self) -> str:
        return "1.0.0"

    def create_layer(
        self,
        d_model: int,
        num_heads: int,
        *,
        causal: bool = True,
        dropout: float = 0.0,
        num_layers: int = 1,
        rope_theta: float | None = 10_000.0,
        **config: Any,
    ) -> TVAAttentionLayer:
        return TVAAttentionLayer(
            d_model,
            num_heads,
            self.config,
            causal=causal,
            dropout=dropout,
            num_layers=num_layers,
            rope_theta=rope_theta,
        )


__all__ = ["TVAAttention", "TVAAttentionLayer", "TVAConfig"]
