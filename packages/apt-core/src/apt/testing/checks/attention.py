"""Attention: who sees whom, and what a layer says of itself."""

from __future__ import annotations

from typing import Any

import torch

from apt.core.errors import HINT, ConfigError, did_you_mean
from apt.core.providers.attention import AttentionContext
from apt.testing.check import check
from apt.testing.compare import require, require_change, require_equal
from apt.testing.subjects import AttentionSubject, T, takes_context

CAPABILITIES = ("cache", "documents", "cross_attention", "cross_cache", "weights")


@check("attention")
def capabilities_are_known(subject: AttentionSubject) -> None:
    """What it claims in `capabilities` is among the names that exist: a claim that nobody reads is refused at the first
    run that needs it."""
    layer = subject.build()
    claimed: Any = getattr(layer, "capabilities", frozenset())
    require(isinstance(claimed, (frozenset, set)), f"capabilities is {claimed!r}: make it a frozenset of names")
    for name in sorted(claimed):
        near = did_you_mean(str(name), CAPABILITIES, cutoff=HINT)
        require(
            name in CAPABILITIES,
            f"capabilities holds {name!r}, which nothing reads"
            + (f": did you mean {near!r}?" if near else f": there are {', '.join(CAPABILITIES)}"),
        )
    for name in sorted(claimed & {"cache", "cross_cache"}):
        require(hasattr(layer, "make_cache"), f"it claims {name!r} and has no make_cache")
    if claimed & {"cache", "cross_cache", "documents", "weights"}:
        require(takes_context(layer), "it claims what arrives in `context`, and its forward takes no context")


@check("attention")
def heads_that_do_not_fit_are_refused(subject: AttentionSubject) -> None:
    """A d_model that is no multiple of num_heads raises ConfigError, which a user reads as one line; whatever else is
    raised makes the run fall back to another attention."""
    d_model = subject.d_model
    try:
        subject._create(d_model, d_model - 1)
    except ConfigError:
        return
    except Exception as error:
        require(False, f"d_model {d_model} with {d_model - 1} heads raises {type(error).__name__}, not ConfigError")
    require(False, f"d_model {d_model} with {d_model - 1} heads is accepted: raise ConfigError and say what fits")


@check("attention")
def causality(subject: AttentionSubject) -> None:
    """No output depends on what comes after it. A layer that looks ahead by one position trains to a loss near zero
    and generates nonsense."""
    for length in (2, T):
        layer, x_BTD = subject.layer(), subject.x(length=length)
        before = subject.forward(layer, x_BTD)
        for position in range(1, length):
            after = subject.forward(layer, subject.perturbed(x_BTD, slice(None), slice(position, None)))
            require_equal(
                after[:, :position],
                before[:, :position],
                f"of {length} positions, with other content from position {position} on, the outputs before it",
                "it looks ahead: position t may see keys 0 to t; check the diagonal of the causal mask",
            )


@check("attention")
def past_is_used(subject: AttentionSubject) -> None:
    """Each output depends on the position before it, and the last one on the past as a whole: attention that sees
    itself alone is a slow feed-forward layer."""
    layer, x_BTD = subject.layer(), subject.x()
    before = subject.forward(layer, x_BTD)
    for position in range(T - 1):
        after = subject.forward(layer, subject.perturbed(x_BTD, slice(None), position))
        require_change(
            after[:, position + 1],
            before[:, position + 1],
            f"with another input at position {position}, the output at position {position + 1}",
            "the past is hidden: check the diagonal and the direction of the causal mask",
        )
    after = subject.forward(layer, subject.perturbed(x_BTD, slice(None), slice(0, T - 1)))
    require_change(after[:, -1], before[:, -1], "with another past, the last output", "the past is hidden")


@check("attention", may_refuse=True)
def without_causality_the_future_is_seen(subject: AttentionSubject) -> None:
    """With `causal=False` the first output depends on the last input: encoders and cross-attention are built so, and a
    layer that stays causal there sees a triangle of its memory without a word."""
    layer, x_BTD = subject.layer(causal=False), subject.x()
    before = subject.forward(layer, x_BTD)
    after = subject.forward(layer, subject.perturbed(x_BTD, slice(None), T - 1))
    require_change(
        after[:, 0],
        before[:, 0],
        "with causal=False and another last input, the first output",
        "the layer stays causal: read `causal` where the mask is made, or refuse causal=False with a ProviderError",
    )


@check("attention")
def output_comes_with_weights_or_none(subject: AttentionSubject) -> None:
    """`forward` returns a pair whose second part is None unless weights were asked for: weights that nobody asked for
    cost T x T numbers per head."""
    layer, x_BTD = subject.layer(), subject.x()
    weights = subject.attend(layer, x_BTD)[1]
    require(weights is None, "weights come back without being asked for: return (output, None)")


@check("attention", needs="context")
def default_positions_count_from_zero(subject: AttentionSubject) -> None:
    """Positions given as 0 to T - 1, for all rows together or for each, change nothing: that is what no positions
    mean."""
    layer, x_BTD = subject.layer(), subject.x()
    expected = subject.forward(layer, x_BTD)
    positions_T = torch.arange(T, device=subject.device)
    for positions in (positions_T, positions_T.repeat(len(x_BTD), 1)):
        out = subject.attend(layer, x_BTD, context=AttentionContext(positions=positions))[0]
        require_equal(
            out,
            expected,
            f"the output with positions 0 to {T - 1} given as {list(positions.shape)}",
            "positions are int64 [T] or [B, T] and start at 0 where none are given",
        )


@check("attention", needs="context")
def positions_are_per_row(subject: AttentionSubject) -> None:
    """Positions [B, T] that differ from row to row act on their own row: prompts of different lengths share a batch so,
    padded on the left."""
    layer, x_BTD = subject.layer(), subject.x()
    positions_BT = torch.stack((torch.arange(T), torch.arange(T) * 2 + 3)).to(subject.device)
    together = subject.attend(layer, x_BTD, context=AttentionContext(positions=positions_BT))[0]
    for row in range(2):
        alone = subject.attend(
            layer, x_BTD[row : row + 1], context=AttentionContext(positions=positions_BT[row : row + 1])
        )[0]
        require_equal(
            together[row : row + 1],
            alone,
            f"with positions {positions_BT[row].tolist()} in row {row}, beside that row alone",
            "one row's positions are used for another: look at how they are broadcast over heads and batch",
        )


@check("attention", needs="context")
def the_context_stays_as_it_is(subject: AttentionSubject) -> None:
    """Masks, positions and document ids are not written to, nor the context's fields: all layers of a model are handed
    the same ones."""
    layer, x_BTD = subject.layer(), subject.x()
    attn_mask = torch.ones(T, T, device=subject.device).tril().log().to(subject.dtype)
    padding = torch.zeros(len(x_BTD), T, dtype=torch.bool, device=subject.device)
    padding[0, -2:] = True
    context = AttentionContext(positions=torch.arange(T, device=subject.device))
    if subject.lacks("documents") is None:
        context.document_ids = torch.zeros(len(x_BTD), T, dtype=torch.int64, device=subject.device)
    given = {"attn_mask": attn_mask, "key_padding_mask": padding, "positions": context.positions}
    given["document_ids"] = context.document_ids
    before = {name: None if tensor is None else tensor.clone() for name, tensor in given.items()}
    with torch.no_grad():
        subject.attend(layer, x_BTD, attn_mask=attn_mask, key_padding_mask=padding, context=context)
    same_object = context.positions is given["positions"] and context.document_ids is given["document_ids"]
    require(same_object, "forward puts other tensors into the context: work on your own names")
    for name, tensor in given.items():
        if tensor is not None:
            same = torch.equal(tensor, before[name])  # type: ignore[arg-type]
            require(same, f"forward changes {name} in place: look for |=, masked_fill_ and copy_")
