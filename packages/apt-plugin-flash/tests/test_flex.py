"""`flex`: when FlexAttention is what computes, compiled or not, and where it is refused."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from apt.api import AptWarning, ProviderError
from apt.core.providers.attention import AttentionContext
from apt.modeling.layers.attention_mha import MHAAttentionLayer
from apt.modeling.layers.config import MHAConfig
from apt.modeling.layers.masks import Limits
from apt_plugin_flash import flex
from apt_plugin_flash.config import WindowedMHAConfig
from apt_plugin_flash.flex import FlexAttention, FlexLayer

torch.set_num_threads(1)
B, T, D, H = 2, 8, 16, 4
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each call of FlexAttention."""
    calls: list[dict[str, Any]] = []
    real = flex.flex_attention

    def noted(*tensors: torch.Tensor, **options: Any) -> Any:
        calls.append(options)
        return real(*tensors, **options)

    monkeypatch.setattr(flex, "flex_attention", noted)
    return calls


def layer(window: int | None = None, num_kv_heads: int | None = 2, **options: Any) -> FlexLayer:
    torch.manual_seed(0)
    return FlexLayer(D, H, WindowedMHAConfig(window=window, num_kv_heads=num_kv_heads), **options)


def mha_of(own: FlexLayer) -> MHAAttentionLayer:
    theirs = MHAAttentionLayer(D, H, MHAConfig(num_kv_heads=own.num_kv_heads), causal=own.causal)
    theirs.load_state_dict(own.state_dict())
    return theirs.to(own.w_o.weight.device)


@torch.no_grad()
def test_it_computes_what_has_blocks_to_skip(kernel: list[dict[str, Any]]) -> None:
    own, x = layer(window=3), torch.randn(B, T, D)
    documents = (torch.arange(T) // 4).expand(B, T)
    blocked = torch.zeros(B, T, dtype=torch.bool)
    own(x, x, x)
    own(x, x, x, context=AttentionContext(document_ids=documents))
    own(x, x, x, torch.zeros(T, T, dtype=torch.bool), blocked)
    cache = own.make_cache(B, T)
    for piece in x.split((5, 3), 1):
        own(piece, piece, piece, context=AttentionContext(cache=cache))
    assert [call["block_mask"].shape for call in kernel] == [
        (1, 1, T, T), (B, 1, T, T), (B, 1, T, T), (1, 1, 5, 5), (1, 1, 3, T)
    ]  # fmt: skip
    assert all(call["enable_gqa"] for call in kernel)
    layer(causal=False)(x, x, x)
    assert kernel[-1]["block_mask"] is None


def test_and_leaves_the_rest_to_torch(kernel: list[dict[str, Any]]) -> None:
    own, x = layer(), torch.randn(B, T, D)
    with torch.no_grad():
        own(x, x, x, torch.zeros(T, T))
        own(x, x, x, context=AttentionContext(need_weights=True))
        own(x[:, :1], x[:, :1], x[:, :1])
    assert not own.said
    with pytest.warns(AptWarning, match="FlexAttention has no backward pass on the CPU; torch's other kernels") as told:
        own(x, x, x)
        own(x, x, x)
    assert len(told) == 1
    own = layer(dropout=0.5)
    with torch.no_grad(), pytest.warns(AptWarning, match="FlexAttention drops no attention weights"):
        own(x, x, x)
    assert not kernel


@torch.no_grad()
def test_blocks_nobody_sees_are_not_computed() -> None:
    own = layer(window=128)
    x = torch.randn(1, 1024, D)
    documents = (torch.arange(1024) // 256)[None]
    q = x.unflatten(-1, (H, D // H))
    narrow, whole = own._block_mask(q, 1024, Limits()), layer()._block_mask(q, 1024, Limits())
    packed = layer()._block_mask(q, 1024, Limits(None, None, documents, documents))
    assert narrow is not None and whole is not None and packed is not None
    # 8 x 8 blocks of 128: the diagonal and the one beside it; the lower triangle; four triangles of two blocks.
    assert [round((100 - mask.sparsity()) / 100 * 64) for mask in (narrow, whole, packed)] == [15, 36, 12]


@torch.no_grad()
def test_the_layers_of_a_model_share_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = flex.create_block_mask
    monkeypatch.setattr(flex, "create_block_mask", lambda *a, **o: [made.append(1), real(*a, **o)][1])
    provider = FlexAttention({})
    layers = [provider.create_layer(D, H) for _ in range(3)]
    x, documents = torch.randn(B, T, D), (torch.arange(T) // 4).expand(B, T)
    for own in layers:
        own(x, x, x, context=AttentionContext(document_ids=documents))
    assert len(made) == 1
    layers[0](x, x, x, context=AttentionContext(document_ids=documents.clone()))
    layers[0](x[:, :5], x[:, :5], x[:, :5])
    assert len(made) == 3
    FlexAttention({}).create_layer(D, H)(x[:, :5], x[:, :5], x[:, :5])
    assert len(made) == 4


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
@torch.no_grad()
def test_compiled_it_agrees_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "COMPILED_FROM", 2)
    own, x = layer(), torch.randn(B, T, D)
    documents, padding = (torch.arange(T) // 4).expand(B, T), torch.zeros(B, T, dtype=torch.bool)
    padding[0, 4] = True  # the first of its document, which then sees nothing
    context = AttentionContext(document_ids=documents)
    own(x, x, x, None, padding, context=context)  # sizes that come once are not worth it
    got, wanted = (
        own(x, x, x, None, padding, context=context)[0],
        mha_of(own)(x, x, x, None, padding, context=context)[0],
    )
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-7)
    assert got[0, 4].eq(0).all() and not own.said


@torch.no_grad()
def test_what_cannot_be_compiled_runs_uncompiled_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def compiled(device: str) -> Any:
        asked.append(1)
        raise TorchDynamoException("no C++ compiler")

    monkeypatch.setattr(flex, "COMPILED_FROM", 2)
    monkeypatch.setattr(flex, "compiled", compiled)
    own, x = layer(), torch.randn(B, T, D)
    with pytest.warns(AptWarning, match="FlexAttention cannot be compiled here") as told:
        for _ in range(3):
            torch.testing.assert_close(own(x, x, x)[0], mha_of(own)(x, x, x)[0], rtol=0, atol=1e-6)
    assert len(told) == len(asked) == 1


def test_the_provider_refuses_to_train_where_it_cannot() -> None:
    provider = FlexAttention({"window": 4})
    assert (provider.get_name(), provider.weights_layout) == ("flex", "mha")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(ProviderError, match="attention:flex: FlexAttention has no backward pass on the CPU") as caught:
        provider.create_layer(D, H, device=cpu, trains=True)
    assert caught.value.hint is not None and "flash_sdpa" in caught.value.hint
    with pytest.raises(ProviderError, match="attention:flex: it does not train on mps"):
        provider.create_layer(D, H, device=torch.device("mps"), trains=True)
    with pytest.raises(ProviderError, match=r"drops no attention weights, and model\.dropout is 0\.1"):
        provider.create_layer(D, H, device=gpu, trains=True, dropout=0.1)
    for options in ({"device": cpu, "dropout": 0.1}, {"device": gpu, "trains": True}, {}):
        own = provider.create_layer(D, H, **options)
        assert isinstance(own, FlexLayer) and own.window == 4


@GPU
def test_on_a_gpu_it_trains() -> None:
    own = layer(window=40).cuda()
    theirs = mha_of(own)
    x, at = torch.randn(B, 200, D, device="cuda"), torch.arange(200, device="cuda")
    documents = (at // 90).expand(B, -1)
    context, gradients = AttentionContext(document_ids=documents), []
    for module, mask in ((own, None), (theirs, at[:, None] - at >= 40)):
        own_x = x.clone().requires_grad_()
        module(own_x, own_x, own_x, mask, context=context)[0].square().sum().backward()
        assert own_x.grad is not None
        gradients.append(own_x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-4)
    assert not own.said
