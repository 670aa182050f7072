"""The section `model.mha` as the attentions of this package read it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from apt.modeling.layers.config import MHAConfig


class WindowedMHAConfig(MHAConfig):
    """The keys of core's `mha`, so that a profile and a checkpoint move between all of them, and one more."""

    window: Annotated[int, Field(gt=0)] | None = None
    """How many positions a position sees, itself the last of them (Beltagy et al., "Longformer", 2020); all that came
    before if left out. `mha` has no window and refuses a section that sets one."""
