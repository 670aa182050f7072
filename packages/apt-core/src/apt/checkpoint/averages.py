"""Averages of the weights, which a plugin keeps in the optimizer's state beside the moments: a floating-point tensor
`optimizer.state[parameter]["stable"]`, or under another name, is shaped like the parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

ADAMW = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})
"""What the optimizer keeps of its own."""


def averages(optimizer: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{name of the average: {parameter's name: tensor}} of what an optimizer's state holds.

    Args:
        optimizer: the optimizer's state_dict, its groups with `param_names`.
        weights: the model's state_dict, which says how the parameters are shaped.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for group in optimizer["param_groups"]:
        for index, parameter in zip(group["params"], group["param_names"], strict=True):
            for name, value in optimizer["state"].get(index, {}).items():
                if name not in ADAMW and _is_like(value, weights.get(parameter)):
                    found.setdefault(name, {})[parameter] = value
    return found


def _is_like(value: object, weight: Tensor | None) -> bool:
    if not isinstance(value, Tensor) or weight is None:
        return False
    return value.is_floating_point() and value.shape == weight.shape
