"""The section `model.bistate` of a profile."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class BistateConfig(BaseModel):
    """How far the model in training is held to its average."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    alpha: Annotated[float, Field(ge=0)] = 0.35
    """Weight of KL(stable's predictions || the model's)."""
    beta: Annotated[float, Field(ge=0)] = 0.20
    """Weight of the InfoNCE between the hidden states."""
    tau_align: Annotated[float, Field(gt=0)] = 0.15
    """Temperature of that InfoNCE: cosines are divided by it."""
    stable_lag: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """How far the stable state is behind the weights in the mean, as a share of the steps so far."""
    contrast_tokens: Annotated[int, Field(ge=2)] = 1024
    """Among how many tokens one is to be found; the tokens of a larger micro-batch are dealt out into groups."""
