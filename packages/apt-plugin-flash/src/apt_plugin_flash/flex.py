"""The provider `flex`: FlexAttention (Dong et al., "Flex Attention", 2024), which skips what a mask blocks by whole
blocks, so that a window or packed documents save time and not only change the result.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from apt.api import ProviderError
from apt.modeling.layers.masks import Limits, check_mask
from apt_plugin_flash.sdpa import SDPAAttention, SDPALayer
from apt_plugin_flash.shared import Latest, of_one_dtype, wants_gradient

COMPILED_FROM = 512
"""On CPUs, the queries from which the kernel is compiled, for sizes that come a second time. It takes from five seconds
on, for each size anew: what torch 2.13 compiles there for changing sizes fails. On GPUs it is always compiled."""

FORMS = 64
"""How many forms of the call a process may compile; torch's own 8, for all models together, are soon used up."""

NO_BACKWARD = "FlexAttention has no backward pass on the CPU"
NO_DROPOUT = "FlexAttention drops no attention weights"
NOT_COMPILED = (
    "flex: FlexAttention cannot be compiled here (a C++ compiler or Triton may be missing); uncompiled it is slower "
    "and holds all scores in memory"
)


class FlexLayer(SDPALayer):
    """The weights of `mha`, scored by FlexAttention: causal, within a window, within documents, under boolean masks.

    A single position, which has no block to skip, float masks, dropout and weights that are asked for are the parent's
    to compute; so is what would need a backward pass on a CPU, which is said.
    """

    name = "flex"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.block_masks: Latest[BlockMask] = Latest()
        self._sizes: set[tuple[int, ...]] = set()

    def mix(
        self, q_BTHd: Tensor, k_BSKd: Tensor, v_BSKd: Tensor, limits: Limits, *, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See `MHAAttentionLayer.mix`."""
        problem = self._problem(q_BTHd, k_BSKd, v_BSKd)
        if problem:
            self.say(f"flex: {problem}; torch's other kernels compute it")
        is_bias = any(m is not None and m.dtype != torch.bool for m in (limits.attn_mask, limits.key_padding_mask))
        if problem or need_weights or is_bias or q_BTHd.shape[1] == 1:
            return super().mix(q_BTHd, k_BSKd, v_BSKd, limits, need_weights=need_weights)
        block_mask = self._block_mask(q_BTHd, k_BSKd.shape[1], limits)
        # One layout, whether they are cut out of a projection or of a cache: each one more would be compiled anew.
        q_BHTd, k_BKSd, v_BKSd = (x.contiguous().transpose(1, 2) for x in of_one_dtype(q_BTHd, k_BSKd, v_BSKd))
        return self._run(q_BHTd, k_BKSd, v_BKSd, block_mask).transpose(1, 2), None

    def _problem(self, *tensors: Tensor) -> str | None:
        device = tensors[0].device.type
        if device not in ("cpu", "cuda"):
            return f"FlexAttention is not known to run on {device}"
        if device == "cpu" and wants_gradient(*tensors):
            return NO_BACKWARD
        return NO_DROPOUT if self.training and self.dropout else None

    def _block_mask(self, q_BTHd: Tensor, key_length: int, limits: Limits) -> BlockMask | None:
        if not self.causal and all(limit is None for limit in limits):
            return None
        B, T = q_BTHd.shape[:2]
        attn_mask, key_padding_mask, documents_BT, _ = limits
        differs = documents_BT is not None
        if attn_mask is not None:
            check_mask("attn_mask", attn_mask, (T, key_length), (B, T, key_length))
            differs |= attn_mask.dim() == 3
        if key_padding_mask is not None:
            check_mask("key_padding_mask", key_padding_mask, (B, key_length))
            differs = True

        def make() -> BlockMask:
            sees = who_sees_whom(key_length - T, self.causal, self.window, limits, q_BTHd.device)
            return create_block_mask(sees, B if differs else None, None, T, key_length, device=q_BTHd.device)

        return self.block_masks(make, B, T, key_length, self.causal, self.window, q_BTHd.device, *limits)

    def _run(self, q_BHTd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, block_mask: BlockMask | None) -> Tensor:
        from torch._dynamo import config as dynamo
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        options: dict[str, Any] = {"block_mask": block_mask, "enable_gqa": q_BHTd.shape[1] > k_BKSd.shape[1]}
        if torch.compiler.is_compiling():
            return _tensor(flex_attention(q_BHTd, k_BKSd, v_BKSd, **options))
        if NOT_COMPILED not in self.said and (q_BHTd.is_cuda or self._pays_to_compile(q_BHTd, k_BKSd)):
            try:
                with dynamo.patch(recompile_limit=FORMS):
                    return _tensor(compiled(q_BHTd.device.type)(q_BHTd, k_BKSd, v_BKSd, **options))
            except (TorchDynamoException, FailOnRecompileLimitHit):  # no C++ compiler, no Triton, sizes without code
                self.say(NOT_COMPILED)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            return _tensor(flex_attention(q_BHTd, k_BKSd, v_BKSd, **options))

    def _pays_to_compile(self, q_BHTd: Tensor, k_BKSd: Tensor) -> bool:
        if q_BHTd.shape[2] < COMPILED_FROM or q_BHTd.dtype == torch.float64:  # of which it knows nothing
            return False
        sizes = (*q_BHTd.shape, *k_BKSd.shape)
        comes_again = sizes in self._sizes
        self._sizes.add(sizes)
        return comes_again


def who_sees_whom(
    offset: int, causal: bool, window: int | None, limits: Limits, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether, in row b, query i sees key j; query i stands at position i + offset."""
    attn_mask, key_padding_mask, documents_BT, documents_BS = limits
    # Tensors, for every other number would be compiled anew; a window as wide as can be is none.
    offset_ = torch.tensor(offset, device=device)
    window_ = torch.tensor(2**30 if window is None else window, device=device)

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j >= 0
        if causal:
            past = i + offset_ - j
            seen = (past >= 0) & (past < window_)
        if documents_BT is not None and documents_BS is not None:
            seen = seen & (documents_BT[b, i] == documents_BS[b, j])
        if key_padding_mask is not None:
            seen = seen & ~key_padding_mask[b, j]
        if attn_mask is not None:
            seen = seen & ~(attn_mask[b, i, j] if attn_mask.dim() == 3 else attn_mask[i, j])
        return seen

    return sees


@functools.cache
def compiled(device: str) -> Callable[..., Any]:
    """FlexAttention as it is meant to be called."""
    return torch.compile(flex_attention, fullgraph=True, dynamic=False if device == "cpu" else None)


def _tensor(out: Any) -> Tensor:
    assert isinstance(out, Tensor)
    return out


class FlexAttention(SDPAAttention):
    """Multi-head and grouped-query attention on FlexAttention, which skips what a window or documents block.

    It trains on GPUs; on a CPU it evaluates and generates.
    """

    Layer = FlexLayer

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._block_masks: Latest[BlockMask] = Latest()

    def create_layer(self, d_model: int, num_heads: int, **options: Any) -> SDPALayer:
        """See `AttentionProvider.create_layer`.

        Raises:
            ProviderError: it is to be trained on a CPU, or with dropout.
        """
        device = options.get("device")
        if options.get("trains"):
            if device is not None and device.type != "cuda":
                raise ProviderError(
                    f"attention:flex: {NO_BACKWARD if device.type == 'cpu' else f'it does not train on {device.type}'}",
                    hint="train on a GPU, or with flash_sdpa, whose runs flex can open to evaluate and to generate",
                )
            if options.get("dropout"):
                raise ProviderError(
                    f"attention:flex: {NO_DROPOUT}, and model.dropout is {options['dropout']:g}",
                    hint="set model.dropout to 0, or use flash_sdpa",
                )
        layer = super().create_layer(d_model, num_heads, **options)
        assert isinstance(layer, FlexLayer)
        layer.block_masks = self._block_masks
        return layer


__all__ = ["FlexAttention", "FlexLayer", "who_sees_whom"]
