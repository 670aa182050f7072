"""The provider `flash_v2`: the kernels of the package flash-attn (Dao, "FlashAttention-2", 2023).

Packed documents go through its kernel for sequences of different lengths, so that nothing is computed between them, and
decoding through the one that splits a long cache among the processors of the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apt.api import ProviderError
from apt.modeling.layers.masks import Limits
from apt_plugin_flash.sdpa import SDPAAttention, SDPALayer
from apt_plugin_flash.shared import Latest, of_one_dtype, wants_gradient

REQUIREMENT = "flash-attn>=2.7,<3"
MAX_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)
DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16)


class Kernels(NamedTuple):
    """The three functions of flash-attn that are called here."""

    full: Callable[..., Any]
    """(q [B, T, H, d], k, v [B, S, K, d], dropout_p, causal, window_size) -> [B, T, H, d]. Where T < S causal means
    that the queries are the last ones. A window (left, right) counts the positions beside a query's own, -1 for all."""
    varlen: Callable[..., Any]
    """The same for segments that lie one after the other, [N, H, d]; number n is cu_seqlens[n] to cu_seqlens[n + 1]."""
    cached: Callable[..., Any]
    """(q, k_cache, v_cache, causal, window_size) -> [B, T, H, d]; without a backward pass."""


class Segments(NamedTuple):
    """Where the documents of a batch begin and end when its rows are laid one after the other."""

    query_starts: Tensor
    """int32 [N + 1]; a document that no query belongs to is empty here."""
    key_starts: Tensor
    """int32 [N + 1]"""
    longest_query: int
    longest_key: int


def load_kernels() -> Kernels:
    """flash-attn's functions.

    Raises:
        ProviderError: it is not installed, or built for another version of torch or CUDA.
    """
    install = 'pip install "apt-plugin-flash[cuda]" where there is an NVIDIA GPU with its CUDA compiler'
    instead = "--model.attention_name flash_sdpa needs neither"
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
    except ModuleNotFoundError as error:
        if error.name != "flash_attn":
            raise _broken(error) from error
        raise ProviderError(
            "attention:flash_v2 needs the package flash-attn, which is not installed", hint=f"{install}; {instead}"
        ) from error
    except Exception as error:
        raise _broken(error) from error
    return Kernels(flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)


def _broken(error: Exception) -> ProviderError:
    return ProviderError(
        f"attention:flash_v2: flash-attn cannot be imported: {type(error).__name__}: {error}",
        hint='build it anew for this torch: pip install --no-build-isolation --force-reinstall --no-deps "flash-attn"',
    )


class FlashLayer(SDPALayer):
    """The weights of `mha`, scored by flash-attn in fp16 or bf16.

    What flash-attn does not take, float32, masks, a padding and weights that are asked for, is the parent's to compute;
    the result is the same, and the numbers keep their precision.

    Args: as those of `SDPALayer`.

    Raises:
        ProviderError: flash-attn cannot be imported, or the heads are too large for it.
    """

    name = "flash_v2"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.head_dim > MAX_HEAD_DIM:
            raise ProviderError(
                f"attention:flash_v2: flash-attn takes heads of {MAX_HEAD_DIM} at most, and {self.d_model} / "
                f"{self.num_heads} is {self.head_dim}",
                hint="use more heads, or flash_sdpa",
            )
        self.kernels = load_kernels()
        self.segments: Latest[Segments | None] = Latest()

    def mix(
        self, q_BTHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, limits: Limits, *, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See `MHAAttentionLayer.mix`."""
        q, k, v = of_one_dtype(q_BTHd, k_BSKd, v_BSKd)
        problem = self._problem(q)
        if problem:
            self.say(f"flash_v2: flash-attn {problem}; torch's own kernels compute it")
        masked = limits.attn_mask is not None or limits.key_padding_mask is not None
        if not (problem or masked or need_weights):
            out_BTHd = self._flash(q, k, v, limits)
            if out_BTHd is not None:
                return out_BTHd, None
        return super().mix(q_BTHd, k_BSKd, v_BSKd, limits, need_weights=need_weights)

    def _problem(self, q: Tensor) -> str | None:
        if q.device.type not in DEVICES:
            return f"does not run on {q.device.type}"
        if q.dtype not in DTYPES:
            return f"computes in fp16 and bf16 alone, and this (in evaluation, say) is {q.dtype}".replace("torch.", "")
        return None

    def _flash(self, q: Tensor, k: Tensor, v: Tensor, limits: Limits) -> Tensor | None:
        """The output, or None for documents that do not lie in one piece."""
        dropout = self.dropout if self.training else 0.0
        options: dict[str, Any] = {
            "causal": self.causal, "window_size": (-1 if self.window is None else self.window - 1, -1)
        }  # fmt: skip
        out: Tensor
        documents_BT, documents_BS = limits.query_documents_BT, limits.key_documents_BS
        if documents_BT is not None and documents_BS is not None:
            found = self.segments(lambda: find_segments(documents_BT, documents_BS), documents_BT, documents_BS)
            if found is None:
                return None
            flat = (x.flatten(0, 1) for x in (q, k, v))
            out = self.kernels.varlen(
                *flat,
                cu_seqlens_q=found.query_starts, cu_seqlens_k=found.key_starts,
                max_seqlen_q=found.longest_query, max_seqlen_k=found.longest_key,
                dropout_p=dropout, **options,
            )  # fmt: skip
            return out.reshape(q.shape)
        if q.shape[1] < k.shape[1] and not dropout and not wants_gradient(q, k, v):
            out = self.kernels.cached(q, k, v, **options)
            return out
        out = self.kernels.full(q, k, v, dropout_p=dropout, **options)
        return out


def find_segments(documents_BT: Tensor, documents_BS: Tensor) -> Segments | None:
    """Where each document lies.

    Args:
        documents_BT, documents_BS: int64, of the queries and of the keys; the queries are the last T of the positions.

    Returns:
        None if ids fall within a row: a document may then lie in several pieces, which no segment can hold.
    """
    (B, T), S = documents_BT.shape, documents_BS.shape[1]
    step_BS = documents_BS.diff(dim=1)
    begins_BS = torch.nn.functional.pad(step_BS != 0, (1, 0), value=True)
    key_starts = begins_BS.flatten().nonzero().flatten()
    key_starts = torch.cat((key_starts, key_starts.new_tensor([B * S])))
    # As many queries lie before position s of row b as rows before it have, and of its own those from S - T on.
    rows, places = key_starts // S, key_starts % S
    query_starts = rows * T + (places - (S - T)).clamp_min(0)
    facts = torch.stack((query_starts.diff().max(), key_starts.diff().max(), (step_BS < 0).any().long()))
    longest_query, longest_key, falls = facts.tolist()  # waits for the GPU, once for all layers
    if falls:
        return None
    return Segments(query_starts.int(), key_starts.int(), longest_query, longest_key)


class FlashAttention(SDPAAttention):
    """Multi-head and grouped-query attention on flash-attn, for NVIDIA GPUs of the Ampere generation or newer."""

    Layer = FlashLayer

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._segments: Latest[Segments | None] = Latest()

    def get_dependencies(self) -> list[str]:
        return [REQUIREMENT]

    def create_layer(self, d_model: int, num_heads: int, **options: Any) -> SDPALayer:
        """See `AttentionProvider.create_layer`.

        Raises:
            ProviderError: flash-attn or a GPU that it runs on is missing, or the heads are too large for it.
        """
        load_kernels()
        check_gpu(options.get("device"))
        layer = super().create_layer(d_model, num_heads, **options)
        assert isinstance(layer, FlashLayer)
        layer.segments = self._segments
        return layer


def check_gpu(device: torch.device | None) -> None:
    """Raise ProviderError if flash-attn cannot run on `device`, or, where that is not known, on the GPU there is."""
    instead = "--model.attention_name flash_sdpa runs here"
    if (device is not None and device.type not in DEVICES) or not torch.cuda.is_available():
        what = (
            f"and the run is on {device.type}" if device is not None and device.type != "cuda" else "and there is none"
        )
        raise ProviderError(f"attention:flash_v2 needs an NVIDIA GPU, {what}", hint=instead)
    found = torch.cuda.get_device_capability(device)
    if found < MIN_CAPABILITY:
        raise ProviderError(
            f"attention:flash_v2 needs an NVIDIA GPU of the Ampere generation or newer (compute capability 8.0), and "
            f"this one has {found[0]}.{found[1]}",
            hint=instead,
        )


__all__ = ["FlashAttention", "FlashLayer", "Kernels", "Segments", "check_gpu", "find_segments", "load_kernels"]
