"""The field ``ensemble``: which models answer as one, and how much each of them counts."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from deltaserve.api.schemas.composition import MAX_LISTED, Adapters


class _WithoutNulls(BaseModel):
    """A field that is null is as if it were not there."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _no_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


def _weight(value: Any) -> float:
    """Which numbers a mix takes is checked by the engine."""
    try:
        if type(value) in (int, float) and math.isfinite(weight := float(value)):
            return weight
    except OverflowError:
        pass
    raise ValueError("must be a finite number")


class MemberChoice(_WithoutNulls):
    """``model`` is what a request's ``model`` may be; ``adapters`` are composed over the base. ``weight`` None:
    one of the number of members."""

    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    adapters: Adapters = Field(default_factory=list)
    weight: Annotated[float, BeforeValidator(_weight)] | None = None

    @model_validator(mode="after")
    def _names_something(self) -> MemberChoice:
        if self.model is None and not self.adapters:
            raise ValueError("must name a model, or the adapters that are composed")
        return self


class EnsembleChoice(_WithoutNulls):
    members: Annotated[list[MemberChoice], Field(min_length=1, max_length=MAX_LISTED)]
    mix: Literal["logits", "probabilities"] = "logits"
