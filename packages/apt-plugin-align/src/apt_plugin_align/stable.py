"""The stable state: an exponential moving average of the weights, kept in the optimizer's state beside the moments.

There it is saved and resumed with them, and whoever copies a parameter's moments copies it too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from apt.modeling.layers.mode import evaluation_mode
from apt.modeling.layers.stand_in import call_with

STABLE = "stable"
"""The average is `optimizer.state[parameter]["stable"]`, fp32, shaped like the parameter."""


def decay_at(step: int, lag: float) -> float:
    """How much of the average is kept in step `step`, counted from 1: (1 - 1/step)^(1/lag - 1).

    The power-function profile of Karras et al. 2024 ("Analyzing and improving the training dynamics of diffusion
    models", eq. 126, with gamma + 1 = 1/lag - 1): the weights of `s` steps count as s^gamma, so that the average is
    `lag` of the run so far behind the weights in the mean, however long the run is.
    """
    return float((1 - 1 / step) ** (1 / lag - 1))


@torch.no_grad()
def update(optimizer: Optimizer, step: int, lag: float) -> None:
    """Move the average of every parameter that has been trained towards its weights, after step `step` (from 1).

    A parameter's average starts as the parameter itself. An empty state is left alone: AdamW takes it as its sign to
    begin.
    """
    averages: list[Tensor] = []
    weights: list[Tensor] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if state := optimizer.state.get(parameter):
                if STABLE not in state:
                    state[STABLE] = parameter.detach().float().clone()
                averages.append(state[STABLE])
                weights.append(parameter.detach().float())
    if averages:
        get_ema_multi_avg_fn(decay_at(step, lag))(averages, weights, step)


def stable_output(model: nn.Module, optimizer: Optimizer, batch: Any) -> Any:
    """What the model returns for a batch in its stable state: without a graph, in evaluation mode (no dropout).

    A parameter that was never trained has no average: its own value is used.
    """
    weights = {
        name: state[STABLE]
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        if STABLE in (state := optimizer.state.get(parameter, {}))
    }
    with evaluation_mode(model):
        return call_with(model, weights, (batch.tokens,), batch.context)
