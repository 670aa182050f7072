"""TVA against a plain reference: loops over rows, heads and positions, written from the formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from apt.core.errors import ConfigError, ProviderError
from apt.core.providers.attention import AttentionContext
from apt.core.registry import Registry
from apt.modeling.layers.attention_mha import MHAAttentionLayer
from apt.modeling.layers.attention_tva import TVAAttention, TVAAttentionLayer
from apt.modeling.layers.config import MHAConfig, TVAConfig
from apt.modeling.layers.rope import RotaryEmbedding, rotate
from apt.modeling.layers.vein import REWIND

# (d_model, heads, r): one slice per head, several heads to a slice, one slice, slices narrower than a head, both.
SHAPES = [(16, 4, 1), (16, 4, 2), (16, 4, 4), (16, 4, 8), (24, 2, 3)]
B, T = 2, 6

torch.set_num_threads(1)


def build(shape=(16, 4, 4), s=1.0, tau=0.18, qk_norm=True, seed=0, **options) -> TVAAttentionLayer:
    """A float64 layer whose every parameter is away from its initial value."""
    d_model, heads, r = shape
    torch.manual_seed(seed)
    layer = TVAAttentionLayer(d_model, heads, TVAConfig(r=r, s=s, tau=tau, qk_norm=qk_norm), **options).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(mean=1.0 if "gain" in name else 0.0, std=0.1 if name == "w" else 0.4)
    return layer


def draw(*shape, seed=1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def reference(
    layer, x, memory=None, *, r, s=1.0, tau=0.18, qk_norm=True, causal=True, theta=10_000.0,
    positions=None, documents=None, padding=None, blocked=None, bias=None,
):  # fmt: skip
    """The output [B, T, D] and weights [B, H, T, S], from the definition; `blocked` and `bias` are [B, T, S]."""
    weights = dict(layer.state_dict())
    heads, d_model = layer.num_heads, x.shape[-1]
    d_head, d_vein = d_model // heads, d_model // r
    d_slice = math.gcd(d_vein, d_head)
    source = x if memory is None else memory
    rows, t_len, s_len = x.shape[0], x.shape[1], source.shape[1]
    if positions is None:
        positions = [list(range(t_len))] * rows
    key_positions = positions if memory is None else [list(range(s_len))] * rows

    def turn(vector, position):
        if theta is None:
            return vector
        turned = vector.clone()
        for i in range(len(vector) // 2):
            angle = position * theta ** (-2 * i / len(vector))
            a, b = vector[2 * i], vector[2 * i + 1]
            turned[2 * i] = a * math.cos(angle) - b * math.sin(angle)
            turned[2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return turned

    def norm(vector, gain):
        return vector / (vector.square().mean() + 1e-6).sqrt() * weights[gain] if qk_norm else vector

    out = torch.zeros_like(x)
    all_weights = torch.zeros(rows, heads, t_len, s_len, dtype=x.dtype)
    for b in range(rows):
        q = x[b] @ weights["w_in.weight"][:d_model].T
        c = source[b] @ weights["w_in.weight"][d_model:].T
        vein = c.clone()
        if causal and memory is None and s > 0:
            for t, j in itertools.product(range(s_len), (1, 2)):
                run = range(t - j, t + 1)
                whole = t - j >= 0 and all(
                    (padding is None or not padding[b, i])
                    and (documents is None or documents[b, i] == documents[b, t])
                    and positions[b][i] == positions[b][t] - (t - i)
                    for i in run
                )
                if whole:
                    vein[t] += s / tau * weights["w"][j - 1] * c[t - j]
        joined = torch.zeros(t_len, d_model, dtype=x.dtype)
        for h in range(heads):
            part = slice(h * d_head, (h + 1) * d_head)
            free = d_head - d_slice
            first = h % (d_vein // d_slice) * d_slice
            keys, values = [], []
            for t in range(s_len):
                key = turn(vein[t, first : first + d_slice], key_positions[b][t])
                if free:
                    key = torch.cat((weights["w_u.weight"][h * free : (h + 1) * free] @ vein[t], key))
                keys.append(norm(key, "k_gain"))
                values.append(weights["w_v.weight"][part] @ vein[t])
            for t in range(t_len):
                query = q[t, part]
                query = norm(torch.cat((query[:free], turn(query[free:], positions[b][t]))), "q_gain")
                scores = torch.full((s_len,), -math.inf, dtype=x.dtype)
                for u in range(s_len):
                    hidden = (
                        (causal and u > t)
                        or (padding is not None and padding[b, u])
                        or (documents is not None and documents[b, u] != documents[b, t])
                        or (blocked is not None and blocked[b, t, u])
                    )
                    if not hidden:
                        scores[u] = query @ keys[u] / math.sqrt(d_head) + (0 if bias is None else bias[b, t, u])
                if scores.max() > -math.inf:
                    all_weights[b, h, t] = scores.softmax(0)
                    joined[t, part] = sum(w * v for w, v in zip(all_weights[b, h, t], values, strict=True))
        out[b] = joined @ weights["w_o.weight"].T
    return out, all_weights


def call(layer, x, memory=None, attn_mask=None, key_padding_mask=None, **context):
    source = x if memory is None else memory
    return layer(x, source, source, attn_mask, key_padding_mask, context=AttentionContext(**context))


def same(got, wanted, tolerance=1e-13):
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("theta", [10_000.0, None])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("s", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_full_pass_is_the_definition(shape, s, qk_norm, theta):
    layer = build(shape, s=s, qk_norm=qk_norm, rope_theta=theta)
    x = draw(B, T, shape[0])
    wanted, weights = reference(layer, x, r=shape[2], s=s, qk_norm=qk_norm, theta=theta)
    same(layer(x, x, x)[0], wanted)
    got, got_weights = call(layer, x, need_weights=True)
    same(got, wanted)
    same(got_weights, weights)
    # One token at a time, in the latent itself.
    cache = layer.make_cache(B, T, dtype=torch.float64)
    with torch.no_grad():
        steps = [call(layer, x[:, t : t + 1], cache=cache, need_weights=True) for t in range(T)]
    same(torch.cat([out for out, _ in steps], 1), wanted)
    same(steps[-1][1], weights[:, :, -1:])


@pytest.mark.parametrize("shape", SHAPES)
def test_without_causality_nothing_is_generated(shape):
    layer = build(shape, causal=False)
    assert "w" not in layer.state_dict()
    x = draw(B, T, shape[0])
    same(layer(x, x, x)[0], reference(layer, x, r=shape[2], causal=False)[0])


@pytest.mark.parametrize("causal, length", [(False, 5), (False, T), (True, T)])
@pytest.mark.parametrize("shape", SHAPES)
def test_cross_attention(shape, causal, length):
    layer = build(shape, causal=causal)
    x, memory = draw(B, T, shape[0]), draw(B, length, shape[0], seed=2)
    padding = torch.zeros(B, length, dtype=torch.bool)
    padding[1, -2:] = True
    wanted, weights = reference(layer, x, memory, r=shape[2], causal=causal, padding=padding)
    got, got_weights = call(layer, x, memory, key_padding_mask=padding, need_weights=True)
    same(got, wanted)
    same(got_weights, weights)
    same(call(layer, x, memory, key_padding_mask=padding)[0], wanted)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_masks_padding_documents_positions_and_chunks(data):
    """Whatever restricts attention, and however the text is cut into calls with a cache."""
    shape = data.draw(st.sampled_from(SHAPES))
    s, qk_norm = data.draw(st.sampled_from([(1.0, True), (0.5, False), (0.0, True)]))
    seed = data.draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    layer = build(shape, s=s, qk_norm=qk_norm, seed=seed)
    x = draw(B, T, shape[0], seed=seed)

    def chance(name):
        return data.draw(st.booleans(), label=name)

    padding = torch.rand(B, T, generator=generator) < 0.3 if chance("padding") else None
    documents = (torch.rand(B, T, generator=generator) < 0.3).cumsum(1) if chance("documents") else None
    positions = (
        (torch.rand(B, T, generator=generator) < 0.3).cumsum(1) + torch.arange(T) if chance("positions") else None
    )
    blocked = torch.rand(B, T, T, generator=generator) < 0.3 if chance("blocked") else None
    bias = draw(B, T, T, seed=seed) if blocked is None and chance("bias") else None
    if bias is not None:
        bias = bias.masked_fill(torch.rand(B, T, T, generator=generator) < 0.2, -math.inf)
    mask = bias if blocked is None else blocked
    wanted, weights = reference(
        layer, x, r=shape[2], s=s, qk_norm=qk_norm, padding=padding, documents=documents, blocked=blocked, bias=bias,
        positions=None if positions is None else positions.tolist(),
    )  # fmt: skip
    float_padding = chance("padding as floats")
    if padding is not None and float_padding:
        padding = torch.zeros(B, T, dtype=torch.float64).masked_fill(padding, -math.inf)

    got, got_weights = call(
        layer, x, None, mask, padding, positions=positions, document_ids=documents, need_weights=True
    )
    same(got, wanted)
    same(got_weights, weights)
    same(call(layer, x, None, mask, padding, positions=positions, document_ids=documents)[0], wanted)

    cuts = sorted(data.draw(st.sets(st.integers(1, T - 1)), label="cuts"))
    cache = layer.make_cache(B, T, dtype=torch.float64)
    pieces = []
    for start, stop in itertools.pairwise([0, *cuts, T]):
        with torch.no_grad():
            out, _ = call(
                layer, x[:, start:stop], None,
                None if mask is None else mask[:, start:stop, :stop],
                None if padding is None else padding[:, :stop],
                positions=None if positions is None else positions[:, start:stop],
                document_ids=None if documents is None else documents[:, start:stop],
                cache=cache,
            )  # fmt: skip
        pieces.append(out)
    same(torch.cat(pieces, 1), wanted)


def test_positions_that_are_given_late_follow_those_that_were_not():
    layer, x = build(), draw(B, T, 16)
    positions = torch.tensor([0, 1, 2, 3, 9, 10])
    wanted, _ = reference(layer, x, r=4, positions=[positions.tolist()] * B)
    cache = layer.make_cache(B, T, dtype=torch.float64)
    with torch.no_grad():
        pieces = [call(layer, x[:, :4], cache=cache), call(layer, x[:, 4:], cache=cache, positions=positions[4:])]
    same(torch.cat([out for out, _ in pieces], 1), wanted)
    # And where they are left out again, a position is its index, as ever.
    cache.truncate(4)
    with torch.no_grad():
        again = [call(layer, x[:, t : t + 1], cache=cache, positions=None)[0] for t in range(4, T)]
    same(torch.cat(again, 1), layer(x, x, x)[0][:, 4:])


def test_an_emptied_cache_forgets_the_positions_it_was_given():
    layer, x = build(), draw(B, T, 16)
    cache = layer.make_cache(B, T, dtype=torch.float64)
    with torch.no_grad():
        call(layer, x, cache=cache, positions=torch.arange(T) * 2)
        assert "positions" in cache.tensors
        cache.truncate(0)
        same(call(layer, x, cache=cache)[0], layer(x, x, x)[0])
    assert "positions" not in cache.tensors


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cache_may_keep_less_precision_than_the_layer(shape):
    layer, x = build(shape), draw(B, T, shape[0])
    cache = layer.make_cache(B, T, dtype=torch.float32)
    with torch.no_grad():
        pieces = [call(layer, piece, cache=cache)[0] for piece in x.split([2, 1, T - 3], 1)]
    assert cache.tensors["vein"].dtype == torch.float32
    same(torch.cat(pieces, 1), layer(x, x, x)[0], tolerance=1e-5)


def test_a_left_padded_row_equals_the_row_alone():
    layer, x = build(), draw(1, T, 16)
    full = torch.cat((draw(1, 3, 16, seed=5), x), 1)
    padding = torch.tensor([[True] * 3 + [False] * T])
    positions = torch.tensor([[0, 0, 0, *range(T)]])
    got, _ = call(layer, full, key_padding_mask=padding, positions=positions)
    same(got[:, 3:], layer(x, x, x)[0])
    same(got[:, :3], torch.zeros_like(got[:, :3]))


@pytest.mark.parametrize("qk_norm", [True, False])
def test_without_the_extras_it_can_express_multi_head_attention(qk_norm):
    """r = 1, s = 0, no QK-norm: with W_c = W_k and V = W_v W_k^-1 the two are one function; the norm parts them."""
    mha = MHAAttentionLayer(16, 4, MHAConfig()).double()
    tva = build((16, 4, 1), s=0.0, qk_norm=qk_norm)
    w_q, w_k, w_v = mha.w_qkv.weight.detach().normal_(generator=torch.Generator().manual_seed(3)).split(16)
    with torch.no_grad():
        tva.w_in.weight.copy_(torch.cat((w_q, w_k)))
        tva.w_o.weight.copy_(mha.w_o.weight)
        # V_h reads the whole vein, which holds the keys of all heads.
        tva.w_v.weight.copy_(w_v @ torch.linalg.inv(w_k))
    x = draw(B, T, 16)
    difference = (tva(x, x, x)[0] - mha(x, x, x)[0]).abs().max().item()
    assert difference < 1e-12 if not qk_norm else difference > 1e-3


@pytest.mark.parametrize("cached", [False, True])
def test_what_comes_later_changes_nothing(cached):
    layer = build()
    x = draw(1, T, 16)
    for t in range(1, T):
        changed = x.clone()
        changed[:, t:] += draw(1, T - t, 16, seed=9)
        contexts = [{"cache": layer.make_cache(1, T, dtype=torch.float64)} if cached else {} for _ in range(2)]
        with torch.no_grad():
            before, after = call(layer, x, **contexts[0])[0], call(layer, changed, **contexts[1])[0]
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.allclose(before[:, t], after[:, t])


def test_causality_is_not_guessed_from_a_mask():
    x = draw(1, T, 16)
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    wanted, _ = reference(build(causal=False), x, r=4, causal=False, blocked=mask.expand(1, T, T))
    same(build(causal=False)(x, x, x, mask)[0], wanted)


@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_rows_that_see_nothing_are_zeros_and_leave_gradients_finite(as_float, cached):
    layer = build()
    x = draw(B, 3, 16).requires_grad_(not cached)
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[1] = True
    if as_float:
        mask = torch.zeros(3, 3, dtype=torch.float64).masked_fill(mask, -math.inf)
    if cached:
        cache = layer.make_cache(B, 3, dtype=torch.float64)
        with torch.no_grad():
            out = torch.cat([call(layer, x[:, [t]], None, mask[[t], : t + 1], cache=cache)[0] for t in range(3)], 1)
    else:
        out, weights = call(layer, x, None, mask, need_weights=True)
        assert weights[:, :, 1].eq(0).all()
        same(call(layer, x, None, mask)[0], out)
        call(layer, x, None, mask)[0].sum().backward()
        assert all(p.grad.isfinite().all() for p in [x, *layer.parameters()])
    assert out[:, 1].eq(0).all()
    assert out[:, [0, 2]].ne(0).all()


@pytest.mark.parametrize("shape", [(8, 2, 2), (8, 2, 4)])
def test_gradients(shape):
    layer = build(shape, s=0.5)
    x = draw(1, 3, 8).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, x, x))[0]

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_weights_sum_to_one_and_give_the_output():
    layer, x = build(), draw(B, T, 16)
    out, weights = call(layer, x, need_weights=True)
    same(weights.sum(-1), torch.ones(B, 4, T, dtype=torch.float64))
    assert layer(x, x, x)[1] is None
    same(out, layer(x, x, x)[0])


def test_dropout_is_seeded_and_only_for_training():
    layer, x = build(dropout=0.5), draw(B, T, 16)

    def run(seed):
        torch.manual_seed(seed)
        return layer(x, x, x)[0]

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    layer.eval()
    assert torch.equal(run(0), run(1))
    same(run(0), reference(layer, x, r=4)[0])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(16, 4, 4), (16, 4, 8)])
def test_bf16(shape, autocast):
    layer = build(shape).float()
    x = draw(B, T, 16).float()
    wanted = layer(x, x, x)[0]
    mask = torch.zeros(T, T)
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    cache = layer.make_cache(B, T, dtype=x.dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        full = layer(x, x, x)[0]
        masked = layer(x, x, x, mask)[0]
        steps = torch.cat([call(layer, x[:, [t]], None, mask[[t], : t + 1], cache=cache)[0] for t in range(T)], 1)
    for got in (full, masked, steps):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), wanted, rtol=0.1, atol=0.1)


def test_a_truncated_cache_goes_on_as_if_nothing_had_been_there():
    layer = build()
    n = REWIND + 8
    x, other = draw(B, n, 16), draw(B, n, 16, seed=7)
    wanted = layer(x, x, x)[0]
    for kept in (8, 9, n - 1, n, 0):
        cache = layer.make_cache(B, n, dtype=torch.float64)
        with torch.no_grad():
            call(layer, torch.cat((x[:, :kept], other[:, kept:-1]), 1), cache=cache)
            call(layer, other[:, -1:], cache=cache) if kept < n else None
            cache.truncate(kept)
            assert cache.length == min(kept, n)
            rest = [call(layer, x[:, t : t + 1], cache=cache)[0] for t in range(kept, n)]
        same(torch.cat([wanted[:, :kept], *rest], 1), wanted)


def test_a_cache_truncated_too_far_says_so():
    layer = build()
    cache = layer.make_cache(1, 64, dtype=torch.float64)
    with torch.no_grad():
        call(layer, draw(1, 60, 16), cache=cache)
    with pytest.raises(ProviderError, match="cannot be truncated from 60 to 20, by 32 at most; truncate it to 0"):
        cache.truncate(20)
    with pytest.raises(ProviderError):
        cache.truncate(60 - REWIND - 1)
    assert cache.length == 60
    cache.truncate(60 - REWIND)
    assert cache.length == 60 - REWIND
    plain = build(s=0.0)
    cache = plain.make_cache(1, 64, dtype=torch.float64)
    with torch.no_grad():
        call(plain, draw(1, 60, 16), cache=cache)
    cache.truncate(20)
    assert cache.length == 20


def test_rows_of_a_cache_can_be_chosen_and_repeated():
    layer, x = build(), draw(3, T, 16)
    rows = torch.tensor([2, 0, 2, 2])
    cache = layer.make_cache(3, T, dtype=torch.float64)
    with torch.no_grad():
        call(layer, x[:, :4], cache=cache)
        cache.select_rows(rows)
        got = [call(layer, x[rows, t : t + 1], cache=cache)[0] for t in range(4, T)]
    same(torch.cat(got, 1), layer(x, x, x)[0][rows, 4:])


def test_the_cache_holds_an_eighth_of_multi_head_attentions():
    def numbers(layer):
        cache = layer.make_cache(1, 512)
        x = torch.randn(1, 512, 128)
        with torch.no_grad():
            call(layer, x, cache=cache)
        tensors = [*cache.tensors.values(), getattr(cache, "recent_BPDc", None)]
        return sum(t.numel() for t in tensors if t is not None)

    tva, mha = TVAAttentionLayer(128, 4, TVAConfig()), MHAAttentionLayer(128, 4, MHAConfig())
    assert numbers(mha) == 512 * 256
    assert numbers(tva) == 512 * 32 + (REWIND + 2) * 32


def test_what_a_cache_cannot_do_is_said():
    layer, x = build(), draw(B, T, 16)
    cache = layer.make_cache(B, T - 1, dtype=torch.float64)
    with torch.no_grad():
        with pytest.raises(ProviderError, match="room for 5 positions and 6 are needed; make a longer cache"):
            call(layer, x, cache=cache)
        with pytest.raises(ProviderError, match="for 2 rows and the batch has 1"):
            call(layer, x[:1, :3], cache=cache)
        call(layer, x[:, :3], cache=cache)
        with pytest.raises(ProviderError, match="document_ids are given for some"):
            call(layer, x[:, 3:4], cache=cache, document_ids=torch.zeros(B, 1, dtype=torch.int64))
    with pytest.raises(ProviderError, match="a cache with cross-attention"):
        call(layer, x, x.clone(), cache=cache)
    with pytest.raises(ProviderError, match="document_ids with cross-attention"):
        call(layer, x, x.clone(), document_ids=torch.zeros(B, T, dtype=torch.int64))


def test_what_a_layer_cannot_do_is_said():
    layer, x = build(), draw(B, T, 16)
    with pytest.raises(ProviderError, match="keys and values from one latent"):
        layer(x, x, x.clone())
    with pytest.raises(ProviderError, match=r"causal and got 6 queries for 5 keys; .*causal=False"):
        layer(x, x[:, :5], x[:, :5])


@pytest.mark.parametrize(
    "shape, fits",
    [
        ((16, 4, 3), "1, 2, 4, 8"),
        ((16, 4, 16), "1, 2, 4, 8"),
        ((24, 4, 8), "1, 2, 3, 4, 6, 12"),
        ((30, 3, 2), "1, 3, 5, 15"),
    ],
)
def test_an_r_that_does_not_fit_is_refused_with_those_that_do(shape, fits):
    d_model, heads, r = shape
    with pytest.raises(ConfigError, match=f"model.tva.r: {r} does not fit d_model {d_model}.* r that fit: {fits}$"):
        build(shape)
    for r in map(int, fits.split(", ")):
        layer = build((d_model, heads, r))
        assert heads % layer.num_slices == 0 and layer.num_slices * layer.slice_dim * r == d_model


def test_sizes_that_no_r_fits():
    with pytest.raises(ConfigError, match="d_model / num_heads is even"):
        build((15, 3, 1))
    with pytest.raises(ConfigError, match="16 is not divisible by num_heads 3; heads that fit: 1, 2, 4"):
        build((16, 3, 1))


@pytest.mark.parametrize("config", [{"tau": 0}, {"tau": -1}, {"r": 0}, {"r": 2.5}, {"s": -1}, {"tua": 0.2}])
def test_a_config_that_makes_no_sense(config):
    with pytest.raises(ValidationError):
        TVAAttention(config)


def test_the_provider_serves_the_documented_snippet():
    registry = Registry()
    registry.register("attention", "tva_default", TVAAttention, default=True, section="tva")
    provider = registry.get("attention", "tva_default", {"r": 4, "tau": 0.18})
    assert (provider.get_name(), provider.get_version()) == ("tva_default", "1.0.0")
    layer = provider.create_layer(d_model=768, num_heads=12)
    assert (layer.d_model, layer.d_vein, layer.slice_dim, layer.num_slices) == (768, 192, 64, 3)
    assert layer.capabilities == {"cache", "documents", "cross_attention", "cross_cache", "weights"}
    x = torch.randn(1, 3, 768)
    assert layer(x, x, x)[0].shape == x.shape


def test_initial_weights():
    torch.manual_seed(0)
    layer = TVAAttentionLayer(256, 2, TVAConfig(r=4), num_layers=8)
    assert layer.free_dim == 64
    vein = layer.w_in.weight[256:]
    torch.testing.assert_close(vein @ vein.T, torch.eye(64), rtol=0, atol=1e-5)
    for weight, std in [
        (layer.w_in.weight[:256], 0.02),
        (layer.w_v.weight, 0.04),
        (layer.w_u.weight, 0.04),
        (layer.w_o.weight, 0.005),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert layer.w.shape == (2, 64)
    assert layer.w.eq(0).all() and layer.q_gain.eq(1).all() and layer.k_gain.eq(1).all()
    assert layer.w.no_weight_decay
    torch.manual_seed(0)
    again = TVAAttentionLayer(256, 2, TVAConfig(r=4), num_layers=8)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))


def test_parameters_are_there_only_where_they_are_used():
    assert set(build((16, 4, 4)).state_dict()) == {
        "w", "q_gain", "k_gain", "w_in.weight", "w_v.weight", "w_o.weight",
    }  # fmt: skip
    assert set(build((16, 4, 8), s=0.0, qk_norm=False).state_dict()) == {
        "w_in.weight", "w_u.weight", "w_v.weight", "w_o.weight",
    }  # fmt: skip


def test_a_state_dict_opens_in_another_layer_also_one_from_the_meta_device():
    layer, x = build(), draw(B, T, 16)
    wanted = layer(x, x, x)[0]
    other = build(seed=5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, x, x)[0], wanted)
    for assign in (False, True):
        with torch.device("meta"):
            bare = TVAAttentionLayer(16, 4, TVAConfig(r=4))
        if not assign:
            bare = bare.to_empty(device="cpu").double()
        bare.load_state_dict(layer.state_dict(), assign=assign)
        assert torch.equal(bare(x, x, x)[0], wanted)


def test_flops_count_the_matrices_and_the_scores():
    layer = build((16, 4, 8))
    matrices = 16 * (16 + 2) + 2 * 16 + 2 * 8 + 16 * 16
    assert layer.flops_per_token(10) == 2 * matrices + 2 * (2 * 16 * 10)


def test_rotation_is_by_interleaved_pairs():
    x = draw(1, 1, 1, 4)
    turned = rotate(x, RotaryEmbedding(4, 100.0).turns(torch.tensor([3]), 0, 0, x)).flatten()
    a, b, c, d = x.flatten().tolist()
    wanted = []
    for angle, (first, second) in [(3.0, (a, b)), (0.3, (c, d))]:
        wanted += [
            first * math.cos(angle) - second * math.sin(angle),
            first * math.sin(angle) + second * math.cos(angle),
        ]
    same(turned, torch.tensor(wanted, dtype=torch.float64))
