"""The sections of core's attentions and feed-forward layers: here and not beside the layers, so that a slip in one is
told before torch is imported, which takes seconds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from apt.core.config import Section


class TVAConfig(Section):
    """The section `model.tva`."""

    r: Annotated[int, Field(gt=0)] = 4
    """Compression: the vein has d_model / r dimensions, and the cache 2 r times fewer numbers than that of `mha`."""
    s: Annotated[float, Field(ge=0)] = 1.0
    """Strength of self-generation; 0 leaves it out."""
    tau: Annotated[float, Field(gt=0)] = 0.18
    """Temperature of self-generation: s / tau is the gain on its weights."""
    qk_norm: bool = True
    """Whether queries and keys go through an RMS norm with gains, after the rotation."""


class MHAConfig(Section):
    """The section `model.mha`."""

    num_kv_heads: Annotated[int, Field(gt=0)] | None = None
    """Heads K of keys and values, a divisor of the heads; as many as there are heads if left out."""
    qk_norm: bool = False
    """Whether queries and keys go through an RMS norm with gains, after the rotation."""
    bias: bool = False
    """Whether both projections have a bias."""


class FFNConfig(Section):
    """The section of an FFN provider."""

    bias: bool = False
    """Whether the matrices have a bias."""
