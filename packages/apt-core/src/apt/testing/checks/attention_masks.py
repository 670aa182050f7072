"""Attention: masks. In a boolean one True means blocked, a float one is added, and a row that sees nothing stays
finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from apt.testing.check import check
from apt.testing.compare import require, require_change, require_equal, require_finite
from apt.testing.subjects import AttentionSubject, B, T


def some_blocked(subject: AttentionSubject) -> Tensor:
    """bool [T, T]: position 4 may not see 0 and 2, position 6 not 1; each sees itself."""
    blocked_TS = torch.zeros(T, T, dtype=torch.bool, device=subject.device)
    blocked_TS[4, 0] = blocked_TS[4, 2] = blocked_TS[6, 1] = True
    return blocked_TS


def as_float(blocked: Tensor, dtype: torch.dtype) -> Tensor:
    """The float mask that says the same: 0 where seen, -inf where blocked."""
    return torch.zeros(blocked.shape, dtype=dtype, device=blocked.device).masked_fill(blocked, -math.inf)


def position_3_sees_nothing(subject: AttentionSubject) -> Tensor:
    """bool [T, T]: every key of position 3 is blocked, and no other."""
    blind_TS = torch.zeros(T, T, dtype=torch.bool, device=subject.device)
    blind_TS[3] = True
    return blind_TS


def rows_that_see_nothing(subject: AttentionSubject) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """What leaves some rows no key: in words, as arguments of the layer, and the outputs that it does not touch."""
    blind = position_3_sees_nothing(subject)
    padding = torch.zeros(B, T, dtype=torch.bool, device=subject.device)
    padding[0] = True
    late = torch.zeros_like(padding)
    late[1, 2:] = True
    others = (slice(None), [t for t in range(T) if t != 3])
    yield "a boolean attn_mask", {"attn_mask": blind}, others
    yield "a float attn_mask", {"attn_mask": as_float(blind, subject.dtype)}, others
    yield "padding", {"key_padding_mask": padding}, (1, slice(None))
    # A layer with a window of its own may see nothing but padding from the last positions.
    yield "padding and what the layer itself hides", {"key_padding_mask": late}, (1, slice(2))


@check("attention")
def boolean_mask_blocks(subject: AttentionSubject) -> None:
    """A boolean `attn_mask` changes the rows in which something is True, and those alone; all False is no mask. A mask
    read the other way round shows a model exactly what it must not see."""
    layer, x_BTD = subject.layer(), subject.x()
    plain = subject.forward(layer, x_BTD)
    nothing = torch.zeros(T, T, dtype=torch.bool, device=subject.device)
    advice = "True means blocked, as in torch.nn.MultiheadAttention (F.scaled_dot_product_attention has it reversed)"
    require_equal(
        subject.attend(layer, x_BTD, attn_mask=nothing)[0], plain, "the output under a mask of all False", advice
    )
    out = subject.attend(layer, x_BTD, attn_mask=some_blocked(subject))[0]
    touched = [4, 6]
    others = [t for t in range(T) if t not in touched]
    require_equal(out[:, others], plain[:, others], "the outputs of rows in which nothing is blocked", advice)
    for t in touched:
        require_change(out[:, t], plain[:, t], f"with keys of position {t} blocked, its output", advice)


@check("attention")
def float_mask_is_added(subject: AttentionSubject) -> None:
    """A float `attn_mask` is added to the scores: zeros change nothing, -inf blocks as True does, and what lies between
    shifts the weights. Biases such as ALiBi come in this way."""
    layer, x_BTD = subject.layer(), subject.x()
    plain = subject.forward(layer, x_BTD)
    zeros = torch.zeros(T, T, dtype=subject.dtype, device=subject.device)
    advice = "a float mask is added to the scores before the softmax, in their dtype"
    require_equal(subject.attend(layer, x_BTD, attn_mask=zeros)[0], plain, "the output under a mask of zeros", advice)
    blocked = some_blocked(subject)
    require_equal(
        subject.attend(layer, x_BTD, attn_mask=as_float(blocked, subject.dtype))[0],
        subject.attend(layer, x_BTD, attn_mask=blocked)[0],
        "the output under a mask of -inf, beside the boolean mask",
        advice,
    )
    bias = zeros.clone()
    bias[5, 0] = 2.0
    out = subject.attend(layer, x_BTD, attn_mask=bias)[0]
    require_change(out[:, 5], plain[:, 5], "with 2.0 added to one score of position 5, its output", advice)


@check("attention")
def masks_of_each_row(subject: AttentionSubject) -> None:
    """An `attn_mask` [B, T, S] acts row by row of the batch: equal masks do what one [T, S] does, and different ones do
    in a batch what each does alone."""
    layer, x_BTD = subject.layer(), subject.x()
    blocked = some_blocked(subject)
    other = torch.zeros_like(blocked)
    other[3, 1] = True
    masks_BTS = torch.stack((blocked, other))
    out = subject.attend(layer, x_BTD, attn_mask=masks_BTS)[0]
    for row in range(B):
        alone = subject.attend(layer, x_BTD[row : row + 1], attn_mask=masks_BTS[row])[0]
        require_equal(
            out[row : row + 1],
            alone,
            f"row {row} under its own mask in a batch, beside alone under the same mask",
            "masks [B, T, S] need a dimension for the heads between B and T",
        )


@check("attention", may_refuse=True)
def blocked_keys_have_no_influence(subject: AttentionSubject) -> None:
    """Without causality, content that a position may not see does not reach its output, however it is masked: by
    `attn_mask`, boolean or float, or by padding on top of it."""
    layer, x_BTD = subject.layer(causal=False), subject.x()
    blocked = torch.zeros(T, T, dtype=torch.bool, device=subject.device)
    blocked[:4, 6] = True
    padding = torch.zeros(B, T, dtype=torch.bool, device=subject.device)
    padding[:, 5] = True
    other = subject.perturbed(x_BTD, slice(None), slice(5, 7))
    for what, mask, padded in (
        ("a boolean attn_mask", blocked, padding),
        ("a float attn_mask", as_float(blocked, subject.dtype), padding),
        ("a boolean attn_mask and float padding", blocked, as_float(padding, subject.dtype)),
        ("attn_mask [B, T, S]", blocked.expand(B, T, T), padding),
    ):
        before = subject.attend(layer, x_BTD, attn_mask=mask, key_padding_mask=padded)[0]
        after = subject.attend(layer, other, attn_mask=mask, key_padding_mask=padded)[0]
        require_equal(
            after[:, :4],
            before[:, :4],
            f"under {what}, with other content where keys are blocked, the outputs",
            "a mask replaces another instead of joining it, or blocks rows in place of columns",
        )


@check("attention")
def padding_has_no_influence(subject: AttentionSubject) -> None:
    """What stands in padded positions does not reach the others, on the left as on the right, boolean or float, and
    different in each row; on the right a row gives what it gives without its padding."""
    layer, x_BTD = subject.layer(), subject.x()
    padding = torch.zeros(B, T, dtype=torch.bool, device=subject.device)
    padding[0, :2] = True
    padding[1, 4:] = True
    other = torch.where(padding[..., None], subject.x(seed=9) * 3, x_BTD)
    advice = "key_padding_mask [B, S] takes columns away from the scores, True or -inf meaning padding"
    outputs = {}
    for what, mask in (("boolean", padding), ("float", as_float(padding, subject.dtype))):
        before = outputs[what] = subject.attend(layer, x_BTD, key_padding_mask=mask)[0]
        after = subject.attend(layer, other, key_padding_mask=mask)[0]
        require_equal(
            after[~padding],
            before[~padding],
            f"with other content in padded positions ({what} mask), the outputs of the others",
            advice,
        )
    require_equal(outputs["float"][~padding], outputs["boolean"][~padding], "float padding, beside boolean", advice)
    shorter = subject.forward(layer, x_BTD[1:, :4])
    require_equal(outputs["boolean"][1:, :4], shorter, "a row padded on the right, beside the row without it", advice)


@check("attention")
def rows_that_see_nothing_are_finite(subject: AttentionSubject) -> None:
    """A position whose every key is blocked, by `attn_mask` or because its whole row is padding, gives finite output
    that no key has reached, and disturbs no other: a softmax over nothing is NaN, and one NaN ends a run."""
    layer, x_BTD = subject.layer(), subject.x()
    advice = "a softmax over a row of -inf is NaN: show such rows everything, and set their output to zero afterwards"
    plain = subject.forward(layer, x_BTD)
    for what, masks, untouched in rows_that_see_nothing(subject):
        out = subject.attend(layer, x_BTD, **masks)[0]
        require_finite(out, f"with every key blocked by {what}, the output", advice)
        require_equal(
            out[untouched], plain[untouched], f"beside rows that see nothing under {what}, the others", advice
        )
    blind = position_3_sees_nothing(subject)
    first = subject.attend(layer, x_BTD, attn_mask=blind)[0][:, 3]
    other = subject.attend(layer, subject.perturbed(x_BTD, slice(None), slice(0, 3)), attn_mask=blind)[0][:, 3]
    require_equal(other, first, "with other content in keys that are all blocked, the output", advice)


@check("attention")
def rows_that_see_nothing_have_finite_gradients(subject: AttentionSubject) -> None:
    """The backward pass through rows that see nothing is finite too: a NaN that the forward pass covers up comes back
    as 0 x NaN in the gradients."""
    advice = "cover the scores before the softmax and not its result after it: torch.where passes NaN back"
    for what, masks, _untouched in rows_that_see_nothing(subject):
        layer, x_BTD = subject.layer(training=True), subject.x(grad=True)
        subject.attend(layer, x_BTD, **masks)[0].sum().backward()
        for name, tensor in [("the input", x_BTD), *layer.named_parameters()]:
            if tensor.grad is not None:
                require_finite(tensor.grad, f"with every key blocked by {what}, the gradient of {name}", advice)
        require(x_BTD.grad is not None, f"with every key blocked by {what}, the input gets no gradient")
