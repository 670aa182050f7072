"""How large a part is and how much it computes."""

from __future__ import annotations

from torch import nn


def num_params(part: nn.Module) -> int:
    """How many trainable and frozen parameters `part` has; a shared one counts once."""
    return sum(parameter.numel() for parameter in part.parameters())


class Part(nn.Module):
    """A module that says how large it is."""

    def num_params(self) -> int:
        """How many parameters it has; a shared one counts once."""
        return num_params(self)


def flops_per_token(part: nn.Module, length: int) -> int:
    """Forward FLOPs per token at a context of `length` tokens: what the part itself says, else two per weight of its
    matrices (Kaplan et al., 2020, section 2.1)."""
    own = getattr(part, "flops_per_token", None)
    if own is not None:
        return int(own(length))
    return 2 * sum(parameter.numel() for parameter in part.parameters() if parameter.dim() >= 2)


__all__ = ["Part", "flops_per_token", "num_params"]
