"""Masks and the attention under them, against sums and loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.core.errors import ProviderError
from apt.modeling.layers.masks import Mask, attend, build_mask, masked_softmax, padded

torch.set_num_threads(1)
B, H, D = 2, 4, 6


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_where_nothing_restricts_there_is_no_mask() -> None:
    q = draw(B, H, 5, D)
    assert build_mask(5, 5, q, causal=False) == Mask()
    assert build_mask(5, 5, q, causal=True) == Mask(causal=True)
    assert build_mask(1, 9, q, causal=True) == Mask()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_attention_is_the_definition_under_every_mask(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    causal, groups = data.draw(st.booleans()), data.draw(st.sampled_from([1, 2, 4]))
    T = data.draw(st.integers(1, 4))
    S = T + data.draw(st.integers(0, 3))

    def mask(name: str, *shape: int) -> torch.Tensor | None:
        kind = data.draw(st.sampled_from(["none", "bool", "float"]), label=name)
        if kind == "none":
            return None
        blocked = torch.rand(*shape, generator=generator) < 0.4
        return blocked if kind == "bool" else draw(*shape, seed=seed).masked_fill(blocked, -math.inf)

    attn_mask = mask("attn_mask", *([B] if data.draw(st.booleans()) else []), T, S)
    key_padding_mask = mask("key_padding_mask", B, S)
    documents = torch.randint(0, 2, (B, S), generator=generator) if data.draw(st.booleans()) else None
    q, k, v = (
        draw(B, H, T, D, seed=seed),
        draw(B, H // groups, S, D, seed=seed + 1),
        draw(B, H // groups, S, D, seed=seed + 2),
    )

    scores = torch.einsum("bhtd,bhsd->bhts", q, k.repeat_interleave(groups, 1)) / math.sqrt(D)
    for given_mask, view in ((attn_mask, attn_mask), (key_padding_mask, key_padding_mask)):
        if given_mask is None:
            continue
        view = given_mask[:, None, None] if given_mask is key_padding_mask else given_mask
        view = view[:, None] if given_mask is attn_mask and given_mask.dim() == 3 else view
        scores = scores.masked_fill(view, -math.inf) if view.dtype == torch.bool else scores + view
    if documents is not None:
        scores = scores.masked_fill((documents[:, S - T :, None] != documents[:, None])[:, None], -math.inf)
    if causal:
        late = torch.arange(S)[None] > torch.arange(S - T, S)[:, None]
        scores = scores.masked_fill(late, -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    wanted = weights @ v.repeat_interleave(groups, 1)

    made = build_mask(
        T, S, q, causal=causal, attn_mask=attn_mask, key_padding_mask=key_padding_mask,
        query_documents_BT=None if documents is None else documents[:, S - T :], key_documents_BS=documents,
    )  # fmt: skip
    torch.testing.assert_close(attend(q, k, v, made)[0], wanted, rtol=0, atol=1e-13)
    got, got_weights = attend(q, k, v, made, need_weights=True)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(got_weights, weights, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        masked_softmax(scores, Mask(blind=made.blind)).nan_to_num(0.0), weights, rtol=0, atol=1e-13
    )


def test_what_is_finite_in_float32_may_block_wholly_in_fewer_bits() -> None:
    q = draw(1, 1, 2, D).half()
    mask = torch.zeros(2, 2)
    mask[0] = torch.finfo(torch.float32).min
    made = build_mask(2, 2, q, causal=False, attn_mask=mask)
    assert made.visible is not None and made.visible.dtype == torch.half
    out = attend(q, q, q, made)[0]
    assert out.isfinite().all() and out[0, 0, 0].eq(0).all() and out[0, 0, 1].ne(0).any()


def test_a_learned_bias_gets_its_gradient() -> None:
    q = draw(1, 1, 3, D)
    bias = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    attend(q, q, q, build_mask(3, 3, q, causal=True, attn_mask=bias))[0].sum().backward()
    assert bias.grad is not None
    assert bias.grad.triu(1).eq(0).all() and bias.grad[2].ne(0).all()


def test_padding_in_floats_is_what_lies_at_minus_infinity() -> None:
    assert padded(None) is None
    mask = torch.tensor([[0.0, -math.inf, -3.0]])
    assert padded(mask) is not None and padded(mask).tolist() == [[False, True, False]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "masks, message",
    [
        ({"attn_mask": torch.zeros(3, 4)}, r"attn_mask is \[3, 4\], expected \[3, 5\] or \[2, 3, 5\]"),
        ({"attn_mask": torch.zeros(1, 3, 5)}, r"attn_mask is \[1, 3, 5\]"),
        ({"key_padding_mask": torch.zeros(2, 3)}, r"key_padding_mask is \[2, 3\], expected \[2, 5\]; count cached"),
        (
            {"key_padding_mask": torch.ones(2, 5, dtype=torch.int64)},
            r"torch.int64; give a boolean mask \(True = blocked\)",
        ),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(masks: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ProviderError, match=message):
        build_mask(3, 5, draw(B, H, 3, D), causal=False, **masks)
