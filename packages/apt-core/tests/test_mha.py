"""Multi-head attention against loops over rows, heads and positions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from apt.core.errors import ConfigError, ProviderError
from apt.core.providers.attention import AttentionContext
from apt.modeling.layers.attention_mha import MHAAttention, MHAAttentionLayer
from apt.modeling.layers.config import MHAConfig

torch.set_num_threads(1)
B, T, D, H = 2, 6, 16, 4


def build(
    num_kv_heads: int | None = None, qk_norm: bool = False, bias: bool = False, **options: Any
) -> MHAAttentionLayer:
    torch.manual_seed(0)
    config = MHAConfig(num_kv_heads=num_kv_heads, qk_norm=qk_norm, bias=bias)
    layer = MHAAttentionLayer(D, H, config, **options).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(mean=1.0 if "gain" in name else 0.0, std=0.4)
    return layer


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def reference(
    layer: MHAAttentionLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    positions: torch.Tensor | None = None,
    theta: float | None = 10_000.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the weights; `seen` is bool [B, T, S]. `positions` [B, T] are those of query and key."""
    weights = layer.state_dict()
    kv_heads, size = layer.num_kv_heads, D // H
    w = weights["w_qkv.weight"]
    bias = weights.get("w_qkv.bias", torch.zeros(len(w), dtype=w.dtype))
    cut = [0, H * size, (H + kv_heads) * size, (H + 2 * kv_heads) * size]
    q_all, k_all, v_all = (
        x @ w[a:b].T + bias[a:b] for x, (a, b) in zip((query, key, value), itertools.pairwise(cut), strict=True)
    )

    def turn(vector: torch.Tensor, position: float) -> torch.Tensor:
        if theta is None:
            return vector
        parts = []
        for i in range(size // 2):
            angle = position * theta ** (-2 * i / size)
            a, b = vector[2 * i], vector[2 * i + 1]
            parts += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
        return torch.stack(parts)

    def norm(vector: torch.Tensor, gain: str) -> torch.Tensor:
        return vector / (vector.square().mean() + 1e-6).sqrt() * weights[gain] if layer.qk_norm else vector

    joined = torch.zeros_like(query)
    attention = torch.zeros(B, H, query.shape[1], key.shape[1], dtype=query.dtype)
    for b, h in itertools.product(range(B), range(H)):
        g = h // (H // kv_heads)
        part, kv_part = slice(h * size, (h + 1) * size), slice(g * size, (g + 1) * size)
        at = positions[b].tolist() if positions is not None else list(range(max(query.shape[1], key.shape[1])))
        keys = [norm(turn(k_all[b, u, kv_part], at[u]), "k_gain") for u in range(key.shape[1])]
        for t in range(query.shape[1]):
            q = norm(turn(q_all[b, t, part], at[t]), "q_gain")
            scores = torch.stack([q @ k / math.sqrt(size) for k in keys]).masked_fill(~seen[b, t], -math.inf)
            if seen[b, t].any():
                attention[b, h, t] = scores.softmax(0)
                joined[b, t, part] = attention[b, h, t] @ v_all[b, :, kv_part]
    out = joined @ weights["w_o.weight"].T + weights.get("w_o.bias", 0.0)
    return out, attention


def same(got: torch.Tensor | None, wanted: torch.Tensor) -> None:
    assert got is not None
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)


CAUSAL = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T)


@pytest.mark.parametrize("theta", [10_000.0, 50.0, None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
def test_a_full_pass_is_the_definition(
    num_kv_heads: int | None, qk_norm: bool, bias: bool, theta: float | None
) -> None:
    layer = build(num_kv_heads, qk_norm, bias, rope_theta=theta)
    x = draw(B, T, D)
    wanted, weights = reference(layer, x, x, x, CAUSAL, theta=theta)
    same(layer(x, x, x)[0], wanted)
    got, got_weights = layer(x, x, x, context=AttentionContext(need_weights=True))
    same(got, wanted)
    same(got_weights, weights)
    assert layer(x, x, x)[1] is None


@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention_takes_three_tensors(bias: bool) -> None:
    layer = build(2, True, bias, causal=False)
    query, key, value = draw(B, T, D), draw(B, 4, D, seed=2), draw(B, 4, D, seed=3)
    wanted, _ = reference(layer, query, key, value, torch.ones(B, T, 4, dtype=torch.bool))
    same(layer(query, key, value)[0], wanted)
    same(layer(query, key, key)[0], reference(layer, query, key, key, torch.ones(B, T, 4, dtype=torch.bool))[0])
    with pytest.raises(ProviderError, match="mha is causal and got 6 queries for 4 keys"):
        build()(query, key, value)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_masks_padding_documents_positions_and_chunks(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    layer = build(data.draw(st.sampled_from([None, 2, 1])), data.draw(st.booleans()))
    x = draw(B, T, D)

    def maybe(chance: float, *shape: int) -> torch.Tensor | None:
        return torch.rand(*shape, generator=generator) < chance if data.draw(st.booleans()) else None

    padding, breaks, jumps, blocked = maybe(0.3, B, T), maybe(0.3, B, T), maybe(0.3, B, T), maybe(0.3, T, T)
    documents = None if breaks is None else breaks.cumsum(1)
    positions = None if jumps is None else jumps.cumsum(1) + torch.arange(T)
    seen = CAUSAL.clone()
    if padding is not None:
        seen &= ~padding[:, None]
    if documents is not None:
        seen &= documents[:, :, None] == documents[:, None]
    if blocked is not None:
        seen &= ~blocked
    wanted, _ = reference(layer, x, x, x, seen, positions)
    context = AttentionContext(positions=positions, document_ids=documents)
    same(layer(x, x, x, blocked, padding, context=context)[0], wanted)

    cache = layer.make_cache(B, T, dtype=torch.float64)
    cuts = sorted(data.draw(st.sets(st.integers(1, T - 1))))
    pieces = []
    for start, stop in itertools.pairwise([0, *cuts, T]):
        piece = x[:, start:stop]
        context = AttentionContext(
            positions=None if positions is None else positions[:, start:stop],
            document_ids=None if documents is None else documents[:, start:stop],
            cache=cache,
        )
        mask = None if blocked is None else blocked[start:stop, :stop]
        with torch.no_grad():
            pieces.append(
                layer(piece, piece, piece, mask, None if padding is None else padding[:, :stop], context=context)[0]
            )
    assert cache.length == T
    same(torch.cat(pieces, 1), wanted)


def test_a_cache_can_be_truncated_and_its_rows_chosen() -> None:
    layer, x, other = build(2), draw(3, T, D), draw(3, T, D, seed=2)
    cache = layer.make_cache(3, T, dtype=torch.float64)
    rows = torch.tensor([2, 2, 0, 1])
    with torch.no_grad():
        start = torch.cat((x[:, :2], other[:, 2:]), 1)
        layer(start, start, start, context=AttentionContext(cache=cache))
        cache.truncate(2)
        cache.select_rows(rows)
        rest = x[rows, 2:]
        got = layer(rest, rest, rest, context=AttentionContext(cache=cache))[0]
    same(got, layer(x, x, x)[0][rows, 2:])
    cache.truncate(99)
    assert cache.length == T


def test_documents_may_begin_anew_with_an_emptied_cache() -> None:
    layer, x = build(), draw(B, T, D)
    cache = layer.make_cache(B, T, dtype=torch.float64)
    ids = torch.zeros(B, T, dtype=torch.int64)
    with torch.no_grad():
        layer(x, x, x, context=AttentionContext(cache=cache, document_ids=ids))
        cache.truncate(0)
        first, second = x[:, :4], x[:, 4:]
        layer(first, first, first, context=AttentionContext(cache=cache))
        got = layer(second, second, second, context=AttentionContext(cache=cache))[0]
    same(got, layer(x, x, x)[0][:, 4:])


def test_what_comes_later_changes_nothing() -> None:
    layer, x = build(), draw(B, T, D)
    for t in range(1, T):
        changed = torch.cat((x[:, :t], draw(B, T - t, D, seed=t)), 1)
        before, after = layer(x, x, x)[0], layer(changed, changed, changed)[0]
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.allclose(before[:, t], after[:, t])


def test_rows_that_see_nothing_give_the_bias_alone_and_finite_gradients() -> None:
    layer, x = build(bias=True), draw(B, T, D).requires_grad_()
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, :2] = True
    out, _ = layer(x, x, x, None, padding)
    same(out[0, :2], layer.w_o.bias.expand(2, D))
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in [x, *layer.parameters()])


def test_gradients() -> None:
    layer = build(2, True)
    x = draw(1, 3, D).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x, x, x)[0], (x,))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16(autocast: bool) -> None:
    layer, x = build(2, True).float(), draw(B, T, D).float()
    wanted = layer(x, x, x)[0]
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    cache = layer.make_cache(B, T, dtype=x.dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        full = layer(x, x, x)[0]
        steps = [layer(t, t, t, context=AttentionContext(cache=cache))[0] for t in x.split(1, 1)]
    for got in (full, torch.cat(steps, 1)):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), wanted, rtol=0.1, atol=0.1)


def test_dropout_is_seeded_and_only_for_training() -> None:
    layer, x = build(dropout=0.5), draw(B, T, D)

    def run(seed: int, need_weights: bool = False) -> torch.Tensor:
        torch.manual_seed(seed)
        out: torch.Tensor = layer(x, x, x, context=AttentionContext(need_weights=need_weights))[0]
        return out

    for need_weights in (False, True):
        assert torch.equal(run(0, need_weights), run(0, need_weights))
        assert not torch.equal(run(0, need_weights), run(1, need_weights))
    layer.eval()
    assert torch.equal(run(0), run(1))


def test_the_provider() -> None:
    provider = MHAAttention({"num_kv_heads": 2, "bias": True})
    assert (provider.get_name(), provider.get_version(), provider.weights_layout) == ("mha", "1.0.0", "mha")
    layer = provider.create_layer(256, 8, num_layers=8, rope_theta=None, a_key_of_a_later_model=1)
    assert layer.rope is None
    assert layer.w_qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.w_o.weight.std().item() == pytest.approx(0.005, rel=0.05)
    assert layer.w_qkv.bias.eq(0).all() and layer.w_o.bias.eq(0).all()
    assert layer.flops_per_token(10) == 2 * (256 * (256 + 2 * 64) + 256 * 256) + 2 * (2 * 256 * 10)
    cache = layer.make_cache(3, 5)
    assert sum(tensor.numel() for tensor in cache.tensors.values()) == 3 * 5 * 2 * 64


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"num_kv_heads: 3 does not divide num_heads 4; num_kv_heads that fit: 1, 2, 4"
    ):
        build(3)
    with pytest.raises(ConfigError, match="heads of size 3 cannot be rotated in pairs"):
        MHAAttentionLayer(12, 4, MHAConfig())
    assert MHAAttentionLayer(12, 4, MHAConfig(), rope_theta=None).head_dim == 3
    with pytest.raises(ConfigError, match="10 is not divisible by num_heads 4; heads that fit: 1, 2, 5"):
        MHAAttentionLayer(10, 4, MHAConfig())
    with pytest.raises(ValidationError):
        MHAAttention({"num_kv_heads": 0})
