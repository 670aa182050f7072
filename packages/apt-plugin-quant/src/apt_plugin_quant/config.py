"""The sections of the schemes: `model.int8`, `model.int8_dynamic`, `model.int4`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """The section of a scheme: `model.int8`, `model.int8_dynamic`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    keep: tuple[str, ...] = ()
    """Linear maps to leave as they are, by name, such as "blocks.0.*"; `*` stands for anything."""


class GroupSettings(Settings):
    """The section `model.int4`."""

    group_size: Annotated[int, Field(ge=2)] | None = None
    """Weights of a row that share one scale. Left out: 32, or in a layer whose rows that does not divide, the largest
    divisor below it, from 8 on; else the row."""
