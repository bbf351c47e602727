"""What it costs to serve the nearest low-rank term instead of a method's own delta, measured in logits of the probe.

Both sides are folded weights in float32: the base with the method's own deltas, and the base with what the terms
multiply to. A weak adapter is compared at a larger scale, where the allowed error stands out from rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltaserve.errors import Reason
from deltaserve_store.parsed import ParsedAdapter

DEFAULT_ERROR_SHARE = 0.05
"""Of the adapter's effect: how far the served logits may be from those of its exact delta."""
ERROR_CODE = "conversion_error"


@dataclass(frozen=True, slots=True)
class Conversion:
    """``error``: max |logits with the exact deltas - logits with the terms|; ``effect``: max |exact - base|; ``limit``:
    the largest ``error`` that is served. All at ``scale``. ``rank`` and ``num_linears``: of the terms with loss.
    """

    scale: float
    error: float
    effect: float
    limit: float
    rank: int
    num_linears: int

    @property
    def is_within_limit(self) -> bool:
        return self.error <= self.limit

    @property
    def share(self) -> float:
        """The error as a part of the effect."""
        return self.error / self.effect if self.effect else math.inf

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> Conversion | None:
        return None if data is None else cls(**data)


def scale_for(effect: float, share: float, noise: float, most: float) -> float:
    """The power of two at which ``share`` of the effect exceeds ``noise``, at most ``most``; 1 where it does at 1."""
    if effect == 0.0 or share * effect >= noise:
        return 1.0
    return min(most, 2.0 ** math.ceil(math.log2(noise / (share * effect))))


def refusal(conversion: Conversion) -> Reason | None:
    """Names the error found, the limit, and the ways out; None where it is within the limit."""
    if conversion.is_within_limit:
        return None
    at = "" if conversion.scale == 1.0 else f" at scale {conversion.scale:g}"
    found = (
        f"the best terms of rank {conversion.rank} in {conversion.num_linears} linears change logits by "
        f"{conversion.error:.3g}{at}, {conversion.share:.1%} of the adapter's effect"
    )
    allowed = (
        f"at most {conversion.limit:.3g}; serve with a larger --conversion-rank (up to 1024) or --conversion-error, or "
        "train with fewer coefficients, narrower targets, or as a LoRA"
    )
    return Reason(ERROR_CODE, "logits", found, allowed)


def told(conversion: Conversion) -> str:
    """The warning that goes with an adapter that is served with loss."""
    return (
        f"served by the best terms of rank {conversion.rank} in {conversion.num_linears} linears: logits differ by "
        f"{conversion.error:.3g} from the exact delta's, {conversion.share:.2%} of its effect; limit "
        f"{conversion.limit:.3g}"
    )


def lossy_size(adapter: ParsedAdapter) -> tuple[int, int]:
    """Largest rank and number of the terms that are not their method's delta."""
    lossy = adapter.lossy_deltas
    return max((delta.rank for delta in lossy), default=0), len(lossy)
