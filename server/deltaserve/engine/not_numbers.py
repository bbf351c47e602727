"""Whose fault it is when logits are no numbers."""

from __future__ import annotations

from deltaserve.core import GenerationRequest
from deltaserve.errors import DeltaserveError, InvalidRequest

CODE = "non_finite_logits"


def not_numbers(request: GenerationRequest) -> DeltaserveError:
    """An adapter was proven alone and at strength 1: whoever asks for more gets a 400, all others an error of ours."""
    parts = [part for binding in request.bindings for part in binding.parts]
    is_proven = all(part.scale_first == part.scale_last and part.scale_first in (0.0, 1.0) for part in parts)
    if is_proven and all(len(binding.parts) <= 1 for binding in request.bindings):
        return DeltaserveError("The model's output is not a number for this request.", code=CODE)
    return InvalidRequest(
        "The model's output is not a number at these scales; ask for smaller ones, or for fewer adapters.",
        param="adapters" if request.ensemble is None else "ensemble.members",
        code=CODE,
    )
