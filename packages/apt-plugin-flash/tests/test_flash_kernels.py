"""`flash_v2`: which of flash-attn's functions is called with what, and what is said where none can be."""

from __future__ import annotations

import builtins
import importlib.util
import itertools
import sys
from types import ModuleType
from typing import Any

import flash_attn_reference as library
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt.api import AptWarning, ProviderError
from apt.core.providers.attention import AttentionContext
from apt.modeling.layers.attention_mha import MHAAttentionLayer
from apt.modeling.layers.config import MHAConfig
from apt.modeling.layers.masks import Limits
from apt_plugin_flash.config import WindowedMHAConfig
from apt_plugin_flash.flash import FlashAttention, FlashLayer, find_segments, load_kernels

torch.set_num_threads(1)
B, T, D, H = 2, 6, 16, 4
Calls = list[tuple[str, dict[str, Any]]]
NO_GPU = "no GPU that flash-attn runs on, or flash-attn is not installed"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return library.install(monkeypatch)


def layer(window: int | None = None, **options: Any) -> FlashLayer:
    torch.manual_seed(0)
    return FlashLayer(D, H, WindowedMHAConfig(window=window), **options).bfloat16()


def ids(*lengths: int) -> torch.Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(B, -1)


def test_training_and_full_passes_call_the_plain_function(calls: Calls) -> None:
    own, x = layer(window=3, dropout=0.25), torch.randn(B, T, D).bfloat16()
    own(x, x, x)[0].sum().backward()
    own.eval()(x, x, x)
    seen = {"causal": True, "window_size": (2, -1)}
    assert calls == [("full", {**seen, "dropout_p": 0.25}), ("full", {**seen, "dropout_p": 0.0})]
    assert not own.said


def test_packed_documents_call_the_one_for_sequences_of_different_lengths(calls: Calls) -> None:
    own, x = layer(), torch.randn(B, T, D).bfloat16()
    with torch.no_grad():
        own(x, x, x, context=AttentionContext(document_ids=ids(1, 3, 2)))
    assert calls == [("varlen", {"segments": 3 * B, "window_size": (-1, -1), "dropout_p": 0.0})]


def test_decoding_calls_the_one_for_caches_and_a_step_with_gradients_does_not(calls: Calls) -> None:
    own, x = layer(), torch.randn(B, T, D).bfloat16()
    cache = own.make_cache(B, T, dtype=torch.bfloat16)
    with torch.no_grad():
        for piece in x.split((3, 1, 2), 1):
            own(piece, piece, piece, context=AttentionContext(cache=cache))
    assert [name for name, _ in calls] == ["full", "cached", "cached"]
    cache.truncate(3)
    # A cache is written in place and so belongs to no_grad; a layer that is asked all the same keeps its backward.
    with torch.no_grad():
        k = v = torch.randn(B, T, H, D // H).bfloat16()
    own.mix(torch.randn(B, 2, H, D // H).bfloat16().requires_grad_(), k, v, Limits())
    assert calls[-1][0] == "full"


def test_what_it_does_not_take_is_computed_without_it(calls: Calls) -> None:
    own, x = layer(), torch.randn(B, T, D).bfloat16()
    with torch.no_grad():
        own(x, x, x, torch.zeros(T, T))
        own(x, x, x, None, torch.zeros(B, T, dtype=torch.bool))
        own(x, x, x, context=AttentionContext(need_weights=True))
        own(x, x, x, context=AttentionContext(document_ids=torch.tensor([[0, 1, 0, 1, 2, 2]]).expand(B, T)))
    assert not calls and not own.said


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_stays_full_and_that_is_said_once(calls: Calls, dtype: torch.dtype) -> None:
    own = layer().to(dtype)
    theirs = MHAAttentionLayer(D, H, MHAConfig()).to(dtype)
    theirs.load_state_dict(own.state_dict())
    x = torch.randn(B, T, D, dtype=dtype)
    with pytest.warns(AptWarning, match=r"flash-attn computes in fp16 and bf16 alone, .* is float") as told:
        for _ in range(2):
            assert torch.equal(own(x, x, x)[0], theirs(x, x, x)[0])
    assert len(told) == 1 and not calls


def test_a_layer_that_is_moved_off_the_gpu_still_serves(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    own, x = layer(), torch.randn(B, T, D).bfloat16()
    monkeypatch.setattr("apt_plugin_flash.flash.DEVICES", ("cuda",))
    with pytest.warns(AptWarning, match=r"flash_v2: flash-attn does not run on cpu; torch's own kernels compute it"):
        own(x, x, x)
    assert not calls


@given(data=st.data())
def test_segments_are_the_runs_of_each_row(data: st.DataObject) -> None:
    rows, S = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    T = data.draw(st.integers(1, S))
    steps = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=S, max_size=S), min_size=rows, max_size=rows))
    documents = torch.tensor(steps).cumsum(1)
    queries, keys = [0], [0]
    for row in documents.tolist():
        for document in sorted(set(row)):
            queries.append(queries[-1] + row[S - T :].count(document))
            keys.append(keys[-1] + row.count(document))
    found = find_segments(documents[:, S - T :], documents)
    assert found is not None
    assert (found.query_starts.tolist(), found.key_starts.tolist()) == (queries, keys)
    assert found.query_starts.dtype == found.key_starts.dtype == torch.int32
    assert found.longest_query == max(b - a for a, b in itertools.pairwise(queries))
    assert found.longest_key == max(b - a for a, b in itertools.pairwise(keys))


def test_the_layers_of_a_model_look_for_the_documents_once(
    calls: Calls, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        "apt_plugin_flash.flash.find_segments", lambda *given: [asked.append(1), find_segments(*given)][1]
    )
    provider = FlashAttention({})
    layers = [provider.create_layer(D, H).bfloat16() for _ in range(3)]
    documents, x = ids(2, 4).clone(), torch.randn(B, T, D).bfloat16()
    with torch.no_grad():
        for own in layers:
            own(x, x, x, context=AttentionContext(document_ids=documents))
        assert len(asked) == 1
        documents[:, 3] = 2  # written to: now two documents, of other lengths
        documents[:, 4:] = 2
        got = layers[0](x, x, x, context=AttentionContext(document_ids=documents))[0]
        assert len(asked) == 2
        fresh = layers[0](x, x, x, context=AttentionContext(document_ids=documents.clone()))[0]
    assert torch.equal(got, fresh)
    with torch.inference_mode():  # whether such a tensor was written to cannot be known
        own_ids = ids(2, 4).clone()
        for _ in range(2):
            layers[0](x, x, x, context=AttentionContext(document_ids=own_ids))
    assert len(asked) == 5


# Building


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has an H100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def test_the_provider(calls: Calls, gpu: None) -> None:
    provider = FlashAttention({"window": 4, "num_kv_heads": 2})
    assert (provider.get_name(), provider.get_version(), provider.weights_layout) == ("flash_v2", "1.0.0", "mha")
    assert provider.get_dependencies() == ["flash-attn>=2.7,<3"]
    own = provider.create_layer(D, H, device=torch.device("cuda"), trains=True, dropout=0.1, num_layers=3)
    assert isinstance(own, FlashLayer)
    assert (own.window, own.num_kv_heads, own.dropout, own.num_layers) == (4, 2, 0.1, 3)
    with pytest.raises(ProviderError, match=r"heads of 256 at most, and 1024 / 2 is 512"):
        provider.create_layer(1024, 2)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    without = builtins.__import__

    def missing(name: str, *more: Any, **options: Any) -> Any:
        if name == "flash_attn":
            raise ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn")
        return without(name, *more, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ProviderError, match="needs the package flash-attn, which is not installed") as caught:
        FlashAttention({}).create_layer(D, H)
    assert caught.value.hint is not None and 'pip install "apt-plugin-flash[cuda]"' in caught.value.hint


@pytest.mark.parametrize("error", [ImportError("undefined symbol: _ZN3c10"), OSError("libcudart.so"), None])
def test_a_package_that_does_not_import_is_to_be_built_anew(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    broken = ModuleType("flash_attn")  # without the functions, as flash-attn 4 alone leaves it
    if error is not None:

        def raise_it(name: str) -> Any:
            raise error

        broken.__getattr__ = raise_it  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "flash_attn", broken)
    with pytest.raises(ProviderError, match=f"cannot be imported: {type(error or ImportError()).__name__}"):
        load_kernels()


def test_where_there_is_no_gpu_for_it(calls: Calls, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = FlashAttention({})
    monkeypatch.setattr("apt_plugin_flash.flash.DEVICES", ("cuda",))
    with pytest.raises(ProviderError, match="needs an NVIDIA GPU, and the run is on cpu"):
        provider.create_layer(D, H, device=torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(ProviderError, match=r"Ampere generation or newer .* this one has 7\.5"):
        provider.create_layer(D, H)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ProviderError, match="needs an NVIDIA GPU, and there is none"):
        provider.create_layer(D, H)


# On a GPU


def on_a_gpu() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


@pytest.mark.skipif(not on_a_gpu(), reason=NO_GPU)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("num_kv_heads", [None, 2])
@pytest.mark.parametrize("head_dim", [20, 64, 128])
def test_the_library_itself_agrees_with_mha(
    head_dim: int, num_kv_heads: int | None, documents: bool, window: int | None
) -> None:
    device, length, width = torch.device("cuda"), 300, 4 * head_dim
    section = {"num_kv_heads": num_kv_heads, "qk_norm": True}
    exact = MHAAttentionLayer(width, 4, MHAConfig.model_validate(section)).to(device)
    own = FlashAttention({**section, "window": window}).create_layer(width, 4, device=device)
    own.load_state_dict(exact.state_dict())
    own.to(device).bfloat16()
    x = torch.randn(2, length, width, device=device)
    at = torch.arange(length, device=device)
    past = None if window is None else at[:, None] - at >= window
    packed = (at // 130).expand(2, -1) if documents else None
    wanted_in = x.clone().requires_grad_()
    wanted = exact(wanted_in, wanted_in, wanted_in, past, context=AttentionContext(document_ids=packed))[0]
    wanted.sum().backward()
    given_in = x.bfloat16().requires_grad_()
    got = own(given_in, given_in, given_in, context=AttentionContext(document_ids=packed))[0]
    got.sum().backward()
    assert not own.said
    assert given_in.grad is not None and wanted_in.grad is not None
    torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.01)
    torch.testing.assert_close(given_in.grad.float(), wanted_in.grad, rtol=0.1, atol=0.05)
    cache = own.make_cache(2, length, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        steps = [
            own(
                piece,
                piece,
                piece,
                context=AttentionContext(
                    cache=cache, document_ids=None if packed is None else packed[:, cache.length :][:, : piece.shape[1]]
                ),
            )[0]
            for piece in given_in.detach().split((200, 1, 1, 98), 1)
        ]
    torch.testing.assert_close(torch.cat(steps, 1).float(), wanted, rtol=0.05, atol=0.01)
