"""Rotary positions against their definition, and the table behind them."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from apt.modeling.layers.rope import LONGEST_TABLE, RotaryEmbedding, rotate


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def turned(x: torch.Tensor, positions: list[list[int]], theta: float) -> torch.Tensor:
    """Pair by pair, in plain floats."""
    out = x.clone()
    for b, row in enumerate(positions):
        for t, position in enumerate(row):
            for i in range(x.shape[-1] // 2):
                angle = position * theta ** (-2 * i / x.shape[-1])
                a, c = x[b, t, :, 2 * i], x[b, t, :, 2 * i + 1]
                out[b, t, :, 2 * i] = a * math.cos(angle) - c * math.sin(angle)
                out[b, t, :, 2 * i + 1] = a * math.sin(angle) + c * math.cos(angle)
    return out


@pytest.mark.parametrize("compiling", [False, True])
def test_rotation_is_the_definition_in_either_arithmetic(monkeypatch: pytest.MonkeyPatch, compiling: bool) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x = draw(2, 3, 2, 8)
    rope = RotaryEmbedding(8, 100.0)
    torch.testing.assert_close(
        rotate(x, rope.turns(None, 5, 8, x)), turned(x, [[5, 6, 7]] * 2, 100.0), rtol=0, atol=1e-14
    )
    for positions in ([[5, 6, 7]] * 2, [[0, 4, 1], [9, 2, 2]], [[-1, 0, -7]] * 2, [[LONGEST_TABLE, 1, 2]] * 2):
        turns = rope.turns(torch.tensor(positions), 0, 0, x)
        torch.testing.assert_close(rotate(x, turns), turned(x, positions, 100.0), rtol=0, atol=1e-10)
    one_row = rope.turns(torch.tensor([3, 1, 2]), 0, 0, x)
    torch.testing.assert_close(rotate(x, one_row), turned(x, [[3, 1, 2]] * 2, 100.0), rtol=0, atol=1e-14)


def test_a_product_knows_the_distance_alone() -> None:
    q, k = draw(1, 1, 1, 16), draw(1, 1, 1, 16).flip(-1)
    rope = RotaryEmbedding(16, 10_000.0)

    def product(position_q: int, position_k: int) -> float:
        turns = [rope.turns(torch.tensor([p]), 0, 0, q) for p in (position_q, position_k)]
        return float((rotate(q, turns[0]) * rotate(k, turns[1])).sum())

    assert product(7, 3) == pytest.approx(product(1007, 1003), abs=1e-10)
    assert product(7, 3) != pytest.approx(product(8, 3), abs=1e-3)


def test_the_table_grows_and_keeps_what_it_says() -> None:
    rope, x = RotaryEmbedding(4, 10_000.0), draw(1, dtype=torch.float32)
    first = rope.turns(None, 0, 3, x).clone()
    assert rope.turns(None, 0, 3000, x).shape == (3000, 2, 2)
    assert torch.equal(rope.turns(None, 0, 3, x), first)
    assert torch.equal(rope.turns(None, 0, 3000, x)[2999], rope.turns(torch.tensor([2999]), 0, 0, x)[0])


def test_the_table_is_exact_whatever_the_model_is_made_of() -> None:
    rope = RotaryEmbedding(64, 10_000.0)
    exact = rope.turns(None, 0, 4096, draw(1)).clone()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        turns = rope.turns(None, 0, 4096, draw(1).to(dtype))
        assert turns.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(turns.double(), exact, rtol=0, atol=1e-7)
    x = draw(1, 4, 1, 64).bfloat16()
    assert rotate(x, rope.turns(None, 0, 4, x)).dtype == torch.bfloat16


def test_a_table_first_used_in_inference_mode_serves_training_too() -> None:
    rope, x = RotaryEmbedding(4, 10_000.0), draw(1, 3, 1, 4).requires_grad_()
    with torch.inference_mode():
        rotate(x, rope.turns(None, 0, 3, x))
    rotate(x, rope.turns(None, 0, 3, x)).sum().backward()
    assert x.grad is not None


def test_a_table_from_the_meta_device_is_rebuilt() -> None:
    with torch.device("meta"):
        rope = RotaryEmbedding(4, 10_000.0)
        rope.turns(None, 0, 3, torch.empty(1))
    x = draw(1)
    assert torch.equal(copy.deepcopy(rope).turns(None, 0, 3, x), RotaryEmbedding(4, 10_000.0).turns(None, 0, 3, x))


def test_an_exported_model_turns_any_length() -> None:
    class Turn(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return rotate(x, RotaryEmbedding(4, 100.0).turns(None, 0, x.shape[1], x))

    length = torch.export.Dim("length")
    exported = torch.export.export(Turn(), (draw(1, 3, 2, 4),), dynamic_shapes=({1: length},), strict=False).module()
    x = draw(1, 70, 2, 4)
    torch.testing.assert_close(exported(x), turned(x, [list(range(70))], 100.0))
