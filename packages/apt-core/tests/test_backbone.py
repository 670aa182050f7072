"""The GPT backbone: blocks, caches, positions, and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from apt.core.config import ModelConfig
from apt.core.errors import ConfigError, ProviderError
from apt.core.providers.attention import AttentionContext
from apt.modeling.backbones.gpt import GPT, ModelOutput, TransformerBlock
from apt.modeling.layers.attention_mha import MHAAttentionLayer
from apt.modeling.layers.attention_tva import TVAAttentionLayer
from apt.modeling.layers.config import FFNConfig, MHAConfig, TVAConfig
from apt.modeling.layers.ffn import FeedForward

torch.set_num_threads(1)
B, T, V = 2, 9, 20


class FiveArguments(nn.Module):
    """Attention by a third party that knows nothing of contexts: a causal mean."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.linear = nn.Linear(d_model, d_model)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        count = torch.arange(1, query.shape[1] + 1, dtype=query.dtype)
        return self.linear(value.cumsum(1) / count[:, None]), None


class WithAux(nn.Module):
    """A feed-forward layer with a loss of its own."""

    def __init__(self, d_model: int, aux: float) -> None:
        super().__init__()
        self.d_model = d_model
        self.aux = nn.Parameter(torch.tensor(aux))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 0.5, self.aux


def build(attention: str = "tva", layers: int = 2, ffns: list[nn.Module] | None = None, **options: Any) -> GPT:
    torch.manual_seed(0)
    config = ModelConfig(**{"d_model": 16, "num_heads": 4, "num_layers": layers, "max_seq_len": 16, **options})
    theta = config.rope_theta if config.positions == "rope" else None
    blocks = []
    for index in range(layers):
        mixer: nn.Module
        if attention == "tva":
            mixer = TVAAttentionLayer(16, 4, TVAConfig(), dropout=config.dropout, num_layers=layers, rope_theta=theta)
            nn.init.normal_(mixer.w, std=0.1)
        elif attention == "mha":
            mixer = MHAAttentionLayer(16, 4, MHAConfig(), dropout=config.dropout, num_layers=layers, rope_theta=theta)
        else:
            mixer = FiveArguments(16)
        ffn = ffns[index] if ffns else FeedForward(16, config.hidden_size, FFNConfig(), num_layers=layers)
        blocks.append(TransformerBlock(mixer, ffn, norm=config.norm, dropout=config.dropout))
    return GPT(config, blocks, V).double()


def tokens(length: int = T) -> torch.Tensor:
    return torch.randint(V, (B, length), generator=torch.Generator().manual_seed(1))


def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_forward_pass_step_by_step(norm: str, positions: str, tied: bool) -> None:
    model = build("mha", norm=norm, positions=positions, tie_embeddings=tied)
    x = F.embedding(tokens(), model.token_embedding.weight)
    if positions == "learned":
        assert model.position_embedding is not None
        x = x + model.position_embedding.weight[:T]
    for block in model.blocks:
        h = block.norm1(x)
        x = x + block.attention(h, h, h)[0]
        x = x + block.ffn(block.norm2(x))
    hidden = model.norm(x)
    weight = model.token_embedding.weight if model.head is None else model.head.weight
    out = model(tokens())
    assert isinstance(out, ModelOutput) and out.aux_loss is None
    same(out.hidden, hidden)
    same(out.logits, hidden @ weight.T)
    last = model(tokens(), last_only=True)
    assert last.logits.shape == (B, 1, V)
    same(last.logits, out.logits[:, -1:])
    same(last.hidden, hidden)


def test_a_tied_projection_has_no_name_of_its_own() -> None:
    tied, untied = build(), build(tie_embeddings=False)
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"head.weight"}
    assert untied.num_params() - tied.num_params() == V * 16
    assert tied.num_params() == sum(tensor.numel() for tensor in tied.state_dict().values())
    torch.manual_seed(5)
    other = build()
    other.load_state_dict(tied.state_dict())
    assert torch.equal(other(tokens()).logits, tied(tokens()).logits)


@pytest.mark.parametrize("attention", ["tva", "mha"])
@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("cuts", [[], [1, 2, 3], [4], [3, 4, 7, 8]])
def test_with_a_cache_the_result_is_that_of_a_full_pass(attention: str, positions: str, cuts: list[int]) -> None:
    model = build(attention, positions=positions)
    assert model.supports("cache") and model.supports("documents")
    cache = model.make_cache(B, 16)
    pieces = []
    with torch.no_grad():
        for start, stop in itertools.pairwise([0, *cuts, T]):
            assert cache.length == start
            pieces.append(model(tokens()[:, start:stop], cache=cache).logits)
    same(torch.cat(pieces, 1), model(tokens()).logits)


@pytest.mark.parametrize("attention", ["tva", "mha"])
def test_a_cache_can_be_truncated_and_its_rows_chosen(attention: str) -> None:
    model = build(attention)
    cache = model.make_cache(B, 16)
    rows = torch.tensor([1, 0, 1])
    with torch.no_grad():
        model(tokens(), cache=cache)
        cache.truncate(5)
        cache.select_rows(rows)
        got = model(tokens()[rows, 5:], cache=cache).logits
    same(got, model(tokens()).logits[rows, 5:])
    assert len(list(cache)) == 2


def test_a_cache_is_of_the_models_dtype_unless_told() -> None:
    model = build("mha")
    assert model.make_cache(1, 4).layers[0].tensors["keys"].dtype == torch.float64
    assert model.make_cache(1, 4, dtype=torch.bfloat16).layers[0].tensors["keys"].dtype == torch.bfloat16


@pytest.mark.parametrize("attention", ["tva", "mha"])
def test_documents_in_one_row_equal_documents_alone(attention: str) -> None:
    model = build(attention)
    ids = torch.tensor([[0] * 4 + [1] * 5] * B)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])
    both = model(tokens(), document_ids=ids, positions=positions).logits
    same(both[:, :4], model(tokens()[:, :4]).logits)
    same(both[:, 4:], model(tokens()[:, 4:]).logits)


@pytest.mark.parametrize("attention", ["tva", "mha"])
@pytest.mark.parametrize("positions_kind", ["rope", "learned"])
def test_a_left_padded_batch_goes_on_as_its_rows_alone(attention: str, positions_kind: str) -> None:
    model = build(attention, positions=positions_kind)
    lengths = [T, 5]
    row = tokens()
    padding = torch.tensor([[i < T - n for i in range(T)] for n in lengths])
    text = torch.stack([row[0], torch.cat((row[1, :4] * 0, row[1, :5]))])
    positions = (~padding).cumsum(1).sub(1).clamp(min=0)
    cache = model.make_cache(B, 16)
    with torch.no_grad():
        model(text[:, :-1], positions=positions[:, :-1], key_padding_mask=padding[:, :-1], cache=cache)
        got = model(text[:, -1:], positions=positions[:, -1:], key_padding_mask=padding, cache=cache).logits
    same(got[0, -1], model(row[:1]).logits[0, -1])
    same(got[1, -1], model(row[1:, :5]).logits[0, -1])


def test_learned_positions_end_where_the_model_ends() -> None:
    model = build("mha", positions="learned")
    long = tokens(17)
    with pytest.raises(
        ConfigError, match=r"position 16 lies beyond the 16 .*max_seq_len or with model.positions: rope"
    ):
        model(long)
    with pytest.raises(ConfigError, match="position 16"):
        model(long[:, :1], positions=torch.tensor([16]))
    cache = model.make_cache(B, 32)
    with torch.no_grad():
        model(long[:, :16], cache=cache)
        with pytest.raises(ConfigError, match="position 16"):
            model(long[:, 16:], cache=cache)
    assert build("mha")(long).logits.shape == (B, 17, V)


def test_a_layer_without_a_context_serves_full_passes_and_nothing_else() -> None:
    model = build("five")
    assert model(tokens()).logits.shape == (B, T, V)
    assert not model.supports("cache")
    with pytest.raises(ProviderError, match="FiveArguments does not support 'cache'"):
        model.make_cache(1, 4)
    with pytest.raises(ProviderError, match="FiveArguments does not support 'documents'"):
        model(tokens(), document_ids=tokens())
    with pytest.raises(ProviderError, match="FiveArguments does not support 'positions'"):
        model(tokens(), positions=torch.arange(T))
    with pytest.raises(ProviderError, match="FiveArguments does not support 'cache'"):
        model(tokens(), cache=build().make_cache(B, 16))


def test_a_layer_that_takes_a_context_is_still_asked_what_it_can_do() -> None:
    class Limited(MHAAttentionLayer):
        capabilities = frozenset({"cache"})

    block = TransformerBlock(Limited(16, 4, MHAConfig()), FeedForward(16, 64, FFNConfig()))
    x = torch.randn(1, 3, 16)
    with pytest.raises(ProviderError, match="Limited does not support 'documents'"):
        block(x, context=AttentionContext(document_ids=torch.zeros(1, 3, dtype=torch.int64)))
    block(x, context=AttentionContext(positions=torch.arange(3)))


def test_a_layer_may_take_its_context_among_any_keywords() -> None:
    class Keywords(nn.Module):
        d_model = 16

        def forward(
            self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
        ) -> tuple[Any, None]:
            self.options = options
            return query, None

    layer = Keywords()
    context = AttentionContext(positions=torch.arange(3))
    TransformerBlock(layer, nn.Identity())(torch.randn(1, 3, 16), context=context)
    assert layer.options["context"] is context


def test_auxiliary_losses_are_summed() -> None:
    model = build("mha", ffns=[WithAux(16, 0.25), WithAux(16, 0.5)])
    aux = model(tokens()).aux_loss
    assert aux is not None and aux.item() == 0.75
    mixed = build("mha", ffns=[WithAux(16, 0.25), FeedForward(16, 64, FFNConfig())])
    aux = mixed(tokens()).aux_loss
    assert aux is not None and aux.item() == 0.25


def test_a_mask_reaches_the_attention() -> None:
    block = build("mha", layers=1).blocks[0]
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    eye = ~torch.eye(4, dtype=torch.bool)
    # Whoever sees itself alone takes its own value, as if the text were one token long.
    alone = torch.cat([block(x[:, [t]])[0] for t in range(4)], 1)
    same(block(x, attn_mask=eye)[0], alone)
    assert not torch.allclose(alone, block(x)[0])


def test_dropout_is_seeded_and_only_for_training() -> None:
    model = build(dropout=0.3)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        logits: torch.Tensor = model(tokens()).logits
        return logits

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    model.eval()
    assert torch.equal(run(0), run(1))


def test_initial_weights_come_from_the_global_generator() -> None:
    one, two = build(positions="learned"), build(positions="learned")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    torch.manual_seed(0)
    config = ModelConfig(d_model=256, num_heads=4, num_layers=1, positions="learned", tie_embeddings=False)
    wide = GPT(config, [], 500)
    assert wide.position_embedding is not None and wide.head is not None
    for module in (wide.token_embedding, wide.position_embedding, wide.head):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_flops_and_sizes() -> None:
    model = build("mha", layers=3)
    per_block = 2 * (16 * 48 + 16 * 16) + 4 * 16 * 10 + 2 * (2 * 16 * 64)
    assert model.flops_per_token(10) == 3 * per_block + 2 * V * 16
    assert (model.vocab_size, model.max_seq_len, model.d_model) == (V, 16, 16)


def test_it_learns() -> None:
    """A text of one repeated word is known by heart after a few steps."""
    torch.manual_seed(0)
    model = build().float()
    text = torch.arange(17).remainder(5).expand(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = F.cross_entropy(model(text[:, :-1]).logits.flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
