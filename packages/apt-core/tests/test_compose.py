"""The model builder: from a profile or a plain dict to a model, and what it falls back to."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from apt.core.config import RunConfig
from apt.core.errors import ConfigError, FallbackWarning, ProviderError
from apt.core.in_use import ProvidersInUse
from apt.core.profiles import find_profile
from apt.core.providers.attention import AttentionProvider
from apt.core.providers.router import RouterProvider
from apt.core.registry import Registry
from apt.modeling.backbones.gpt import GPT, TransformerBlock
from apt.modeling.compose import ModelBuilder
from apt.modeling.layers.attention_mha import MHAAttentionLayer
from apt.modeling.layers.attention_tva import TVAAttentionLayer
from apt.modeling.layers.config import MHAConfig
from apt.modeling.layers.ffn import FeedForward, GatedFeedForward

torch.set_num_threads(1)


@pytest.fixture
def registry() -> Registry:
    registry = Registry()
    layers = "apt.modeling.layers"
    registry.register("attention", "tva_default", f"{layers}.attention_tva:TVAAttention", default=True, section="tva")
    registry.register("attention", "mha", f"{layers}.attention_mha:MHAAttention")
    registry.register("ffn", "default", f"{layers}.ffn:DefaultFFN", default=True)
    registry.register("ffn", "swiglu", f"{layers}.ffn:SwiGLU")
    return registry


def config(**model: Any) -> dict[str, Any]:
    return {"model": {"d_model": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 30, "max_seq_len": 8, **model}}


def test_the_documented_snippet(registry: Registry) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is what the snippet reads the profile with")
    profile = yaml.safe_load(find_profile("tiny_debug").read_text())
    builder = ModelBuilder(profile, registry=registry)
    block = builder.build_block(d_model=64, num_heads=4, d_ff=256)
    model = builder.build_model()
    assert isinstance(block, TransformerBlock) and isinstance(model, GPT)
    assert isinstance(model.blocks[0].attention, TVAAttentionLayer)


@pytest.mark.parametrize("form", ["dict", "config", "dump", "name"])
def test_every_form_of_a_profile(registry: Registry, form: str) -> None:
    plain = config(tva={"r": 2}, attention_name="tva_default")
    resolved = RunConfig.model_validate(plain)
    given = {"dict": plain, "config": resolved, "dump": resolved.model_dump(), "name": "tiny_debug"}[form]
    model = ModelBuilder(given, registry=registry).build_model()
    if form != "name":
        assert model.blocks[0].attention.d_vein == 8
        assert model.vocab_size == 30 and len(model.blocks) == 2


def test_a_dict_that_is_no_profile_is_refused() -> None:
    with pytest.raises(ConfigError, match="d_modle"):
        ModelBuilder({"model": {"d_modle": 16}})


def test_the_providers_are_those_the_profile_names(registry: Registry) -> None:
    model = ModelBuilder(
        config(attention_name="mha", ffn_name="swiglu", mha={"num_kv_heads": 2}, swiglu={"bias": True}, d_ff=24),
        registry=registry,
    ).build_model()
    attention, ffn = model.blocks[1].attention, model.blocks[1].ffn
    assert isinstance(attention, MHAAttentionLayer) and attention.num_kv_heads == 2
    assert isinstance(ffn, GatedFeedForward) and ffn.d_ff == 24 and ffn.w_up.bias is not None
    assert model.blocks[0].attention is not attention


def test_what_the_model_knows_reaches_the_layers(registry: Registry) -> None:
    builder = ModelBuilder(config(dropout=0.25, rope_theta=500.0, num_layers=3), registry=registry)
    attention, ffn = builder.build_attention(16, 4), builder.build_ffn(16, 32)
    assert isinstance(attention, TVAAttentionLayer) and isinstance(ffn, FeedForward)
    assert attention.rope is not None and attention.rope.theta == 500.0
    assert attention.causal and attention.dropout == ffn.dropout.p == 0.25
    assert attention.num_layers == ffn.num_layers == 3
    block = builder.build_block(16, 4, 32)
    assert block.dropout.p == 0.25
    learned = ModelBuilder(config(positions="learned"), registry=registry).build_attention(16, 4)
    assert learned.rope is None


class Plain(AttentionProvider):
    """An attention by someone who wrote `create_layer` for what it needs and no more."""

    def get_name(self) -> str:
        return "plain"

    def get_version(self) -> str:
        return "1"

    def create_layer(self, d_model: int, num_heads: int, dropout: float = 0.0) -> nn.Module:  # type: ignore[override]
        return MHAAttentionLayer(d_model, num_heads, MHAConfig(), dropout=dropout)


def test_a_provider_gets_only_what_it_takes(registry: Registry) -> None:
    registry.register("attention", "plain", Plain)
    layer = ModelBuilder(config(attention_name="plain", dropout=0.5), registry=registry).build_attention(16, 4)
    assert layer.dropout == 0.5


class Broken(Plain):
    def create_layer(self, d_model: int, num_heads: int, **config: Any) -> nn.Module:  # type: ignore[override]
        raise ProviderError("attention:broken needs a GPU", hint="run it on one")


def test_what_cannot_be_had_falls_back_loudly_and_once(registry: Registry) -> None:
    registry.register("attention", "broken", Broken)
    for name, reason in [("flash_v2", "apt-plugin-flash"), ("broken", "needs a GPU")]:
        builder = ModelBuilder(config(attention_name=name), registry=registry)
        with pytest.warns(FallbackWarning, match=reason) as caught:
            model = builder.build_model()
        assert len(caught) == 1
        assert isinstance(model.blocks[0].attention, TVAAttentionLayer)
        slot = builder.in_use.slots["attention", name]
        assert slot.is_fallback and slot.name == "tva_default"


def test_under_strict_it_does_not(registry: Registry) -> None:
    profile = RunConfig.model_validate(config(attention_name="flash_v2"))
    in_use = ProvidersInUse(registry, {"model": profile.model.sections}, strict=True)
    with pytest.raises(ProviderError, match=r"flash_v2 (is not installed|cannot be used: apt-plugin-flash)"):
        ModelBuilder(profile, in_use).build_model()


class Router(RouterProvider):
    def get_name(self) -> str:
        return "topk_moe"

    def get_version(self) -> str:
        return "1"

    def wrap_ffn(self, base_ffn: nn.Module, config: Any) -> nn.Module:
        wrapped = nn.Sequential(base_ffn)
        wrapped.section = config  # type: ignore[assignment]
        return wrapped


def test_a_router_wraps_the_ffn_where_it_is_enabled(registry: Registry) -> None:
    registry.register("router", "topk_moe", Router, section="moe")
    moe = {"enabled": True, "experts": 4}
    builder = ModelBuilder(config(moe=moe), registry=registry)
    model = builder.build_model()
    assert all(isinstance(block.ffn, nn.Sequential) and block.ffn.section == moe for block in model.blocks)
    assert builder.modules_by_slot(model) == {
        ("attention", "tva_default"): ["blocks.0.attention", "blocks.1.attention"],
        ("ffn", "default"): ["blocks.0.ffn", "blocks.1.ffn"],
        ("router", "topk_moe"): ["blocks.0.ffn", "blocks.1.ffn"],
    }
    for section in ({"enabled": False}, {}):
        dense = ModelBuilder(config(moe=section), registry=registry).build_model()
        assert isinstance(dense.blocks[0].ffn, FeedForward)


def test_without_the_router_the_dense_ffn_stays_loudly(registry: Registry) -> None:
    with pytest.warns(FallbackWarning, match="apt-plugin-moe") as caught:
        model = ModelBuilder(config(moe={"enabled": True}), registry=registry).build_model()
    assert len(caught) == 1
    assert isinstance(model.blocks[0].ffn, FeedForward)


def test_the_vocabulary_must_be_known(registry: Registry) -> None:
    unknown = config()
    del unknown["model"]["vocab_size"]
    with pytest.raises(ConfigError, match=r"model.vocab_size: .* build_model\(vocab_size=...\)"):
        ModelBuilder(unknown, registry=registry).build_model()
    assert ModelBuilder(unknown, registry=registry).build_model(vocab_size=7).vocab_size == 7
    assert ModelBuilder(config(), registry=registry).build_model(vocab_size=7).vocab_size == 7


def test_an_r_that_does_not_fit_is_the_users_to_mend(registry: Registry) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match=r"model.tva.r: 3 does not fit"):
            ModelBuilder(config(tva={"r": 3}), registry=registry).build_model()


def test_a_seed_gives_the_same_model_again(registry: Registry) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(ModelBuilder(config(), registry=registry).build_model())
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
