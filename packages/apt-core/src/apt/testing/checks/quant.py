"""Quant: a model in fewer bits that is still the model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from apt.checkpoint.rng import torch_rng_kept
from apt.core.errors import ConfigError, ProviderError
from apt.testing.check import check
from apt.testing.compare import relative_error, require, require_equal, require_finite
from apt.testing.subjects import Subject, skip

NEAR = 0.25
"""Relative error of an output, in norm, that a scheme may have; four bits have about 0.1 here."""


class TinyModel(nn.Module):
    """An embedding, two blocks of linear maps with and without bias between norms, and a projection."""

    def __init__(self, seed: int = 0, d: int = 64, vocab: int = 50) -> None:
        super().__init__()
        with torch_rng_kept():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocab, d)
            self.blocks = nn.ModuleList([_Block(d), _Block(d)])
            self.norm = nn.LayerNorm(d)
            self.head = nn.Linear(d, vocab, bias=False)
        self.eval()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = x_BTD + block(x_BTD)
        logits_BTV: Tensor = self.head(self.norm(x_BTD))
        return logits_BTV


class OneMap(nn.Module):
    """A single linear map."""

    def __init__(self) -> None:
        super().__init__()
        with torch_rng_kept():
            torch.manual_seed(0)
            self.up = nn.Linear(64, 96, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        out_NE: Tensor = self.up(x_ND)
        return out_NE


class _Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.down(nn.functional.gelu(self.up(self.norm(x_BTD))))
        return out_BTD


def tokens() -> Tensor:
    """int64 [3, 11]."""
    return torch.randint(50, (3, 11), generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, given: Tensor | None = None) -> Tensor:
    """The model's output, without a graph."""
    with torch.no_grad():
        out: Tensor = model(tokens() if given is None else given)
    return out


def quantized(subject: Subject, model: nn.Module) -> Any:
    """The model quantised by a fresh provider; the one that is given is left as it is."""
    result = subject.provider().quantize(copy.deepcopy(model))
    require(isinstance(result, nn.Module), f"quantize returns {type(result).__name__}, not a module")
    return result.eval()


def size(model: nn.Module) -> int:
    """Bytes of the state dict."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


@check("quant")
def the_output_stays_near(subject: Subject) -> None:
    """The quantised model gives nearly what the model gives: a scale applied twice, or along the wrong dimension, gives
    something else altogether."""
    model = TinyModel()
    out = run(quantized(subject, model))
    require_finite(out, "the quantised model's output", "look at the scales")
    error = relative_error(out, run(model))
    require(
        error < NEAR, f"the output is off by {error:.0%} in norm, {NEAR:.0%} are allowed: look at scale and rounding"
    )


@check("quant")
def it_takes_fewer_bytes(subject: Subject) -> None:
    """The state dict is smaller: a scheme that keeps what it has quantised in full costs quality and saves nothing."""
    model = TinyModel()
    before, after = size(model), size(quantized(subject, model))
    require(
        after < 0.7 * before, f"the state dict takes {after:,} bytes, and {before:,} before: keep the integers alone"
    )


@check("quant")
def any_scale_of_weights_is_met(subject: Subject) -> None:
    """Rows a thousand times as large or as small as their neighbours cost no more precision: the scale comes from the
    row, or a part of it. Trained models have such rows."""
    x_ND = torch.randn(20, 64, generator=torch.Generator().manual_seed(2))
    for factor in (1e-3, 1e3):
        model = OneMap()
        with torch.no_grad():
            model.up.weight[::2] *= factor
            expected, actual = model(x_ND), quantized(subject, model)(x_ND)
        for what, rows in (("these rows", slice(0, None, 2)), ("the others", slice(1, None, 2))):
            error = relative_error(actual[:, rows], expected[:, rows])
            require(
                error < NEAR,
                f"with every other row {factor:g} times as large, the outputs of {what} are off by {error:.0%}: take "
                "a scale for each row or group",
            )


@check("quant")
def rows_of_zeros_are_finite(subject: Subject) -> None:
    """A row of zeros, whose scale would be zero, stays a row of zeros and not of NaN: pruned and freshly made layers
    have some."""
    model = TinyModel()
    with torch.no_grad():
        for block in model.blocks:
            weight: Any = block.up.weight  # type: ignore[union-attr]
            weight[:3] = 0
    out = run(quantized(subject, model))
    require_finite(out, "with rows of zeros, the output", "a scale of zero divides by zero: clamp it from below")
    error = relative_error(out, run(model))
    require(error < NEAR, f"with rows of zeros the output is off by {error:.0%}")


@check("quant")
def the_state_dict_says_it_all(subject: Subject) -> None:
    """Its state dict, through safetensors and loaded strictly into a model of other weights that was quantised, makes
    that one the same: a quantised run is opened so."""
    saved, other = quantized(subject, TinyModel(0)), quantized(subject, TinyModel(1))
    state = saved.state_dict()
    strays = [name for name, value in state.items() if type(value) not in (Tensor, nn.Parameter)]
    require(not strays, f"the state dict holds what is no plain tensor: {strays[:4]}; take tensor subclasses apart")
    other.load_state_dict(load_safetensors(save_safetensors({k: v.contiguous() for k, v in state.items()})))
    require_equal(
        run(other),
        run(saved),
        "the output of a quantised model that has loaded the state dict, beside the one that saved it",
        "scales and offsets belong into buffers, and must be computed from no weights but those that are loaded",
        tolerance=1e-6,
    )


@check("quant")
def what_is_left_is_left_alone(subject: Subject) -> None:
    """What keeps its name and dtype in the state dict keeps its content: norms and biases are as they were trained."""
    model = TinyModel()
    state = quantized(subject, model).state_dict()
    for name, tensor in model.state_dict().items():
        now = state.get(name)
        if now is not None and now.dtype == tensor.dtype and now.shape == tensor.shape:
            require(torch.equal(now, tensor), f"{name} keeps its name and dtype and has another content")


@check("quant")
def evaluation_repeats(subject: Subject) -> None:
    """The quantised model gives the same output each time, and a row what it gives alone: scales taken from a batch
    would make an answer depend on its neighbours."""
    model = quantized(subject, TinyModel())
    first = run(model)
    require(torch.equal(run(model), first), "the same tokens give another output: round, and draw nothing")
    for row in range(3):
        alone = run(model, tokens()[row : row + 1])
        error = relative_error(first[row : row + 1], alone)
        require(error < 1e-3, f"row {row} differs by {error:.1%} in a batch and alone: one scale for each token")


@check("quant")
def one_token_is_enough(subject: Subject) -> None:
    """A single token is computed as in a longer row: kernels for products of matrices have smallest sizes, and
    generation asks for one row."""
    model = quantized(subject, TinyModel())
    whole, one = run(model, tokens()[:1]), run(model, tokens()[:1, :1])
    require(one.shape == (1, 1, 50), f"one token gives {list(one.shape)}, not [1, 1, 50]")
    error = relative_error(one, whole[:, :1])
    require(error < 1e-3, f"one token alone differs by {error:.1%} from the same in a row of 11")


@check("quant", may_refuse=True)
def odd_sizes_are_met_or_refused(subject: Subject) -> None:
    """Widths that no group size divides work, or are refused with a ConfigError that says what fits: anything else
    ends in a shape error deep in a kernel."""
    model = TinyModel(d=46, vocab=50)
    error = relative_error(run(quantized(subject, model)), run(model))
    require(error < NEAR, f"with a width of 46 the output is off by {error:.0%}")


@check("quant")
def preparing_keeps_the_state_dict(subject: Subject) -> None:
    """A model prepared for training has the same state dict, computes a gradient for every parameter, and is no other
    model after it is loaded again: such a run is opened without the scheme."""
    provider = subject.provider()
    prepare: Any = getattr(provider, "prepare", None)
    if prepare is None:
        skip("it does not train for its scheme: it has no prepare")
    model = TinyModel()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        prepare(model)
    except (ProviderError, ConfigError) as error:
        skip(f"it does not train for its scheme: {error.message}")
    after = model.state_dict()
    require(list(after) == list(before), f"prepare changes the names in the state dict: {set(after) ^ set(before)}")
    for name, tensor in before.items():
        require(torch.equal(after[name], tensor), f"prepare changes the content of {name}")
    model.train()(tokens()).square().mean().backward()
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    require(not silent, f"prepared for training, {silent[:3]} get no gradient: let it pass straight through rounding")
