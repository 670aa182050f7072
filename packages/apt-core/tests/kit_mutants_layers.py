"""Layers that are wrong in one thing each, in what every layer keeps to whatever it computes: built, saved, copied,
dropped out, differentiated, in other dtypes. Attention and feed-forward layers of `kit_references`, one change each."""

from __future__ import annotations

import random
from typing import Any

import torch
from kit_references import PlainAttention, PlainAttentionLayer, PlainFFN, PlainFFNLayer
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

MUTANTS: dict[str, tuple[str, type[Any], str]] = {}
"""{name: (kind, provider, the check that is aimed at it)}; what is wrong with it is its docstring."""


def mutant(aim: str) -> Any:
    """Make a layer, or a whole provider, a mutant that the check `aim` has to catch."""

    def add(cls: Any) -> Any:
        kind = "attention" if issubclass(cls, (PlainAttentionLayer, PlainAttention)) else "ffn"
        provider = cls
        if issubclass(cls, nn.Module):
            base = PlainAttention if kind == "attention" else PlainFFN
            provider = type(cls.__name__, (base,), {"Layer": cls, "__doc__": cls.__doc__})
        MUTANTS[cls.__name__] = (kind, provider, aim)
        return cls

    return add


Layer, FFNLayer = PlainAttentionLayer, PlainFFNLayer


# Forward and backward


@mutant("output_shape")
class SqueezesOnePosition(Layer):
    """A `squeeze` takes the dimension of positions away where there is one."""

    def out(self, x_BTD: Tensor) -> Tensor:
        return super().out(x_BTD.squeeze(1))


@mutant("output_shape")
class OutputAlone(Layer):
    """`forward` returns the output without the weights beside it."""

    def forward(self, *args: Any, **options: Any) -> Any:
        return super().forward(*args, **options)[0]


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 1.01


@mutant("gradcheck")
class GradientOffByAPercent(Layer):
    """An autograd function of its own returns a gradient that is one percent too large."""

    def scores(self, q_BHTd: Tensor, k_BHSd: Tensor) -> Tensor:
        return _WrongGradient.apply(super().scores(q_BHTd, k_BHSd))


@mutant("gradcheck")
class DetachedKeys(Layer):
    """Keys take part in the forward pass and not in the backward pass."""

    def scores(self, q_BHTd: Tensor, k_BHSd: Tensor) -> Tensor:
        return super().scores(q_BHTd, k_BHSd.detach())


@mutant("every_parameter_learns")
class DeadParameter(Layer):
    """A gain is registered and never used."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(self.head_dim))


@mutant("every_parameter_learns")
class FrozenByDetach(FFNLayer):
    """The first matrix is used through `.data`."""

    def forward(self, x: Tensor) -> Any:
        return F.dropout(self.down(F.gelu(F.linear(x, self.up.weight.data, self.up.bias))), self.rate, self.training)


@mutant("the_input_gets_a_gradient")
class DetachedInput(FFNLayer):
    """The input is detached."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.detach())


@mutant("the_input_gets_a_gradient")
class FirstPositionUnused(FFNLayer):
    """The first position's output is computed without a graph."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(torch.cat((x[:, :1].detach(), x[:, 1:]), 1))


@mutant("bfloat16")
class FixedDtype(Layer):
    """What is computed in float32 for the sake of precision stays in float32."""

    def softmax(self, scores_BHTS: Tensor, blocked: Tensor) -> Tensor:
        wide = torch.promote_types(scores_BHTS.dtype, torch.float32)
        return super().softmax(scores_BHTS.to(wide), blocked)


@mutant("bfloat16")
class AnglesInLowPrecision(FFNLayer):
    """A large constant is added and taken away again, which costs bfloat16 all its digits."""

    def forward(self, x: Tensor) -> Any:
        return super().forward((x + 100) - 100)


@mutant("autocast")
class WantsItsInputsDtype(FFNLayer):
    """Weights are multiplied with what autocast has made bfloat16, by a product that does not cast."""

    def forward(self, x: Tensor) -> Any:
        hidden = F.gelu(self.up(x))
        out = torch.addmv(self.down.bias[0].expand(hidden.shape[0] * hidden.shape[1]), hidden.flatten(0, 1), self.probe)
        return F.dropout(self.down(hidden) + 0 * out.view(*x.shape[:2], 1), self.rate, self.training)

    @property
    def probe(self) -> Tensor:
        return self.up.weight[:, 0]


@mutant("non_contiguous_input")
class TakesStridesForGranted(FFNLayer):
    """The input's memory is read as if it were contiguous."""

    def forward(self, x: Tensor) -> Any:
        B, T, D = x.shape
        return super().forward(x.as_strided((B, T, D), (T * D, D, 1)))


@mutant("inputs_stay_as_they_are")
class NormalisesInPlace(FFNLayer):
    """The input is scaled in place where no gradient is asked for."""

    def forward(self, x: Tensor) -> Any:
        if not torch.is_grad_enabled():
            x *= 0.5
            x *= 1.5
        return super().forward(x)


@mutant("activation_checkpointing")
class CountsItsCalls(Layer):
    """In training the temperature falls with every call, and checkpointing calls again."""

    calls = 0

    def scores(self, q_BHTd: Tensor, k_BHSd: Tensor) -> Tensor:
        self.calls += self.training
        return super().scores(q_BHTd, k_BHSd) * (1 + 0.01 * self.calls)


@mutant("compiles_as_one_graph")
class BreaksTheGraph(Layer):
    """A number is taken out of a tensor to decide on a branch."""

    def scores(self, q_BHTd: Tensor, k_BHSd: Tensor) -> Tensor:
        scores = super().scores(q_BHTd, k_BHSd)
        return scores.clamp(max=1e4) if scores.max().item() > 1e4 else scores


@mutant("calls_leave_nothing_behind")
class KeepsTheFirstMask(Layer):
    """The first mask of a length that is made is kept, and cut to fit; where it is too small, nothing is hidden."""

    kept: Tensor | None = None

    def future(self, T: int, S: int) -> Tensor:
        if self.kept is None:
            self.kept = super().future(T, S)
        mask = torch.zeros(T, S, dtype=torch.bool)
        mask[: len(self.kept), : len(self.kept)] = self.kept[:T, :S]
        return mask


@mutant("calls_leave_nothing_behind")
class TableMadeInInferenceMode(FFNLayer):
    """A table is made at the first call, which may be in inference mode, and takes part in training later."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        if self.table is None:
            self.table = torch.ones((), dtype=x.dtype)
        return super().forward(x * self.table)


# Built, saved, copied


@mutant("says_its_width")
class ForgetsItsWidth(FFNLayer):
    """`d_model` is the width of the hidden layer."""

    def __init__(self, d_model: int, d_ff: int, dropout: float) -> None:
        super().__init__(d_model, d_ff, dropout)
        self.d_model = d_ff


@mutant("state_dict_round_trip")
class UnregisteredParameter(Layer):
    """A gain is a plain tensor, which no state dict holds."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gain = torch.randn(self.head_dim)

    def scores(self, q_BHTd: Tensor, k_BHSd: Tensor) -> Tensor:
        return super().scores(q_BHTd * self.gain.to(q_BHTd), k_BHSd)


@mutant("state_dict_round_trip")
class BufferThatIsNotSaved(FFNLayer):
    """A random projection lies in a buffer that is not persistent."""

    signs: Tensor

    def __init__(self, d_model: int, d_ff: int, dropout: float) -> None:
        super().__init__(d_model, d_ff, dropout)
        self.register_buffer("signs", torch.randn(d_model), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x * self.signs)


@mutant("deepcopy_is_independent")
class ClosureOverItself(FFNLayer):
    """A closure made in the constructor reads the original's weights, in copies too."""

    def __init__(self, d_model: int, d_ff: int, dropout: float) -> None:
        super().__init__(d_model, d_ff, dropout)
        up = self.up
        self.first = lambda x: up(x)

    def forward(self, x: Tensor) -> Any:
        return F.dropout(self.down(F.gelu(self.first(x))), self.rate, self.training)


@mutant("layers_share_nothing")
class OneMatrixForAll(PlainFFN):
    """All layers of a provider share their last matrix."""

    last: nn.Linear | None = None

    def create_layer(self, d_model: int, d_ff: int, *, dropout: float = 0.0, **config: Any) -> nn.Module:
        layer = super().create_layer(d_model, d_ff, dropout=dropout)
        self.last = layer.down = self.last or layer.down  # type: ignore[assignment]
        return layer


@mutant("meta_device")
class NamesItsDevice(Layer):
    """A gain is made on the CPU, wherever the rest is made."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(self.head_dim, device="cpu"))

    def scores(self, q_BHTd: Tensor, k_BHSd: Tensor) -> Tensor:
        return super().scores(q_BHTd * self.gain.to(q_BHTd.dtype), k_BHSd)


@mutant("meta_device")
class TableInABufferOfItsOwn(FFNLayer):
    """A constant lies in a buffer that is not saved: after the meta device it has no content."""

    scale: Tensor

    def __init__(self, d_model: int, d_ff: int, dropout: float) -> None:
        super().__init__(d_model, d_ff, dropout)
        self.register_buffer("scale", torch.full((d_model,), 3.0), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x * self.scale)


@mutant("initial_weights_follow_the_seed")
class SeedsTheGenerator(Layer):
    """The constructor seeds torch's generator, so that its weights are the same each time."""

    def __init__(self, *args: Any) -> None:
        torch.manual_seed(1234)
        super().__init__(*args)


@mutant("initial_weights_follow_the_seed")
class DrawsFromElsewhere(FFNLayer):
    """The initial weights are drawn with a generator of its own, always the same."""

    def __init__(self, d_model: int, d_ff: int, dropout: float) -> None:
        super().__init__(d_model, d_ff, dropout)
        own = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                if not parameter.is_meta:
                    parameter.normal_(std=0.02, generator=own)


@mutant("global_state_is_left_alone")
class SetsTheDefaultDtype(FFNLayer):
    """The constructor sets torch's default dtype."""

    def __init__(self, d_model: int, d_ff: int, dropout: float) -> None:
        torch.set_default_dtype(torch.float64)
        super().__init__(d_model, d_ff, dropout)


@mutant("global_state_is_left_alone")
class DrawsInEvaluation(FFNLayer):
    """A random number is drawn in every forward and used in training alone."""

    def forward(self, x: Tensor) -> Any:
        noise = torch.rand(1, dtype=x.dtype)
        return super().forward(x + noise if self.training else x)


@mutant("global_state_is_left_alone")
class SetsDeterminism(FFNLayer):
    """The backward pass switches deterministic algorithms on, for everybody."""

    def forward(self, x: Tensor) -> Any:
        if x.requires_grad:
            x.register_hook(lambda grad: torch.use_deterministic_algorithms(True))  # type: ignore[no-untyped-call]
        return super().forward(x)


@mutant("evaluation_changes_nothing")
class StatisticsInEvaluation(FFNLayer):
    """A running mean of the inputs moves in evaluation too."""

    mean: Tensor

    def __init__(self, d_model: int, d_ff: int, dropout: float) -> None:
        super().__init__(d_model, d_ff, dropout)
        self.register_buffer("mean", torch.zeros(d_model))

    def forward(self, x: Tensor) -> Any:
        self.mean += 0.1 * (x.detach().mean((0, 1)) - self.mean)
        return super().forward(x)


# Random numbers


@mutant("evaluation_is_deterministic")
class DropoutInEvaluation(Layer):
    """Dropout acts in evaluation."""

    def drop(self, weights: Tensor) -> Tensor:
        return F.dropout(weights, self.dropout, True)


@mutant("training_follows_the_seed")
class DropoutFromElsewhere(Layer):
    """Dropout draws from Python's generator, which no seed of torch reaches."""

    def drop(self, weights: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return weights
        own = torch.Generator().manual_seed(random.getrandbits(30))
        return weights * (torch.rand(weights.shape, generator=own) > self.dropout) / (1 - self.dropout)


@mutant("dropout_acts")
class DropoutIgnored(Layer):
    """`dropout` is taken and ignored."""

    def drop(self, weights: Tensor) -> Tensor:
        return weights


@mutant("dropout_acts")
class DropsTheSameEachTime(FFNLayer):
    """Dropout draws with a generator that is seeded anew each time."""

    def forward(self, x: Tensor) -> Any:
        out = self.down(F.gelu(self.up(x)))
        kept = torch.rand(out.shape, generator=torch.Generator().manual_seed(0)) > self.rate
        return out * kept / (1 - self.rate) if self.training else out


@mutant("dropout_keeps_the_mean")
class DropoutWithoutScale(Layer):
    """What dropout keeps is not scaled up."""

    def drop(self, weights: Tensor) -> Tensor:
        return super().drop(weights) * (1 - self.dropout if self.training else 1)


# The provider


@mutant("names_itself")
class TwoNames(PlainFFN):
    """It is registered under another name than it gives itself."""

    def get_name(self) -> str:
        return "plain_ffn"


@mutant("names_itself")
class NumberForAVersion(PlainFFN):
    """Its version is a number."""

    def get_version(self) -> Any:
        return 1.0


@mutant("dependencies_are_requirements")
class NoRequirement(PlainFFN):
    """A dependency is a sentence."""

    def get_dependencies(self) -> list[str]:
        return ["flash-attn, at least 2.5"]


@mutant("hooks_fit")
class HookWithAnotherArgument(PlainFFN):
    """A hook wants an argument that it is not given."""

    def on_step_end(self, step: int, gradient: Any) -> None:
        pass


@mutant("config_survives_the_lock")
class SettingThatIsNotWritten(PlainFFN):
    """A setting is drawn anew each time and left out where the config is written."""

    class Config(BaseModel):
        model_config = ConfigDict(extra="forbid")
        seed: int = Field(default_factory=lambda: random.getrandbits(60), exclude=True)


@mutant("config_refuses_unknown_keys")
class SwallowsSlips(PlainFFN):
    """Keys that it does not know are passed over."""

    class Config(BaseModel):
        pass
