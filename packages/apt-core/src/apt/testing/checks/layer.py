"""What layers keep to in forward and backward, whatever they compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apt.testing.check import check
from apt.testing.compare import relative_error, require, require_change, require_equal, require_finite
from apt.testing.subjects import LayerSubject, probe, skip

LAYERS = ("attention", "ffn", "router")


@check(*LAYERS)
def output_shape(subject: LayerSubject) -> None:
    """The output is [B, T, D] in the input's dtype for one position, for two and for odd numbers: lengths of one are
    what generation asks for, and where a `squeeze` or a wrong stride shows first."""
    layer = subject.layer()
    for batch, length in ((2, 1), (1, 2), (2, 7), (3, 5)):
        x_BTD = subject.x(batch=batch, length=length)
        out, aux = subject.output_and_aux(layer, x_BTD)
        require(
            out.shape == x_BTD.shape,
            f"an input {list(x_BTD.shape)} gives {list(out.shape)}, not the same shape: look at its reshapes",
        )
        require(out.dtype == x_BTD.dtype, f"an input of {x_BTD.dtype} gives {out.dtype}: look for a fixed dtype")
        require_finite(out, f"the output for {length} positions", "look for divisions and logarithms")
        if aux is not None:
            require(aux.dim() == 0, f"aux_loss has the shape {list(aux.shape)}, and must be 0-d: take its mean")
            require_finite(aux, "aux_loss", "look for divisions and logarithms")


@check(*LAYERS)
def batch_independence(subject: LayerSubject) -> None:
    """In evaluation a row's output depends on that row alone: what a model says must not depend on what else is in the
    batch, and one user's text must not reach another's."""
    layer, x_BTD = subject.layer(), subject.x(batch=3)
    together = subject.forward(layer, x_BTD)
    for row in range(3):
        alone = subject.forward(layer, x_BTD[row : row + 1])
        require_equal(
            together[row : row + 1],
            alone,
            f"row {row} of a batch of 3, beside the same row alone",
            "look for a sum, mean or softmax over the batch dimension, and for reshapes that mix it with another",
        )


@check(*LAYERS)
def gradcheck(subject: LayerSubject) -> None:
    """The gradients by `backward` of the input and of every parameter are those by finite differences, in float64: a
    wrong one trains, only worse, and nobody sees why."""
    if subject.dtype != torch.float64:
        skip(f"computed in {subject.dtype} on {subject.device}")
    layer, x_BTD = subject.layer(), subject.x(length=4, grad=True)
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    values = [layer.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        of_layer = {f"layer.{name}": value for name, value in given.items()}
        loss: Tensor = torch.func.functional_call(_Loss(subject, layer), of_layer, (x,))
        return loss

    loss = function(x_BTD, *values)
    grads = torch.autograd.grad(loss, [x_BTD, *values], allow_unused=True)
    for name, value, grad in zip(["the input", *names], [x_BTD, *values], grads, strict=True):
        direction = probe(value)
        epsilon = 1e-6
        with torch.no_grad():
            shifted = []
            for sign in (1, -1):
                moved = [v + sign * epsilon * direction if v is value else v for v in (x_BTD, *values)]
                shifted.append(function(*moved))
        numeric = (shifted[0] - shifted[1]) / (2 * epsilon)
        analytic = torch.zeros_like(numeric) if grad is None else (grad * direction).sum()
        require_equal(
            analytic,
            numeric,
            f"the derivative along a random direction of {name}, by backward beside finite differences",
            "look for detach, .data, torch.no_grad, in-place changes, rounding, and at autograd functions of your own",
            tolerance=1e-6 * max(1.0, float(numeric.abs())),
        )


@check("attention", "ffn")
def every_parameter_learns(subject: LayerSubject) -> None:
    """Every parameter that wants a gradient gets one that is not zero: one that gets none is dead weight, and stops
    distributed training."""
    layer = subject.layer(training=True)
    subject.loss(layer, subject.x()).backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            require(
                grad is not None and bool(grad.any()),
                f"the parameter {name} {list(parameter.shape)} gets {'no' if grad is None else 'a zero'} gradient: use "
                "it, or set requires_grad to False",
            )
            assert grad is not None
            require_finite(grad, f"the gradient of {name}", "look for square roots and norms at zero")


@check(*LAYERS)
def the_input_gets_a_gradient(subject: LayerSubject) -> None:
    """The output's gradient reaches the input, at every position: through a layer that detaches it nothing below
    learns."""
    layer, x_BTD = subject.layer(training=True), subject.x(grad=True)
    subject.loss(layer, x_BTD).backward()
    grad = x_BTD.grad
    require(grad is not None, "the input gets no gradient: look for detach, .data and torch.no_grad")
    assert grad is not None
    require_finite(grad, "the gradient of the input", "look for divisions and square roots at zero")
    silent = (~grad.any(-1)).nonzero().tolist()
    require(not silent, f"the input gets a zero gradient at (row, position) {silent[:3]}: it is not used there")


@check(*LAYERS)
def bfloat16(subject: LayerSubject) -> None:
    """In bfloat16 forward and backward work, stay in bfloat16, and come near the exact result: large models are
    trained and served so."""
    layer, x_BTD = subject.layer(), subject.x()
    exact = subject.forward(layer, x_BTD).detach()
    coarse, x_coarse = subject.layer(dtype=torch.bfloat16), subject.x(dtype=torch.bfloat16, grad=True)
    out = subject.forward(coarse, x_coarse)
    require(out.dtype == torch.bfloat16, f"an input of bfloat16 gives {out.dtype}: look for a fixed dtype")
    error = relative_error(out, exact)
    if subject.kind != "router":  # rounding may send a token to another expert
        require(error < 0.1, f"in bfloat16 the output is off by {error:.0%} in norm; 10% are allowed: sum in float32")
    subject.loss(coarse, x_coarse).backward()
    for name, parameter in [("the input", x_coarse), *coarse.named_parameters()]:
        if parameter.grad is not None:
            require_finite(parameter.grad, f"in bfloat16, the gradient of {name}", "look for overflow and underflow")


@check(*LAYERS)
def autocast(subject: LayerSubject) -> None:
    """Under autocast to bfloat16, with weights in float32, forward and backward work and the gradients are finite: so
    `training.mixed_precision: bf16` trains."""
    layer, x_BTD = subject.layer(dtype=torch.float32, training=True), subject.x(dtype=torch.float32, grad=True)
    exact = subject.forward(layer.eval(), x_BTD).detach()
    with torch.autocast(subject.device.type, torch.bfloat16):
        out = subject.forward(layer, x_BTD)
        loss = subject.loss(layer.train(), x_BTD)
    error = relative_error(out, exact)
    if subject.kind != "router":
        require(error < 0.1, f"under autocast the output is off by {error:.0%} in norm; 10% are allowed")
    loss.backward()
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            require_finite(parameter.grad, f"under autocast, the gradient of {name}", "look for a fixed dtype")


@check(*LAYERS)
def non_contiguous_input(subject: LayerSubject) -> None:
    """An input with other strides gives the same output: callers slice and transpose, and a `view` or a raw pointer
    that takes the strides for granted reads other numbers."""
    layer, x_BTD = subject.layer(), subject.x()
    strided = x_BTD.transpose(0, 1).contiguous().transpose(0, 1)
    require_equal(
        subject.forward(layer, strided),
        subject.forward(layer, x_BTD),
        "the output for a transposed view, beside that for a contiguous tensor",
        "use reshape in place of view, and no as_strided or data_ptr",
    )


@check(*LAYERS)
def inputs_stay_as_they_are(subject: LayerSubject) -> None:
    """The input is not written to: the residual stream is read again after the layer."""
    layer, x_BTD = subject.layer(), subject.x()
    before = x_BTD.clone()
    with torch.no_grad():
        subject.forward(layer, x_BTD)
    require(torch.equal(x_BTD, before), "forward changes its input in place: look for +=, mul_, masked_fill_ and copy_")


@check(*LAYERS)
def activation_checkpointing(subject: LayerSubject) -> None:
    """Computed again in the backward pass, as activation checkpointing does, the layer gives the same gradients: what
    it remembers from one forward to the next must not change what it computes."""
    from torch.utils.checkpoint import checkpoint

    def gradients(again: bool) -> dict[str, Tensor]:
        layer, x_BTD = subject.layer(training=True), subject.x(grad=True)
        torch.manual_seed(5)
        if again:
            loss: Tensor = checkpoint(subject.loss, layer, x_BTD, use_reentrant=False)
        else:
            loss = subject.loss(layer, x_BTD)
        loss.backward()
        found = {"the input": x_BTD.grad, **{name: p.grad for name, p in layer.named_parameters()}}
        return {name: grad for name, grad in found.items() if grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    for name, grad in plain.items():
        require(name in recomputed, f"with activation checkpointing {name} gets no gradient")
        require_equal(
            recomputed[name],
            grad,
            f"the gradient of {name} with activation checkpointing, beside that without",
            "look for counters, caches and random numbers from elsewhere than torch's generator",
        )


@check("attention", "ffn", slow=True)
def compiles_as_one_graph(subject: LayerSubject) -> None:
    """`torch.compile(fullgraph=True)` takes forward and backward and gives the same numbers: a break in the graph costs
    most of what compiling gains."""
    layer, x_BTD = subject.layer(dtype=torch.float32), subject.x(dtype=torch.float32, grad=True)
    expected = subject.forward(layer, x_BTD)
    (grad,) = torch.autograd.grad((expected * probe(expected)).sum(), x_BTD)
    torch.compiler.reset()
    try:
        compiled = torch.compile(_Forward(subject, layer), fullgraph=True)
        out = compiled(x_BTD)
        (compiled_grad,) = torch.autograd.grad((out * probe(out)).sum(), x_BTD)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        require(
            False,
            f"torch.compile(fullgraph=True) fails: {type(error).__name__}: {' '.join(lines)[:300]}; look for .item(), "
            "print, data-dependent branches and Python side effects in forward",
        )
    finally:
        torch.compiler.reset()
    advice = "look for what the compiler cannot see: attributes changed in forward, numbers taken out of tensors"
    require_equal(out, expected, "the compiled layer's output, beside that of the layer", advice)
    require_equal(compiled_grad, grad, "the compiled layer's gradient of the input", advice)


@check(*LAYERS)
def calls_leave_nothing_behind(subject: LayerSubject) -> None:
    """In evaluation a call's output does not depend on the calls before it, longer, shorter or in inference mode: a
    table or mask kept from the first length is wrong at the next."""
    x_BTD, long = subject.x(), subject.x(seed=2, length=19)
    fresh = {7: subject.forward(subject.layer(), x_BTD), 19: subject.forward(subject.layer(), long)}
    layer = subject.layer()
    advice = "look for masks, tables and statistics that forward keeps"
    with torch.inference_mode():
        subject.forward(layer, x_BTD[:, :3])
    for given in (x_BTD, long, x_BTD):
        out = subject.forward(layer, given)
        require_equal(out, fresh[given.shape[1]], f"{given.shape[1]} positions after calls at other lengths", advice)
    x_grad = subject.x(grad=True)
    subject.loss(layer, x_grad).backward()
    require(x_grad.grad is not None, f"after a call in inference mode nothing gets a gradient; {advice}")


@check(*LAYERS)
def the_output_depends_on_the_input(subject: LayerSubject) -> None:
    """Another input at a position gives another output there, at every position: a layer that ignores some computes
    nothing for them."""
    layer, x_BTD = subject.layer(), subject.x()
    before = subject.forward(layer, x_BTD)
    for position in range(x_BTD.shape[1]):
        after = subject.forward(layer, subject.perturbed(x_BTD, slice(None), position))
        require_change(
            after[:, position],
            before[:, position],
            f"with another input at position {position}, the output there",
            "look for masks that take a position's own key away, and for slices that end one too early",
        )


class _Loss(nn.Module):
    """`LayerSubject.loss` as a module, for functional calls."""

    def __init__(self, subject: LayerSubject, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._subject = subject

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self._subject.loss(self.layer, x_BTD)


class _Forward(nn.Module):
    """The layer's call alone, as a model would make it."""

    def __init__(self, subject: LayerSubject, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._is_attention = subject.kind == "attention"

    def forward(self, x_BTD: Tensor) -> Tensor:
        result = self.layer(x_BTD, x_BTD, x_BTD) if self._is_attention else self.layer(x_BTD)
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out
