"""The field ``adapters``: which adapters a request composes, and how strongly each of them counts."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MAX_LISTED = 256
"""Beyond any limit of an engine, which says how many it takes."""


def _scale(value: Any) -> tuple[float, float]:
    """A number, or [at the first layer, at the last one] -> both ends of the line over depth; null is 1."""
    if value is None:
        return 1.0, 1.0
    ends = value if isinstance(value, list) else [value, value]
    if len(ends) != 2 or not all(type(end) in (int, float) and _is_finite(end) for end in ends):
        raise ValueError("must be a finite number, or two: [at the first layer, at the last layer]")
    return float(ends[0]) + 0.0, float(ends[1]) + 0.0  # minus zero is zero


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(float(number))
    except OverflowError:
        return False


class AdapterChoice(BaseModel):
    """``id`` is anything that ``model`` takes, save the base's name."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    id: Annotated[str, Field(min_length=1, max_length=512)]
    scale: Annotated[tuple[float, float], BeforeValidator(_scale)] = (1.0, 1.0)


Adapters = Annotated[list[AdapterChoice], Field(max_length=MAX_LISTED)]
