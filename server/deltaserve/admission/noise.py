"""What rounding alone does to an adapter's logits: the tolerance where the usual one does not hold.

The usual tolerance is that of the base. An adapter several times as large as the weights it changes amplifies the
rounding of every layer before it, in both halves of the proof alike: two correct answers then differ by more than the
base's would. That is measured, not assumed: the folded half runs once more, with the products of its linears in another
precision (float64 where float32 is served; operands and results of 16 bits where those are). Served logits may be
``NOISE_FACTOR`` times as far from the folded ones as these are from each other, and never by more than ``NOISE_SHARE``
of the adapter's effect: an adapter of which rounding blurs more cannot be proven.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from deltaserve.admission.evidence import Comparison

NOISE_FACTOR = 5.0
"""Served logits are a base product and an adapter's, each rounded, in sum; the folded ones one product. Over a hundred
random LoRA and GLoRA adapters of the embedded base they were 0.4 to 3.8 times as far apart as the two passes in
float32, 0.4 to 4.6 times in float16, 0.5 to 5.9 times in bfloat16, where some correct adapters stay refused."""
NOISE_SHARE = 0.05
"""With both, faults that change the answer (a linear left out, ranks in another order, a block transposed, a scale 1 %
off) are refused in float32 at 70 times the noise or more; in 16 bits some of 1 % are within rounding."""


def other_precision(served: torch.dtype) -> torch.dtype:
    """Of the second folded pass (``FoldedContext.precision``)."""
    return torch.float64 if served == torch.float32 else served


def with_noise(comparison: Comparison, noise: float) -> Comparison:
    """``noise``: max |folded - folded in the other precision| at the same scale."""
    allowed = min(NOISE_FACTOR * noise, NOISE_SHARE * comparison.effect)
    return replace(comparison, tolerance=max(comparison.tolerance, allowed), noise=noise)


def told_noise(comparison: Comparison, dtype: str) -> str:
    """The warning of an adapter that was let in by the larger tolerance."""
    return (
        f"the adapter amplifies the rounding of {dtype}: the same weights in another precision answer "
        f"{comparison.noise:.3g} apart, served ones {comparison.max_error:.3g} (effect {comparison.effect:.3g})"
    )
