"""Feed-forward layers, routers, alignments and quantisers that are wrong in one thing each: those of `kit_references`,
one change each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from kit_references import (
    PlainAlign,
    PlainFFN,
    PlainFFNLayer,
    PlainMoE,
    PlainQuant,
    PlainQuantLinear,
    PlainRouter,
)
from torch import Tensor, nn
from torch.nn import functional as F

MUTANTS: dict[str, tuple[str, type[Any], str]] = {}
"""{name: (kind, provider, the check that is aimed at it)}; what is wrong with it is its docstring."""

PARTS: dict[type[Any], tuple[str, type[Any], str]] = {
    PlainFFNLayer: ("ffn", PlainFFN, "Layer"),
    PlainMoE: ("router", PlainRouter, "Layer"),
    PlainQuantLinear: ("quant", PlainQuant, "Linear"),
}
PROVIDERS: dict[type[Any], str] = {PlainRouter: "router", PlainAlign: "align", PlainQuant: "quant"}


def mutant(aim: str) -> Any:
    """Make a part, or a whole provider, a mutant that the check `aim` has to catch."""

    def add(cls: Any) -> Any:
        for part, (kind, base, attribute) in PARTS.items():
            if issubclass(cls, part):
                provider = type(cls.__name__, (base,), {attribute: cls, "__doc__": cls.__doc__})
                MUTANTS[cls.__name__] = (kind, provider, aim)
                return cls
        kind = next(kind for base, kind in PROVIDERS.items() if issubclass(cls, base))
        MUTANTS[cls.__name__] = (kind, cls, aim)
        return cls

    return add


# FFN


@mutant("positions_are_independent")
class NormOverPositions(PlainFFNLayer):
    """The mean over the positions is taken away from each."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x - x.mean(1, keepdim=True) / 4)


@mutant("d_ff_is_used")
class WidthOfItsOwn(PlainFFNLayer):
    """The hidden layer is four times as wide as the model, whatever d_ff says."""

    def __init__(self, d_model: int, d_ff: int, dropout: float) -> None:
        super().__init__(d_model, 4 * d_model, dropout)


# Router


@mutant("tokens_are_independent_in_evaluation")
class ExpertsChoose(PlainMoE):
    """Each expert chooses its best tokens of the row, later ones included."""

    def choose(self, probs_BTE: Tensor) -> Tensor:
        best = probs_BTE.topk(max(1, probs_BTE.shape[1] // 2), 1).indices
        return torch.zeros_like(probs_BTE).scatter(1, best, 1.0).index_fill(-1, torch.tensor([0]), 1.0)


@mutant("batch_independence")
class CapacityOfTheBatch(PlainMoE):
    """An expert takes only so many tokens of the batch, the first ones, in evaluation too."""

    def choose(self, probs_BTE: Tensor) -> Tensor:
        chosen = super().choose(probs_BTE)
        place = chosen.flatten(0, 1).cumsum(0).view_as(chosen)
        kept = chosen * (place <= 4)
        return torch.where(kept.sum(-1, keepdim=True) > 0, kept, chosen)


@mutant("the_router_learns")
class HardChoice(PlainMoE):
    """The chosen experts count alike, so the router gets no gradient from the output."""

    def gates(self, chosen_BTE: Tensor) -> Tensor:
        chosen = (chosen_BTE > 0).to(chosen_BTE.dtype)
        return chosen / chosen.sum(-1, keepdim=True)


@mutant("aux_loss_has_the_scale_of_a_mean")
class SumOfTheLoad(PlainMoE):
    """The balancing loss is a sum over tokens."""

    def aux(self, probs_BTE: Tensor, chosen_BTE: Tensor) -> Tensor:
        return super().aux(probs_BTE, chosen_BTE) * probs_BTE.shape[0] * probs_BTE.shape[1]


@mutant("aux_loss_is_repeatable")
class LoadThatDrifts(PlainMoE):
    """The load that the balancing loss is made of adds up over steps and is never cleared."""

    load: Any = 0.0

    def aux(self, probs_BTE: Tensor, chosen_BTE: Tensor) -> Tensor:
        if self.training:
            self.load = 0.9 * self.load + chosen_BTE.detach().mean((0, 1))
        return 0.01 * self.EXPERTS * (self.load * probs_BTE.mean((0, 1))).sum()


@mutant("aux_loss_is_repeatable")
class BiasThatMovesInForward(PlainMoE):
    """The bias that balances the choice moves in every forward of training, and not once a step."""

    bias: Any = 0.0

    def choose(self, probs_BTE: Tensor) -> Tensor:
        chosen = super().choose(probs_BTE + self.bias)
        if self.training:
            self.bias = self.bias + 0.3 * (chosen.mean() - chosen.mean((0, 1)))
        return chosen


@mutant("the_dense_layer_stays_as_it_is")
class ScalesTheDenseLayer(PlainRouter):
    """The dense layer's weights are divided among the experts in place."""

    def wrap_ffn(self, base_ffn: nn.Module, config: Mapping[str, Any]) -> nn.Module:
        with torch.no_grad():
            for parameter in base_ffn.parameters():
                parameter.mul_(0.5)
        return super().wrap_ffn(base_ffn, config)


@mutant("any_ffn_can_be_wrapped")
class LinearMapsAlone(PlainMoE):
    """Only layers with the names of core's own can be wrapped."""

    def copy_of(self, base: nn.Module) -> nn.Module:
        assert isinstance(base.up, nn.Linear)
        return super().copy_of(base)


@mutant("output_shape")
class LossPerToken(PlainMoE):
    """aux_loss is one number per token."""

    def aux(self, probs_BTE: Tensor, chosen_BTE: Tensor) -> Tensor:
        return 0.01 * (probs_BTE * chosen_BTE).sum(-1)


# Align


@mutant("the_loss_is_a_finite_number")
class LossOfEachPosition(PlainAlign):
    """The loss is one number per position."""

    def mean(self, kl_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return kl_BT * mask_BT


@mutant("the_model_learns_from_it")
class LossWithoutAGraph(PlainAlign):
    """The predictions are detached."""

    def log_probs(self, logits: Tensor) -> Tensor:
        return super().log_probs(logits).detach()


@mutant("the_gradient_is_that_of_the_loss")
class HalfDetached(PlainAlign):
    """The normaliser of the predictions is detached."""

    def log_probs(self, logits: Tensor) -> Tensor:
        return logits.float() - logits.float().logsumexp(-1, keepdim=True).detach()


@mutant("positions_without_a_target_take_no_part")
class TrainsOnPadding(PlainAlign):
    """Positions without a target count as the others."""

    def mask(self, targets: Tensor) -> Tensor:
        return torch.ones_like(targets, dtype=torch.bool)


@mutant("a_batch_without_targets_is_finite")
class MeanOverNothing(PlainAlign):
    """The mean divides by the number of targets, though it be 0."""

    def mean(self, kl_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return (kl_BT * mask_BT).sum() / mask_BT.sum()


@mutant("missing_states_do_no_harm")
class WantsItsState(PlainAlign):
    """The stable state is taken to be there."""

    def compute_align_loss(self, logits: Tensor, targets: Tensor, model_state: Mapping[str, Any]) -> Tensor:
        assert model_state["stable"] is not None
        return super().compute_align_loss(logits, targets, model_state)


@mutant("the_loss_has_the_scale_of_a_mean")
class SumOverTokens(PlainAlign):
    """The loss is a sum over tokens."""

    def mean(self, kl_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return (kl_BT * mask_BT).sum()


@mutant("extreme_predictions_are_finite")
class LogOfASoftmax(PlainAlign):
    """Probabilities are computed first and their logarithm then."""

    def log_probs(self, logits: Tensor) -> Tensor:
        return (logits.float().exp() / logits.float().exp().sum(-1, keepdim=True)).log()


@mutant("low_precision_is_enough")
class StaysInBfloat16(PlainAlign):
    """The loss is computed in the dtype of the predictions, by a difference of large numbers."""

    def log_probs(self, logits: Tensor) -> Tensor:
        return ((logits + 200).log_softmax(-1) if logits.dtype == torch.bfloat16 else logits.log_softmax(-1)).float()


@mutant("the_loss_is_deterministic")
class WarmsUpByCalls(PlainAlign):
    """The loss grows with every call."""

    calls = 0

    def mean(self, kl_BT: Tensor, mask_BT: Tensor) -> Tensor:
        self.calls += 1
        return super().mean(kl_BT, mask_BT) * min(1.0, 0.99 + self.calls / 1000)


@mutant("the_loss_is_what_a_run_adds")
class NoHook(PlainAlign):
    """The hook by which the loss joins a run is taken away."""

    extra_losses: Any = None


# Quant


@mutant("the_output_stays_near")
class WrapsAround(PlainQuantLinear):
    """The scale is too small by half, and what does not fit wraps around."""

    def scale_of(self, weight_OI: Tensor) -> Tensor:
        return super().scale_of(weight_OI) / 2

    def rounded(self, ratio_OI: Tensor) -> Tensor:
        return ratio_OI.round().to(torch.int32).to(torch.int8)


@mutant("the_output_stays_near")
class ScaleOfAnotherRange(PlainQuantLinear):
    """Weights are rounded to 127 steps and read as if there were 64."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.q.to(x.dtype) * self.scale * (127 / 64), self.bias)


@mutant("it_takes_fewer_bytes")
class KeepsTheWeights(PlainQuantLinear):
    """The weights are kept beside the integers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.weight = linear.weight


@mutant("any_scale_of_weights_is_met")
class OneScaleForAll(PlainQuantLinear):
    """One scale serves all rows."""

    def scale_of(self, weight_OI: Tensor) -> Tensor:
        return super().scale_of(weight_OI).amax().expand(len(weight_OI), 1).clone()


@mutant("rows_of_zeros_are_finite")
class DividesByZero(PlainQuantLinear):
    """The scale of a row of zeros is zero."""

    def scale_of(self, weight_OI: Tensor) -> Tensor:
        return weight_OI.abs().amax(1, keepdim=True) / 127

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 / self.scale.mT


@mutant("the_state_dict_says_it_all")
class ScaleThatIsNotSaved(PlainQuantLinear):
    """The scale is a plain tensor, which no state dict holds."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        scale = self.scale
        del self.scale
        self.scale = scale


@mutant("what_is_left_is_left_alone")
class RoundsTheEmbedding(PlainQuant):
    """The embedding is rounded to bfloat16 and back."""

    def quantize(self, model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    module.weight.copy_(module.weight.bfloat16())
        return super().quantize(model)


@mutant("evaluation_repeats")
class ScaleOfTheBatch(PlainQuantLinear):
    """Inputs are rounded too, with one scale for the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax() / 15
        return super().forward((x / scale).round() * scale)


@mutant("one_token_is_enough")
class WantsARow(PlainQuantLinear):
    """A single token is rounded, for which a longer row has no need."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.shape[1] > 1 else (4 * x).round() / 4)


@mutant("odd_sizes_are_met_or_refused")
class GroupsOfThirtyTwo(PlainQuantLinear):
    """Rows are cut into groups of 32, and what is left over is lost."""

    def rounded(self, ratio_OI: Tensor) -> Tensor:
        q_OI = super().rounded(ratio_OI)
        q_OI[:, ratio_OI.shape[1] // 32 * 32 :] = 0
        return q_OI


@mutant("preparing_keeps_the_state_dict")
class PreparesByQuantising(PlainQuant):
    """Preparing for training quantises at once."""

    def prepare(self, model: nn.Module) -> None:
        self.quantize(model)
