"""What layers keep to in drawing random numbers: none in evaluation, torch's in training."""

from __future__ import annotations

from typing import Any

import torch

from apt.testing.check import check
from apt.testing.compare import require, require_equal
from apt.testing.subjects import LayerSubject

RATE = 0.5
MANY = 1024


@check("attention", "ffn", "router")
def evaluation_is_deterministic(subject: LayerSubject) -> None:
    """In evaluation the output is the same, bit for bit, whatever the seed: without that no answer can be reproduced,
    and decoding with a cache differs from decoding without."""
    options: dict[str, Any] = {} if subject.kind == "router" else {"dropout": RATE}
    layer, x_BTD = subject.layer(**options), subject.x()
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outputs.append(subject.forward(layer, x_BTD))
    difference = float((outputs[0] - outputs[1]).detach().abs().max())
    require(
        torch.equal(*outputs),
        f"two calls in evaluation differ by {difference:.3g}: hand self.training to dropout, and draw no noise there",
    )


@check("attention", "ffn", "router")
def training_follows_the_seed(subject: LayerSubject) -> None:
    """In training the same seed gives the same output and loss, call after call: a run is repeatable, and a resumed one
    goes on bit for bit, only if every random number comes from torch's generator and nothing else moves."""
    options: dict[str, Any] = {} if subject.kind == "router" else {"dropout": RATE}
    layer, x_BTD = subject.layer(training=True, **options), subject.x()
    first: tuple[torch.Tensor, torch.Tensor | None] | None = None
    for _ in range(4):
        torch.manual_seed(11)
        out, aux = subject.output_and_aux(layer, x_BTD)
        if first is None:
            first = out, aux
        advice = "draw from torch's generator alone, and let no counter or running statistic into what is computed"
        require_equal(out, first[0], "the output of a later call in training under the same seed", advice, 0.0)
        if aux is not None and first[1] is not None:
            require_equal(aux, first[1], "aux_loss of a later call in training under the same seed", advice, 0.0)


@check("attention", "ffn")
def dropout_acts(subject: LayerSubject) -> None:
    """With `dropout=0.5` training differs from evaluation, and from itself under another seed: an option that is taken
    and ignored leaves a user with a model other than the one asked for."""
    layer, x_BTD = subject.layer(training=True, dropout=RATE), subject.x()
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        outputs.append(subject.forward(layer, x_BTD))
    still = subject.forward(layer.eval(), x_BTD)
    require(not torch.equal(outputs[0], still), "dropout=0.5 drops nothing in training: hand it to the layer")
    require(not torch.equal(*outputs), "dropout=0.5 drops the same under another seed: draw with torch's generator")


@check("attention", "ffn")
def dropout_keeps_the_mean(subject: LayerSubject) -> None:
    """On average over many draws the output under dropout is that without: what is kept is scaled by 1 / (1 - p), else
    evaluation sees other magnitudes than training."""
    layer = subject.layer(training=True, dropout=RATE)
    x_1TD = subject.x(batch=1)
    mean_TD = subject.forward(layer, x_1TD.expand(MANY, -1, -1)).mean(0)
    still_TD = subject.forward(layer.eval(), x_1TD)[0]
    # Compared along the exact output, where the noise of the draws averages out.
    share = float((mean_TD * still_TD).sum().detach() / still_TD.square().sum().detach())
    require(
        abs(share - 1) < 0.15,
        f"the mean of {MANY} draws is {share:.2f} times the output without dropout: scale by 1 / (1 - p), as F.dropout",
    )
