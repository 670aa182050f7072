"""Each layer of this package against core's `mha` with the same weights, under everything that restricts attention."""

from __future__ import annotations

import itertools
import math
from typing import Any

import flash_attn_reference as library
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apt.api import ConfigError
from apt.core.errors import AptWarning, ProviderError
from apt.core.providers.attention import AttentionContext
from apt.modeling.layers.attention_mha import MHAAttentionLayer
from apt.modeling.layers.config import MHAConfig
from apt_plugin_flash.config import WindowedMHAConfig
from apt_plugin_flash.flash import FlashLayer
from apt_plugin_flash.flex import FlexLayer
from apt_plugin_flash.sdpa import SDPALayer

torch.set_num_threads(1)
B, T, D, H = 2, 6, 16, 4
LAYERS: list[type[SDPALayer]] = [SDPALayer, FlexLayer, FlashLayer]
every_layer = pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.name)
quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    return library.install(monkeypatch, torch.float64)


def pair(
    kind: type[SDPALayer], *, dtype: torch.dtype = torch.float64, seed: int = 0, window: int | None = None,
    num_kv_heads: int | None = None, qk_norm: bool = False, bias: bool = False, **options: Any,
) -> tuple[SDPALayer, MHAAttentionLayer]:  # fmt: skip
    """A layer and core's, with equal weights."""
    section = {"num_kv_heads": num_kv_heads, "qk_norm": qk_norm, "bias": bias}
    theirs = MHAAttentionLayer(D, H, MHAConfig.model_validate(section), **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(mean=1.0 if "gain" in name else 0.0, std=0.4, generator=generator)
    ours = kind(D, H, WindowedMHAConfig.model_validate({**section, "window": window}), **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(got: torch.Tensor | None, wanted: torch.Tensor | None, atol: float = 1e-12) -> None:
    assert got is not None and wanted is not None
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def band(length: int, window: int) -> torch.Tensor:
    """Blocked: what lies `window` positions back or more."""
    at = torch.arange(length)
    return at[:, None] - at >= window


@every_layer
@quick
@given(data=st.data())
@torch.no_grad()
def test_what_restricts_mha_restricts_it_alike_whole_and_in_pieces(kind: type[SDPALayer], data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    window = data.draw(st.sampled_from([None, 1, 3]), label="window")
    ours, theirs = pair(
        kind, window=window, num_kv_heads=data.draw(st.sampled_from([None, 2, 1])), qk_norm=data.draw(st.booleans())
    )
    x = draw(B, T, D)

    def maybe(name: str, chance: float, *shape: int) -> torch.Tensor | None:
        return torch.rand(*shape, generator=generator) < chance if data.draw(st.booleans(), label=name) else None

    padding, breaks, jumps = maybe("padding", 0.3, B, T), maybe("documents", 0.3, B, T), maybe("positions", 0.3, B, T)
    mask = maybe("mask", 0.3, *([B] if data.draw(st.booleans()) else []), T, T)
    if mask is not None and data.draw(st.booleans(), label="float"):
        mask = draw(*mask.shape).masked_fill(mask, -math.inf)
    documents = None if breaks is None else breaks.cumsum(1)
    positions = None if jumps is None else jumps.cumsum(1) + torch.arange(T)
    limited = mask
    if window is not None:
        past = band(T, window)
        limited = (
            past if mask is None else mask | past if mask.dtype == torch.bool else mask.masked_fill(past, -math.inf)
        )
    wanted = theirs(x, x, x, limited, padding, context=AttentionContext(positions, documents))[0]
    same(ours(x, x, x, mask, padding, context=AttentionContext(positions, documents))[0], wanted)

    cache = ours.make_cache(B, T + 3, dtype=torch.float64)
    cuts = sorted(data.draw(st.sets(st.integers(1, T - 1), max_size=3), label="cuts"))
    pieces = []
    for start, stop in itertools.pairwise([0, *cuts, T]):
        piece = x[:, start:stop]
        context = AttentionContext(
            None if positions is None else positions[:, start:stop],
            None if documents is None else documents[:, start:stop],
            cache,
        )
        own_mask = None if mask is None else mask[..., start:stop, :stop]
        own_padding = None if padding is None else padding[:, :stop]
        pieces.append(ours(piece, piece, piece, own_mask, own_padding, context=context)[0])
    same(torch.cat(pieces, 1), wanted)


@every_layer
@pytest.mark.parametrize("window", [None, 2])
@torch.no_grad()
def test_the_weights_are_those_of_mha(kind: type[SDPALayer], window: int | None) -> None:
    ours, theirs = pair(kind, window=window, num_kv_heads=2)
    x, padding = draw(B, T, D), torch.arange(T).expand(B, T) < torch.tensor([[0], [2]])
    context = AttentionContext(need_weights=True)
    wanted = theirs(x, x, x, None if window is None else band(T, window), padding, context=context)
    for got, expected in zip(ours(x, x, x, None, padding, context=context), wanted, strict=True):
        same(got, expected)


@every_layer
@torch.no_grad()
def test_rows_that_see_nothing_are_zeros(kind: type[SDPALayer]) -> None:
    ours, _ = pair(kind)
    x, padding = draw(B, T, D), torch.zeros(B, T, dtype=torch.bool)
    padding[0, :3] = True
    out = ours(x, x, x, None, padding)[0]
    assert out[0, :3].eq(0).all() and out[0, 3:].ne(0).all() and out[1].ne(0).all()


@every_layer
@torch.no_grad()
def test_cross_attention(kind: type[SDPALayer]) -> None:
    ours, theirs = pair(kind, causal=False, bias=True, num_kv_heads=2)
    query, key = draw(B, T, D), draw(B, 9, D, seed=2)
    padding = torch.zeros(B, 9, dtype=torch.bool)
    padding[1, 4:] = True
    same(ours(query, key, key)[0], theirs(query, key, key)[0])
    same(ours(query, key, key, None, padding)[0], theirs(query, key, key, None, padding)[0])
    same(ours(query, query, query)[0], theirs(query, query, query)[0])
    with pytest.raises(ProviderError, match=f"{kind.name} is causal and got 6 queries for 9 keys"):
        pair(kind)[0](query, key, key)


@every_layer
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("documents", [False, True])
@torch.no_grad()
def test_in_bf16(kind: type[SDPALayer], autocast: bool, documents: bool) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    ours, theirs = pair(kind, dtype=dtype, qk_norm=True, num_kv_heads=2)
    exact = pair(kind, qk_norm=True, num_kv_heads=2)[1]
    x = draw(B, T, D)
    ids = (torch.arange(T) // 4).expand(B, T) if documents else None
    wanted = exact(x, x, x, context=AttentionContext(document_ids=ids))[0]
    x = x.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        full = ours(x, x, x, context=AttentionContext(document_ids=ids))[0]
        reference = theirs(x, x, x, context=AttentionContext(document_ids=ids))[0]
        cache = ours.make_cache(B, T, dtype=dtype)
        steps = []
        for piece, own in zip(x.split(2, 1), [None] * 3 if ids is None else ids.split(2, 1), strict=True):
            steps.append(ours(piece, piece, piece, context=AttentionContext(document_ids=own, cache=cache))[0])
    tolerance = 2 * (reference.double() - wanted).abs().max().item() + 0.02
    for got in (full, torch.cat(steps, 1)):
        assert got.dtype == reference.dtype == torch.bfloat16
        same(got.double(), wanted, tolerance)


@every_layer
@pytest.mark.parametrize("documents", [False, True])
def test_gradients_are_those_of_mha(kind: type[SDPALayer], documents: bool) -> None:
    ours, theirs = pair(kind, qk_norm=True, num_kv_heads=2)
    context = AttentionContext(document_ids=(torch.arange(T) // 4).expand(B, T) if documents else None)
    gradients = []
    for layer in (ours, theirs):
        x = draw(B, T, D).requires_grad_()
        layer(x, x, x, context=context)[0].sin().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    for got, wanted in zip(*gradients, strict=True):
        same(got, wanted)


@every_layer
def test_dropout_is_applied_in_training_alone(kind: type[SDPALayer]) -> None:
    ours, theirs = pair(kind, dropout=0.5)
    x = draw(B, T, D)
    torch.manual_seed(0)
    first, second = ours(x, x, x)[0], ours(x, x, x)[0]
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, theirs.eval()(x, x, x)[0])
    with torch.no_grad():
        same(ours.eval()(x, x, x)[0], theirs.eval()(x, x, x)[0])


@every_layer
def test_a_window_looks_back_alone(kind: type[SDPALayer]) -> None:
    with pytest.raises(ConfigError, match=r"model\.mha\.window: .* not causal"):
        pair(kind, causal=False, window=2)
    with pytest.raises(ValueError, match="greater than 0"):
        WindowedMHAConfig(window=0)


@every_layer
def test_masks_that_do_not_fit_are_refused_as_mha_refuses_them(kind: type[SDPALayer]) -> None:
    ours, _ = pair(kind)
    x = draw(B, T, D)
    with torch.no_grad():
        for mask, padding, message in [
            (torch.zeros(T, T + 1, dtype=torch.bool), None, r"attn_mask is \[6, 7\], expected \[6, 6\] or \[2, 6, 6\]"),
            (None, torch.zeros(B, T + 1, dtype=torch.bool), r"key_padding_mask is \[2, 7\]"),
            (None, torch.zeros(B, T, dtype=torch.int64), r"key_padding_mask is torch.int64"),
        ]:
            with pytest.raises(ProviderError, match=message):
                ours(x, x, x, mask, padding)


@torch.no_grad()
def test_as_many_rows_as_positions_are_still_rows() -> None:
    """A padding [B, S] has the shape of a mask [T, S] where B == T."""
    ours, theirs = pair(FlexLayer)
    x, padding = draw(T, T, D), torch.arange(T).expand(T, T) < torch.arange(T)[:, None]
    same(ours(x, x, x, None, padding)[0], theirs(x, x, x, None, padding)[0])


def test_where_no_fused_kernel_serves_it_is_said_once() -> None:
    ours, _ = pair(SDPALayer, dropout=0.1, dtype=torch.float32)
    x = draw(B, T, D, dtype=torch.float32)
    with pytest.warns(AptWarning, match=r"no fused kernel on cpu for float32, heads of 4 and dropout of 0.1") as told:
        ours(x, x, x)
        ours(x, x, x)
    assert len(told) == 1
    bias = torch.zeros(T, T, requires_grad=True)
    with pytest.warns(AptWarning, match="and a mask that is learned"):
        ours.eval()(x, x, x, bias)[0].sum().backward()
    assert bias.grad is not None and bias.grad.ne(0).any()


@torch.no_grad()
def test_groups_of_heads_are_taken_apart_where_a_kernel_serves_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    from apt_plugin_flash import sdpa

    ours, theirs = pair(SDPALayer, num_kv_heads=2)
    asked: list[int] = []

    def equal_heads_alone(q: torch.Tensor, k: torch.Tensor, *_: Any) -> bool:
        asked.append(k.shape[1])
        return k.shape[1] == q.shape[1]

    monkeypatch.setattr(sdpa, "is_fused", equal_heads_alone)
    x, padding = draw(B, T, D), torch.arange(T).expand(B, T) < 1
    same(ours(x, x, x, None, padding)[0], theirs(x, x, x, None, padding)[0])
    assert asked == [2, 4] and not ours.said
