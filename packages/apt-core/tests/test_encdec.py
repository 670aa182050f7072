"""The encoder-decoder backbone: who sees whom, its caches, its parts, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apt.core.config import ModelConfig
from apt.core.errors import ConfigError, ProviderError
from apt.core.providers.attention import AttentionContext, AttentionProvider
from apt.core.registry import Registry
from apt.core.registry import registry as installed
from apt.modeling.backbones.encdec import EncoderDecoder
from apt.modeling.compose import ModelBuilder

torch.set_num_threads(1)
B, S, T, V = 3, 7, 5, 20

MODELS: dict[str, dict[str, Any]] = {
    "tva": {},
    "tva, r 2, no norm": {"tva": {"r": 2, "qk_norm": False}},
    "mha": {"attention_name": "mha"},
    "gqa, qk-norm, biases": {"attention_name": "mha", "mha": {"num_kv_heads": 2, "qk_norm": True, "bias": True}},
    "learned positions": {"attention_name": "mha", "positions": "learned", "tie_embeddings": False},
    "three encoder layers, swiglu": {"num_encoder_layers": 3, "ffn_name": "swiglu", "norm": "rmsnorm"},
}
every_model = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)


def build(registry: Registry | None = None, **options: Any) -> EncoderDecoder:
    """A model whose weights are so large that a wrong step shows."""
    torch.manual_seed(0)
    shape = {"backbone": "encdec", "d_model": 16, "num_heads": 4, "num_layers": 2, "max_seq_len": 16}
    model = ModelBuilder({"model": {**shape, **options}}, registry=registry).build_model(vocab_size=V).double().eval()
    assert isinstance(model, EncoderDecoder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens(length: int, seed: int = 1, rows: int = B) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


def padding(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


def same(got: Tensor, wanted: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


def test_a_forward_pass_step_by_step() -> None:
    model = build(attention_name="mha")
    x = F.embedding(tokens(S), model.token_embedding.weight)
    for block in model.encoder:
        h = block.norm1(x)
        x = x + block.attention(h, h, h)[0]
        x = x + block.ffn(block.norm2(x))
    memory = model.encoder_norm(x)
    y = F.embedding(tokens(T, 2), model.token_embedding.weight)
    for block in model.decoder:
        h = block.norm1(y)
        y = y + block.attention(h, h, h)[0]
        y = y + block.cross_attention(block.norm_cross(y), memory, memory)[0]
        y = y + block.ffn(block.norm2(y))
    out = model(tokens(T, 2), source=tokens(S))
    same(model.encode(tokens(S)).states_BSD, memory)
    same(out.hidden, model.norm(y))
    same(out.logits, model.norm(y) @ model.token_embedding.weight.T)
    last = model(tokens(T, 2), source=tokens(S), last_only=True)
    same(last.logits, out.logits[:, -1:])
    assert out.aux_loss is None


@every_model
def test_the_encoder_looks_both_ways_and_the_decoder_back_alone(options: dict[str, Any]) -> None:
    model, source, target = build(**options), tokens(S), tokens(T, 2)
    states, logits = model.encode(source).states_BSD, model(target, source=source).logits
    for place in (0, S - 1):
        other = source.clone()
        other[:, place] = (other[:, place] + 1) % V
        changed = (model.encode(other).states_BSD - states).abs().amax(-1)
        assert (changed > 1e-6).all(), "every state of the encoder knows every token of the source"
        assert ((model(target, source=other).logits - logits).abs().amax(-1) > 1e-6).all()
    for place in range(T):
        other = target.clone()
        other[:, place] = (other[:, place] + 1) % V
        changed = (model(other, source=source).logits - logits).abs().amax(-1)
        assert (changed[:, :place] == 0).all() and (changed[:, place:] > 1e-9).all()


@every_model
def test_padding_changes_nothing(options: dict[str, Any]) -> None:
    model, lengths = build(**options), (S, 2, 4)
    source, target = tokens(S), tokens(T, 2)
    together = model(target, source=source, source_padding=padding(*lengths)).logits
    for row, length in enumerate(lengths):
        alone = model(target[row : row + 1], source=source[row : row + 1, :length]).logits
        same(together[row : row + 1], alone)


@every_model
@pytest.mark.parametrize("steps", [(1,) * T, (2, 1, 2), (T,)], ids=str)
def test_decoding_with_a_cache_is_the_full_pass(options: dict[str, Any], steps: tuple[int, ...]) -> None:
    model, source, target = build(**options), tokens(S), tokens(T, 2)
    blocked = padding(S, 2, 4)
    memory = model.encode(source, blocked)
    cache, start, parts = model.make_cache(memory, T), 0, []
    assert all(layer is not None and layer.length == 0 for layer in cache.memory)
    with torch.no_grad():
        for step in steps:
            parts.append(model(target[:, start : start + step], memory=memory, cache=cache).logits)
            start += step
            assert cache.length == start
            assert all(layer is not None and layer.length == S for layer in cache.memory)
    same(torch.cat(parts, 1), model(target, source=source, source_padding=blocked).logits)


@every_model
def test_the_cache_serves_rows_that_are_chosen_and_targets_that_are_cut_short(options: dict[str, Any]) -> None:
    model, source, target = build(**options), tokens(S), tokens(T, 2)
    memory = model.encode(source, padding(S, 2, 4))
    cache = model.make_cache(memory, T + 1)
    rows = torch.tensor([2, 0, 2])
    with torch.no_grad():
        model(target, memory=memory, cache=cache)
        cache.truncate(3)
        cache.select_rows(rows)
        memory, other = memory.select_rows(rows), torch.cat((target[rows, :3], tokens(2, 5)), 1)
        got = model(other[:, 3:], memory=memory, cache=cache).logits
        same(got, model(other, source=source[rows], source_padding=padding(S, 2, 4)[rows]).logits[:, 3:])


def test_what_crosses_is_computed_once() -> None:
    """The second step reads keys and values from the cache: what the memory holds by then does not matter."""
    for options in ({}, {"attention_name": "mha"}):
        model, target = build(**options), tokens(T, 2)
        memory = model.encode(tokens(S))
        wanted = model(target, memory=memory).logits
        cache = model.make_cache(memory, T)
        with torch.no_grad():
            model(target[:, :1], memory=memory, cache=cache)
            spoilt = memory._replace(states_BSD=torch.full_like(memory.states_BSD, torch.nan))
            got = [model(target[:, t : t + 1], memory=spoilt, cache=cache).logits for t in range(1, T)]
        same(torch.cat(got, 1), wanted[:, 1:])


class Layer(nn.Module):
    """Softmax attention with one head, by a third party."""

    def __init__(self, d_model: int, causal: bool) -> None:
        super().__init__()
        self.d_model, self.causal = d_model, causal
        self.w = nn.Linear(d_model, d_model)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        scores = self.w(query) @ key.mT
        if key_padding_mask is not None:
            scores = scores.masked_fill(key_padding_mask[:, None], -torch.inf)
        if self.causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        return scores.softmax(-1) @ value


class Crossing(Layer):
    capabilities = frozenset({"cross_attention"})


class CrossingWithCache(Crossing):
    """It knows of contexts and has a cache for itself, and keeps nothing of the other sequence."""

    capabilities = frozenset({"cache", "cross_attention"})

    class Cache:
        length = 0

    def make_cache(self, *sizes: int, **options: Any) -> Any:
        self.seen = torch.empty(0)
        return self.Cache()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *masks: Any, context: Any = None, **more: Any) -> Any:  # type: ignore[override]
        assert context is None or (context.cache is None) == (key is not query), "no cache is given that it lacks"
        if context is None or context.cache is None:
            return super().forward(query, key, value, *masks, **more)
        self.seen = torch.cat((self.seen.to(query.dtype).reshape(query.shape[0], -1, self.d_model), key), 1)
        context.cache.length = self.seen.shape[1]
        out = super().forward(self.seen, self.seen, self.seen, *masks, **more)
        return out[:, -query.shape[1] :]


def provider(layer: type[Layer], *, always_causal: bool = False) -> Registry:
    """The registry with that attention under the name "third"."""

    class Third(AttentionProvider):
        def get_name(self) -> str:
            return "third"

        def get_version(self) -> str:
            return "1.0"

        def create_layer(self, d_model: int, num_heads: int, *, causal: bool = True, **config: Any) -> nn.Module:
            return layer(d_model, causal)

    class AlwaysCausal(Third):
        def create_layer(self, d_model: int, num_heads: int) -> nn.Module:  # type: ignore[override]
            return layer(d_model, True)

    view = installed.view()
    view.register("attention", "third", AlwaysCausal if always_causal else Third)
    return view


def test_an_attention_that_cannot_look_at_another_sequence_is_refused() -> None:
    wrong = r"model.attention_name: third cannot look at another sequence .*; model.backbone encdec needs one that can"
    with pytest.raises(ConfigError, match=wrong):
        build(provider(Layer), attention_name="third")
    with pytest.raises(ConfigError, match="third is always causal, and an encoder is not"):
        build(provider(Crossing, always_causal=True), attention_name="third")


def test_an_attention_without_a_cache_decodes_by_full_passes() -> None:
    model = build(provider(Crossing), attention_name="third")
    assert not model.supports("cache")
    with pytest.raises(ProviderError, match="Crossing does not support 'cache'"):
        model.make_cache(model.encode(tokens(S)), T)
    together = model(tokens(T, 2), source=tokens(S), source_padding=padding(S, 2, 4)).logits
    same(together[1:2], model(tokens(T, 2)[1:2], source=tokens(S)[1:2, :2]).logits)


def test_a_cross_attention_that_keeps_nothing_is_computed_anew() -> None:
    model = build(provider(CrossingWithCache), attention_name="third")
    assert model.supports("cache")
    memory = model.encode(tokens(S))
    cache = model.make_cache(memory, T)
    assert cache.memory == [None, None]
    target = tokens(T, 2)
    got = [model(target[:, t : t + 1], memory=memory, cache=cache).logits for t in range(T)]
    same(torch.cat(got, 1), model(target, memory=memory).logits)


class WithAux(nn.Module):
    def __init__(self, d_model: int, aux: float) -> None:
        super().__init__()
        self.d_model, self.aux = d_model, aux

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 0.5, x.new_tensor(self.aux)


def test_auxiliary_losses_of_both_stacks_add_up() -> None:
    model = build()
    for block, aux in zip([*model.encoder, *model.decoder], (1.0, 2.0, 4.0, 8.0), strict=True):
        block.ffn = WithAux(16, aux)
    out = model(tokens(T), source=tokens(S))
    assert out.aux_loss is not None and float(out.aux_loss) == 15.0


def test_what_is_wrong_with_a_call_is_said() -> None:
    model = build(positions="learned")
    with pytest.raises(ConfigError, match="an encoder-decoder needs a source"):
        model(tokens(T))
    with pytest.raises(ConfigError, match="position 16 lies beyond the 16"):
        model.encode(tokens(17))
    with pytest.raises(ConfigError, match="position 16 lies beyond the 16"):
        model(tokens(17), source=tokens(S))


def test_sizes() -> None:
    model = build(num_encoder_layers=3)
    assert (len(model.encoder), len(model.decoder)) == (3, 2)
    per_block = [block.flops_per_token(9) for block in (*model.encoder, *model.decoder)]
    crossing = model.decoder[0].cross_attention.flops_per_token(9)
    assert per_block[3] - per_block[0] == crossing
    assert model.flops_per_token(9) == sum(per_block) + 2 * V * 16
    names = {name.split(".")[0] for name in model.state_dict()}
    assert names == {"token_embedding", "encoder", "decoder", "norm", "encoder_norm"}


def test_slots_name_every_module_that_their_provider_built() -> None:
    builder = ModelBuilder({"model": {"backbone": "encdec", "d_model": 16, "num_layers": 1, "num_encoder_layers": 2}})
    model = builder.build_model(vocab_size=V)
    assert builder.modules_by_slot(model) == {
        ("attention", "tva_default"): [
            "encoder.0.attention", "encoder.1.attention", "decoder.0.attention", "decoder.0.cross_attention",
        ],
        ("ffn", "default"): ["encoder.0.ffn", "encoder.1.ffn", "decoder.0.ffn"],
    }  # fmt: skip
    # The roles that the default attention takes: it generates itself where it is causal, and nowhere else.
    assert isinstance(model, EncoderDecoder)
    roles = {name: module.self_generates for name, module in model.named_modules() if hasattr(module, "self_generates")}
    assert roles == {
        "encoder.0.attention": False, "encoder.1.attention": False,
        "decoder.0.attention": True, "decoder.0.cross_attention": False,
    }  # fmt: skip


def test_an_encoder_is_for_encdec_alone() -> None:
    with pytest.raises(ValueError, match="the backbone gpt has no encoder"):
        ModelConfig(num_encoder_layers=2)


@pytest.mark.parametrize("name", ["tva_default", "mha"])
def test_a_layer_that_is_causal_refuses_to_keep_another_sequence(name: str) -> None:
    layer = installed.get("attention", name).create_layer(16, 4).double()
    x, memory = torch.randn(2, 3, 16).double(), torch.randn(2, 3, 16).double()
    context = AttentionContext(cache=layer.make_cache(2, 3))
    with pytest.raises(ProviderError, match="a cache with cross-attention"):
        layer(x, memory, memory, context=context)


@pytest.mark.parametrize("name", ["tva_default", "mha"])
def test_a_cache_of_the_memory_is_for_its_own_rows(name: str) -> None:
    layer = installed.get("attention", name).create_layer(16, 4, causal=False).double()
    x, memory = torch.randn(2, 1, 16).double(), torch.randn(2, 3, 16).double()
    context = AttentionContext(torch.tensor([0]), cache=layer.make_cache(2, 3, dtype=torch.float64))
    with torch.no_grad():
        layer(x, memory, memory, context=context)
        with pytest.raises(ProviderError, match="the cache is for 2 rows and the batch has 1"):
            other = memory[:1]
            layer(x[:1], other, other, context=context)
