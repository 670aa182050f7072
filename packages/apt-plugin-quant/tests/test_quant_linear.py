"""One linear map: what it computes quantised and in training for it, beside references written from the definitions."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torchao", reason="the schemes are torchao's")

from apt_plugin_quant.linear import FakeQuantizedLinear, QuantizedLinear, straight_through
from apt_plugin_quant.schemes import Int4, Int8, Scheme, dequantized, plain_parts

SCHEMES = [Int8(), Int8(dynamic=True), Int4(8), Int4(24)]
IDS = ["int8", "int8_dynamic", "int4 in groups of 8", "int4 by row"]


def linear(inputs: int = 24, outputs: int = 10, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias)


def check_rounded(values_RG: Tensor, rounded_RG: Tensor, low: int, high: int) -> None:
    """The definition: the largest of each row goes to the end of the range, and each to the nearest whole multiple of
    the scale within it; to either of two that are equally near, as the largest itself is."""
    scale_R1 = values_RG.abs().amax(1, keepdim=True) / ((high - low) / 2)
    q_RG = rounded_RG / scale_R1
    torch.testing.assert_close(q_RG, q_RG.round(), rtol=0, atol=1e-4)
    assert low <= q_RG.round().min()
    assert q_RG.round().max() <= high
    assert ((rounded_RG - values_RG).abs() <= scale_R1 * 0.5001).all()


def by_definition(scheme: Scheme, quantised: QuantizedLinear) -> Tensor:
    """[O, I] from what lies on disk: each integer times the scale of its row or group."""
    parts = plain_parts(quantised.qweight, scheme)
    q_OI = scheme.unpack(parts["qdata"], quantised.in_features).float()
    return q_OI * parts["scale"].repeat_interleave(quantised.in_features // parts["scale"].shape[1], dim=1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_the_definition_says(scheme: Scheme, bias: bool) -> None:
    map = linear(bias=bias)
    x = torch.randn(7, 24)
    quantised = QuantizedLinear(map, scheme)
    group, low, high = (scheme.group, -8, 7) if isinstance(scheme, Int4) else (24, -128, 127)
    weight_OI = by_definition(scheme, quantised)
    check_rounded(map.weight.detach().reshape(-1, group), weight_OI.reshape(-1, group), low, high)
    torch.testing.assert_close(quantised.weight, weight_OI)
    seen = scheme.rounded_inputs(x)
    if scheme == Int8(dynamic=True):
        check_rounded(x, seen, -128, 127)
    else:
        assert seen is x
    with torch.no_grad():
        torch.testing.assert_close(quantised(x), F.linear(seen, weight_OI, map.bias), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(quantised(x.view(7, 1, 24)).squeeze(1), quantised(x), rtol=1e-5, atol=1e-6)
        error = (quantised(x) - map(x)).norm() / map(x).norm()
    assert 0 < error < (0.15 if isinstance(scheme, Int4) else 0.02)


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_a_row_of_zeros_stays_one(scheme: Scheme) -> None:
    map = linear(bias=False)
    nn.init.zeros_(map.weight[3:5].detach())
    with torch.no_grad():
        assert not QuantizedLinear(map, scheme)(torch.randn(4, 24))[:, 3:5].any()


def test_a_larger_batch_and_larger_weights_scale_with_it() -> None:
    """Scales are relative: a map times 1000 is the quantised map times 1000."""
    map, x = linear(bias=False), torch.randn(5, 24)
    large = copy.deepcopy(map)
    with torch.no_grad():
        large.weight.mul_(1024)
        for scheme in SCHEMES:
            torch.testing.assert_close(QuantizedLinear(large, scheme)(x), 1024 * QuantizedLinear(map, scheme)(x))


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_two_halves_to_a_byte_and_back(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=generator)
    packed = Int4(columns).pack(q)
    assert packed.shape == (rows, (columns + 1) // 2)
    assert packed.dtype == torch.uint8
    assert torch.equal(Int4(columns).unpack(packed, columns), q)


def test_the_low_half_of_a_byte_is_the_even_column() -> None:
    q = torch.tensor([[-8, 7, -1, 3, 5]], dtype=torch.int8)
    assert Int4(5).pack(q).tolist() == [[0x78, 0x3F, 0x05]]


@pytest.mark.parametrize("scheme", [*SCHEMES, Int4(7)], ids=[*IDS, "int4, rows of an odd length"])
def test_its_state_dict_is_plain_and_brings_it_back_bit_for_bit(scheme: Scheme) -> None:
    inputs = 7 if scheme == Int4(7) else 24
    one, other = (QuantizedLinear(linear(inputs, seed=seed), scheme) for seed in (0, 1))
    state = one.state_dict()
    assert list(state) == ["weight.qdata", "weight.scale", "bias"]
    assert all(type(tensor) is Tensor for tensor in state.values())
    read = load(save(state))
    other.load_state_dict(read)
    x = torch.randn(3, inputs)
    with torch.no_grad():
        assert torch.equal(one(x), other(x))
        assert torch.equal(copy.deepcopy(one)(x), one(x))
        assert torch.equal(copy.deepcopy(one).to("cpu")(x), one(x))
    assert all(torch.equal(a, b) for a, b in zip(state.values(), other.state_dict().values(), strict=True))


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    map = QuantizedLinear(linear(), Int4(8))
    before = {key: tensor.clone() for key, tensor in map.state_dict().items()}
    faults = {
        "weight.qdata is torch.int8": {**before, "weight.qdata": torch.zeros(10, 12, dtype=torch.int8)},
        r"weight.scale is torch.float32 \[10, 4\], not": {**before, "weight.scale": torch.zeros(10, 4)},
        "Missing key.*weight.scale": {k: v for k, v in before.items() if k != "weight.scale"},
        "Unexpected key.*weight.zero": {**before, "weight.zero": torch.zeros(1)},
    }
    for message, state in faults.items():
        with pytest.raises(RuntimeError, match=message):
            QuantizedLinear(linear(), Int4(8)).load_state_dict(state)
    map.load_state_dict({}, strict=False)
    assert all(torch.equal(before[key], tensor) for key, tensor in map.state_dict().items())


# Training for it


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_active_it_computes_what_it_will_compute_quantised(scheme: Scheme) -> None:
    map, x = linear(), torch.randn(6, 24)
    fake = FakeQuantizedLinear(map, scheme)
    assert torch.equal(fake(x), map(x))
    fake.active = True
    with torch.no_grad():
        torch.testing.assert_close(fake(x), QuantizedLinear(map, scheme)(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_the_gradient_goes_straight_through(scheme: Scheme) -> None:
    """By definition: that of the map with the rounded numbers in place of its own, as if they were the variables."""
    map, x = linear(), torch.randn(6, 24, requires_grad=True)
    fake = FakeQuantizedLinear(map, scheme)
    fake.active = True
    target = torch.randn(6, 10)
    (fake(x) * target).sum().backward()
    seen = scheme.rounded_inputs(x.detach())
    weight_OI = dequantized(scheme.quantize(map.weight.detach()))
    assert map.weight.grad is not None
    torch.testing.assert_close(map.weight.grad, target.T @ seen)
    torch.testing.assert_close(x.grad, target @ weight_OI)
    assert map.bias.grad is not None
    torch.testing.assert_close(map.bias.grad, target.sum(0))


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other() -> None:
    x = torch.tensor([0.3, -1.7, 2.5], requires_grad=True)
    y = straight_through(x, x.detach().round())
    assert y.tolist() == [0.0, -2.0, 2.0]
    (y**2).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, -4.0, 4.0]
    assert straight_through(x, x) is x


def test_in_training_it_shares_its_parameters_and_draws_nothing() -> None:
    map = linear()
    before = torch.get_rng_state()
    fake = FakeQuantizedLinear(map, Int8())
    assert torch.equal(torch.get_rng_state(), before)
    assert fake.weight is map.weight
    assert fake.bias is map.bias
    assert list(fake.state_dict()) == list(map.state_dict())


def test_parts_of_an_int8_matrix() -> None:
    tensor = Int8().quantize(torch.tensor([[0.0, 1.0], [-2.0, 0.5]]))
    parts = plain_parts(tensor, Int8())
    assert parts["qdata"][0].tolist() == [0, 127]
    assert parts["qdata"][1].tolist() in ([-128, 32], [-127, 32]), "127.5 is as near to the one as to the other"
    torch.testing.assert_close(parts["scale"], torch.tensor([[1 / 127.5], [2 / 127.5]]))
