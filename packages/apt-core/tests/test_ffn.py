"""Feed-forward layers, norms and the counting of parameters and FLOPs."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from apt.core.registry import Provider
from apt.modeling.layers.counting import flops_per_token, num_params
from apt.modeling.layers.ffn import DefaultFFN, SwiGLU
from apt.modeling.layers.norm import make_norm, rms_norm


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
def test_the_default_is_two_matrices_around_a_gelu(bias: bool) -> None:
    layer = DefaultFFN({"bias": bias}).create_layer(4, 6).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = draw(2, 3, 4)
    hidden = x @ layer.w_in.weight.T + (layer.w_in.bias if bias else 0)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(layer(x), hidden @ layer.w_out.weight.T + (layer.w_out.bias if bias else 0))


@pytest.mark.parametrize("bias", [True, False])
def test_swiglu_is_a_gate_through_a_silu(bias: bool) -> None:
    layer = SwiGLU({"bias": bias}).create_layer(4, 6).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = draw(2, 3, 4)

    def product(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return x @ linear.weight.T + (linear.bias if bias else 0)

    gate = product(layer.w_gate, x)
    torch.testing.assert_close(layer(x), product(layer.w_down, gate / (1 + torch.exp(-gate)) * product(layer.w_up, x)))


@pytest.mark.parametrize("provider, matrices", [(DefaultFFN, 2), (SwiGLU, 3)])
def test_sizes_initial_weights_and_counts(provider: type[Provider], matrices: int) -> None:
    torch.manual_seed(0)
    made = provider({})
    layer = made.create_layer(128, 512, num_layers=8, a_key_of_a_later_model=1)  # type: ignore[attr-defined]
    assert made.get_name() == {2: "default", 3: "swiglu"}[matrices]
    assert made.get_version() == "1.0.0"
    assert layer.d_model == 128 and layer.d_ff == 512
    *others, last = layer.parameters()
    assert len(others) + 1 == matrices
    assert all(w.std().item() == pytest.approx(0.02, rel=0.05) for w in others)
    assert last.std().item() == pytest.approx(0.005, rel=0.05)
    assert num_params(layer) == matrices * 128 * 512
    assert flops_per_token(layer, 77) == 2 * matrices * 128 * 512
    biased = provider({"bias": True}).create_layer(8, 16)  # type: ignore[attr-defined]
    assert all(p.eq(0).all() for name, p in biased.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("provider", [DefaultFFN, SwiGLU])
def test_dropout_is_for_training_alone(provider: type[Provider]) -> None:
    layer = provider({}).create_layer(8, 16, dropout=0.5)  # type: ignore[attr-defined]
    x = draw(1, 64, 8).float()
    assert layer(x).eq(0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    layer.eval()
    assert layer(x).ne(0).all()


def test_a_key_that_the_section_does_not_have() -> None:
    with pytest.raises(ValidationError, match="baias"):
        SwiGLU({"baias": True})


def test_norms() -> None:
    x = draw(2, 3, 8)
    root = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(rms_norm(x), x / root)
    torch.testing.assert_close(make_norm("rmsnorm", 8).double()(x), x / root)
    centred = x - x.mean(-1, keepdim=True)
    norm = make_norm("layernorm", 8).double()
    torch.testing.assert_close(norm(x), centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    assert [name for name, _ in norm.named_parameters()] == ["weight"]


def test_a_part_that_says_nothing_is_counted_by_its_matrices() -> None:
    part = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    assert num_params(part) == 15 + 5 + 10
    assert flops_per_token(part, 100) == 30
    shared = nn.Linear(4, 4, bias=False)
    assert num_params(nn.ModuleList([shared, nn.ModuleList([shared])])) == 16
