"""Linear maps whose weights are kept in fewer bits, and linear maps that train as if theirs were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apt_plugin_quant.schemes import Scheme, dequantized, plain_parts, with_parts


class QuantizedLinear(nn.Module):
    """An `nn.Linear` with its weight quantised.

    Its state dict holds plain tensors: `weight.qdata`, `weight.scale` and `bias`, where there is one.

    Args:
        linear: the map to quantise; it is left as it is.
        scheme: how.
    """

    def __init__(self, linear: nn.Linear, scheme: Scheme) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scheme = scheme
        self.qweight = nn.Parameter(scheme.quantize(linear.weight.detach()), requires_grad=False)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """What the weight stands for, [O, I]: for layers that do more with it than multiply."""
        return dequantized(self.qweight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return F.linear(x, self.qweight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, part in plain_parts(self.qweight, self.scheme).items():
            destination[f"{prefix}weight.{name}"] = part
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        expected = plain_parts(self.qweight, self.scheme)
        if self.bias is not None:
            expected["bias"] = self.bias
        keys = {name: f"{prefix}{name}" if name == "bias" else f"{prefix}weight.{name}" for name in expected}
        found = {name: state_dict[key] for name, key in keys.items() if key in state_dict}
        if strict:
            missing_keys += [key for name, key in keys.items() if name not in found]
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in keys.values()]
        for name, tensor in found.items():
            own = expected[name]
            if (tensor.shape, tensor.dtype) != (own.shape, own.dtype):
                error_msgs.append(
                    f"{keys[name]} is {tensor.dtype} {list(tensor.shape)}, not {own.dtype} {list(own.shape)}"
                )
                return
        if found.keys() >= {"qdata", "scale"}:
            self.qweight = nn.Parameter(with_parts(self.qweight, found, self.scheme), requires_grad=False)
        if "bias" in found and self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(found["bias"])


class FakeQuantizedLinear(nn.Linear):
    """An `nn.Linear` that, while it is `active`, computes what it would compute quantised.

    The gradient goes straight through the rounding, as if there were none (Bengio et al., "Estimating or propagating
    gradients through stochastic neurons", 2013; Jacob et al., "Quantization and training of neural networks", 2018).
    Parameters and state dict are those of the map it is made of.

    Args:
        linear: whose parameters it shares.
        scheme: what to train for.
    """

    def __init__(self, linear: nn.Linear, scheme: Scheme) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scheme = scheme
        self.active = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        if not self.active:
            return super().forward(x)
        with torch.no_grad():
            weight_OI = dequantized(self.scheme.quantize(self.weight.detach()))
            seen = self.scheme.rounded_inputs(x.detach())
        return F.linear(straight_through(x, seen), straight_through(self.weight, weight_OI), self.bias)


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The value of `rounded`, to within the last bit, with the gradient of `x`."""
    return x if rounded is x else x + (rounded - x).detach()


__all__ = ["FakeQuantizedLinear", "QuantizedLinear", "straight_through"]
