"""Router: a mixture of experts in the place of a dense layer."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from apt.testing.check import check
from apt.testing.compare import require, require_equal, require_finite
from apt.testing.subjects import DenseFFN, RouterSubject, T, probe


@check("router")
def tokens_are_independent_in_evaluation(subject: RouterSubject) -> None:
    """In evaluation a token's output depends on that token alone. Experts that are full because of later tokens, or
    that choose among all tokens, let the future leak and make an answer depend on what else is in the batch."""
    layer, x_BTD = subject.layer(), subject.x(length=16)
    before = subject.forward(layer, x_BTD)
    for position in (0, 5, 15):
        after = subject.forward(layer, subject.perturbed(x_BTD, slice(None), position))
        others = [t for t in range(16) if t != position]
        require_equal(
            after[:, others],
            before[:, others],
            f"in evaluation, with another token at position {position}, the outputs of the others",
            "drop capacity limits and choices over all tokens outside of training",
        )


@check("router")
def the_router_learns(subject: RouterSubject) -> None:
    """The gradient of the output reaches parameters that were not in the dense layer, the router's own: a hard choice
    without a weight on it has no gradient, and such a router stays as it was drawn."""
    base = DenseFFN(subject.d_model, 37, bias=False)  # shapes that no router has
    shapes = {tuple(parameter.shape) for parameter in base.parameters()}
    layer = subject.layer(training=True, base=base)
    out_BTD = subject.forward(layer, subject.x(length=32))
    (out_BTD * probe(out_BTD)).sum().backward()
    own = {
        name: parameter.grad
        for name, parameter in layer.named_parameters()
        # Copies of the dense layer's weights, alone or stacked.
        if parameter.requires_grad and not {tuple(parameter.shape), tuple(parameter.shape[1:])} & shapes
    }
    require(own, "it has no parameter of its own beside copies of the dense layer's: nothing chooses the experts")
    require(
        any(grad is not None and bool(grad.any()) for grad in own.values()),
        f"the output gives no gradient to {', '.join(own)}: weigh each expert's output by its probability",
    )


@check("router")
def aux_loss_has_the_scale_of_a_mean(subject: RouterSubject) -> None:
    """The same tokens eight times over give the same aux_loss: it joins a mean per token, and a sum would grow with the
    batch until it drowned the cross-entropy."""
    layer, x_BTD = subject.layer(training=True), subject.x(length=16)
    losses = []
    for copies in (1, 8):
        torch.manual_seed(3)
        aux = subject.output_and_aux(layer, x_BTD.repeat(copies, 1, 1))[1]
        assert aux is not None
        losses.append(float(aux.detach()))
    require(
        abs(losses[1] - losses[0]) <= 0.25 * abs(losses[0]) + 1e-6,
        f"aux_loss is {losses[0]:.4g} for 32 tokens and {losses[1]:.4g} for the same eight times over: use means",
    )


@check("router")
def aux_loss_is_repeatable(subject: RouterSubject) -> None:
    """In training, steps on the same tokens without an update give the same aux_loss and the same output: statistics of
    the load that add up or average over steps let them drift while nothing has changed."""
    layer, x_BTD = subject.layer(training=True), subject.x(length=16)
    first: tuple[Tensor, Tensor | None] | None = None
    for call in range(6):
        torch.manual_seed(3)
        out, aux = subject.output_and_aux(layer, x_BTD)
        first = first or (out, aux)
        assert aux is not None
        assert first[1] is not None
        advice = "compute it from this batch alone; clear statistics of the load between steps"
        require_equal(aux, first[1], f"aux_loss of call {call + 1} on the same tokens, beside the first", advice)
        require_equal(out, first[0], f"the output of call {call + 1} on the same tokens, beside the first", advice)


@check("router")
def the_dense_layer_stays_as_it_is(subject: RouterSubject) -> None:
    """Wrapping leaves the dense layer's weights as they were: the checkpoint of a dense run is what experts start
    from."""
    base = DenseFFN(subject.d_model, 32)
    before = copy.deepcopy(base.state_dict())
    subject.build(base=base)
    for name, tensor in base.state_dict().items():
        require(torch.equal(tensor, before[name]), f"wrap_ffn changes {name} of the layer it is given: copy it first")


@check("router")
def any_ffn_can_be_wrapped(subject: RouterSubject) -> None:
    """It wraps whatever has a `d_model` and maps [B, T, D] to [B, T, D]: layers of other plugins, with weights that lie
    in no `nn.Linear`, in other dtypes, or with an aux_loss of their own."""
    for what, base in (("parameters of its own", _Scaled(subject.d_model)), ("an aux_loss", _WithAux(subject.d_model))):
        layer, x_BTD = subject.layer(training=True, base=base), subject.x()
        out, aux = subject.output_and_aux(layer, x_BTD)
        require(out.shape == (2, T, subject.d_model), f"around a layer with {what} the output is {list(out.shape)}")
        require_finite(out, f"around a layer with {what}, the output", "call the layer as a module, whatever it holds")
        require(aux is not None, f"around a layer with {what} aux_loss is None: return a 0-d tensor, zero if need be")


class _Scaled(nn.Module):
    """A layer whose weights lie in no `nn.Linear`."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.scale = nn.Parameter(torch.ones(d_model))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD * self.scale


class _WithAux(_Scaled):
    """A layer with an auxiliary loss of its own."""

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x_BTD), self.scale.square().mean()
