"""The section `model.moe` of a profile."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class MoEConfig(BaseModel):
    """How tokens find their experts. What goes by a schedule (`moe_capacity`, `route_temp`) stands there instead."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    experts: Annotated[int, Field(ge=2, le=65536)] = 64
    """Experts per layer, E."""
    top_k: Annotated[int, Field(ge=1)] = 2
    """Experts that each token visits, k."""
    capacity: Annotated[float, Field(gt=0)] | None = 1.25
    """Most tokens that one expert takes in a training batch, as a multiple of the even share N k / E; null for no
    limit. Evaluation and generation have none: there a token's experts depend on that token alone."""
    overflow: Literal["next", "drop"] = "next"
    """What a full expert turns away goes to the token's next-best expert that has room, or nowhere."""
    normalize: bool = True
    """Whether a token's k weights are scaled to add up to one. Upcycling leaves the function unchanged only then."""
    balance_loss: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the load-balancing loss (Fedus et al., "Switch Transformers", 2022, equations 4 to 6)."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the router's z-loss (Zoph et al., "ST-MoE", 2022, equation 5); 0.001 there."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """In training the router's input is multiplied by uniform noise in 1 +- jitter (Fedus et al., 2022); 0.01 there."""
    bias_rate: Annotated[float, Field(ge=0)] = 0.0
    """Step of the balancing without a loss (DeepSeek-V3, 2024, section 2.1.2): after each step, an expert's bias, which
    takes part in the choice and not in the weights, rises by this where its load was below the mean and falls where it
    was above. 0.001 there, with `balance_loss: 0`."""
    shared_experts: Annotated[int, Field(ge=0, le=65536)] = 0
    """Experts that every token visits, beside its k; the output is then the mean of these and of the routed sum."""

    @model_validator(mode="after")
    def _fits(self) -> MoEConfig:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than the {self.experts} experts there are")
        if self.overflow == "next" and self.capacity is not None and self.capacity < 1:
            raise ValueError(
                f"a capacity of {self.capacity:g} leaves some tokens no expert; use 1 or more, or overflow: drop"
            )
        return self
