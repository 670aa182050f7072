"""Whole models: what a scheme takes and what it leaves, decoding, group sizes, and layers that read their weights."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

pytest.importorskip("torchao", reason="the schemes are torchao's")

from apt.api import AptWarning, ConfigError, ModelBuilder
from apt.core.registry import Registry
from apt_plugin_quant import plugin
from apt_plugin_quant.linear import FakeQuantizedLinear, QuantizedLinear
from apt_plugin_quant.providers import Int4Weights, Int8Dynamic, Int8Weights, LinearScheme, divisors, group_within

PROVIDERS = [Int8Weights, Int8Dynamic, Int4Weights]


def gpt(**model: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "num_heads": 4, "num_layers": 2, "max_seq_len": 16, "vocab_size": 20}
    built = ModelBuilder({"model": {**sizes, **model}}).build_model().eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.ndim > 1 and "embedding" not in name:
                parameter.mul_(5)  # initial weights hardly say anything
    return built


TOKENS = torch.randint(0, 20, (2, 12), generator=torch.Generator().manual_seed(1))


def quantised(model: nn.Module, provider: LinearScheme) -> Any:
    return provider.quantize(copy.deepcopy(model))


def test_each_is_registered_under_its_own_name_without_an_import() -> None:
    registry = Registry()
    plugin.apt_register_providers(registry)
    assert registry.list_providers("quant") == {"quant": ["int4", "int8", "int8_dynamic"]}
    for name in registry.list_providers("quant")["quant"]:
        provider = registry.get("quant", name)
        assert provider.get_name() == name
        assert provider.get_version() == registry.get_info("quant", name)["version"]


@pytest.mark.parametrize("attention", ["mha", "tva_default"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_map_of_a_block_is_quantised_and_the_rest_is_left(provider: Any, attention: str) -> None:
    model = gpt(attention_name=attention, tie_embeddings=False)
    maps = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    after = quantised(model, provider())
    assert {n for n, m in after.named_modules() if isinstance(m, QuantizedLinear)} == maps - {"head"}
    before, state = model.state_dict(), after.state_dict()
    assert all(type(tensor) is Tensor for tensor in state.values())
    for name in before.keys() & state.keys():
        assert torch.equal(before[name], state[name])
    assert before.keys() - state.keys() == {f"{name}.weight" for name in maps - {"head"}}


@pytest.mark.parametrize("attention", ["mha", "tva_default"])
@pytest.mark.parametrize(("provider", "error"), [(Int8Weights, 0.02), (Int8Dynamic, 0.05), (Int4Weights, 0.3)])
def test_the_logits_are_near_and_decoding_equals_the_full_pass(provider: Any, error: float, attention: str) -> None:
    model = gpt(attention_name=attention)
    after = quantised(model, provider())
    with torch.inference_mode():
        exact, full = model(TOKENS).logits, after(TOKENS).logits
        cache = after.make_cache(2, 16)
        steps = [after(TOKENS[:, t : t + 1], cache=cache).logits for t in range(12)]
    assert 0 < (full - exact).norm() / exact.norm() < error
    # Where inputs are rounded, the last bit of a sum tips one to its neighbour; and TVA decodes in its vein, unrounded.
    apart = error * exact.abs().max() if provider is Int8Dynamic else 1e-4
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0, atol=float(apart))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_loaded_into_a_model_of_other_weights_it_is_the_same_model(provider: Any) -> None:
    one = quantised(gpt(), provider())
    other = gpt()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    other = provider().quantize(other)
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        assert torch.equal(one(TOKENS).logits, other(TOKENS).logits)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_trained_for_it_computes_what_it_will_compute_quantised(provider: Any) -> None:
    model = gpt(attention_name="mha")
    scheme, prepared = provider(), copy.deepcopy(model)
    scheme.prepare(prepared)
    assert list(prepared.state_dict()) == list(model.state_dict())
    fakes = [module for module in prepared.modules() if isinstance(module, FakeQuantizedLinear)]
    assert len(fakes) == 8
    with torch.no_grad():
        assert torch.equal(prepared(TOKENS).logits, model(TOKENS).logits)
        for fake in fakes:
            fake.active = True
        # An input halfway between two of its values may fall to either: what is rounded by token differs there.
        atol = 2e-2 if provider is Int8Dynamic else 1e-5
        torch.testing.assert_close(
            prepared(TOKENS).logits, quantised(model, provider())(TOKENS).logits, rtol=0, atol=atol
        )


# What is left


def test_what_the_profile_keeps_is_kept_and_a_name_of_nothing_is_said() -> None:
    after = quantised(gpt(), Int8Weights({"keep": ["blocks.0.*", "*.ffn.w_out"]}))
    names = {name for name, module in after.named_modules() if isinstance(module, QuantizedLinear)}
    assert names == {"blocks.1.attention.w_in", "blocks.1.attention.w_v", "blocks.1.attention.w_o", "blocks.1.ffn.w_in"}
    with pytest.warns(AptWarning, match=r"model.int8.keep: 'block\.\*' is the name of no linear map"):
        quantised(gpt(), Int8Weights({"keep": ["block.*"]}))


def test_a_model_without_a_map_is_refused() -> None:
    with pytest.raises(ConfigError, match="quant:int8: the model has no linear map to quantise"):
        Int8Weights().quantize(nn.Sequential(nn.Embedding(3, 4)))
    with pytest.raises(ConfigError, match="no linear map"):
        Int8Weights().quantize(nn.Linear(3, 4))
    with pytest.raises(ConfigError, match="no linear map"):
        quantised(gpt(), Int8Weights({"keep": ["*"]}))


def test_stacked_experts_and_the_router_are_left() -> None:
    router = pytest.importorskip("apt_plugin_moe.router", reason="needs the source tree of apt-plugin-moe")
    model = gpt(attention_name="mha", d_model=16, num_heads=2)
    for block in model.blocks:
        block.ffn = router.MoERouter({"experts": 4, "shared_experts": 1}).wrap_ffn(block.ffn)
    after = quantised(model, Int8Weights())
    before, state = model.state_dict(), after.state_dict()
    kept = before.keys() & state.keys()
    assert {"blocks.0.ffn.router.weight", "blocks.0.ffn.experts.stack.w_in.weight"} <= kept
    assert {"blocks.0.ffn.dense.w_in.weight", "blocks.0.ffn.shared.each.0.w_in.weight"} <= before.keys() - kept
    with torch.no_grad():
        exact = model.eval()(TOKENS).logits
        assert (after.eval()(TOKENS).logits - exact).norm() / exact.norm() < 0.05


# Groups


def test_group_sizes_that_are_left_out_fit_any_row() -> None:
    assert {inputs: group_within(inputs) for inputs in (512, 48, 40, 24, 16, 17, 8, 37, 74, 6)} == {
        512: 32, 48: 24, 40: 20, 24: 24, 16: 16, 17: 17, 8: 8, 37: 37, 74: 74, 6: 6,
    }  # fmt: skip
    assert all(inputs % group_within(inputs) == 0 for inputs in range(1, 300))
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


def test_a_group_size_that_does_not_fit_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError) as error:
        Int4Weights({"group_size": 32}).quantize(gpt())
    assert error.value.message == (
        "model.int4.group_size: 32 does not divide the inputs of blocks.0.attention.w_v (8) and 1 more"
    )
    assert error.value.hint == "group sizes that fit every layer: 2, 4, 8"
    after = quantised(gpt(), Int4Weights({"group_size": 4}))
    assert after.state_dict()["blocks.0.ffn.w_in.weight.scale"].shape == (128, 8)
    odd = nn.Sequential(nn.Linear(9, 3), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match=r"does not divide the inputs of 0 \(9\); leave it out"):
        Int4Weights({"group_size": 2}).quantize(odd)
    assert isinstance(Int4Weights().quantize(odd)[0], QuantizedLinear)  # type: ignore[index]


@pytest.mark.parametrize("section", [{"group_size": 1}, {"group_size": "32x"}, {"groups": 32}, {"keep": "blocks"}])
def test_a_section_that_cannot_be_used_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Int4Weights(section)


def test_smaller_groups_are_nearer() -> None:
    model = gpt()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        exact = model(TOKENS).logits
        errors = [
            float((quantised(model, Int4Weights({"group_size": size}))(TOKENS).logits - exact).norm())
            for size in (8, 4, 2)
        ]
    assert errors == sorted(errors, reverse=True)
