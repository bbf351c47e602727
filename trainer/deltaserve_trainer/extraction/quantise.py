"""Numbers of few bits, as ``packed_factors`` stores them: for each span the scale that leaves the least error."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_HALF = 2.0**-14
"""A float16 below that has fewer digits."""
SHRINKS = {8: (1.0, 0.97), 4: (1.0, 0.94, 0.88, 0.8, 0.7), 3: (1.0, 0.92, 0.85, 0.77, 0.69, 0.6)}
SHRINKS[2] = (0.95, 0.87, 0.79, 0.72, 0.65, 0.58, 0.5, 0.42)
"""By bits: where the outermost value lies that is tried, as a share of the span's largest number."""


def quantised(
    rows: Tensor, bits: int, span: int, weights: Tensor | None = None, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """``codes`` uint8 [r, n] and ``scales`` [r, spans] of ``rows`` [r, n], and what they stand for, float64 [r, n].

    ``weights`` [n]: how much the square of a number's error counts. Scales are rounded to ``dtype`` before codes are
    chosen, so that codes make up for that.
    """
    rank, width = rows.shape
    num_spans = -(-width // span)
    x = torch.zeros(rank, num_spans * span, dtype=torch.float64)
    x[:, :width] = rows
    x = x.view(rank, num_spans, span)
    w = torch.zeros(num_spans * span, dtype=torch.float64)
    w[:width] = 1.0 if weights is None else weights.double()
    w = w.view(num_spans, span)
    top = (2**bits - 1) / 2
    largest = x.abs().amax(-1, keepdim=True)
    best_scale = torch.zeros_like(largest)
    least = torch.full_like(largest, float("inf"))
    for shrink in SHRINKS[bits]:
        scale = _rounded(largest * (shrink / top), dtype)
        levels = _levels(x, scale, top)
        # With the levels given the best scale is that of least squares.
        fitted = _rounded((w * x * levels).sum(-1, keepdim=True) / (w * levels**2).sum(-1, keepdim=True), dtype)
        for trial in (scale, fitted):
            error = (w * (x - trial * _levels(x, trial, top)) ** 2).sum(-1, keepdim=True)
            is_better = error < least
            least = torch.where(is_better, error, least)
            best_scale = torch.where(is_better, trial, best_scale)
    levels = _levels(x, best_scale, top)
    codes = (levels + top).to(torch.uint8).view(rank, -1)[:, :width].contiguous()
    values = (levels * best_scale).view(rank, -1)[:, :width]
    return codes, best_scale[:, :, 0].to(dtype), values


def scale_dtype(*sides: Tensor) -> torch.dtype:
    """float16, or bfloat16 where the scales of some row would be too small for it at 8 bits."""
    least = min(float(rows.abs().amax(1).min()) for rows in sides)
    return torch.float16 if least > 128 * SMALLEST_HALF else torch.bfloat16


def _levels(x: Tensor, scale: Tensor, top: float) -> Tensor:
    """The nearest of ``-top, ..., -1/2, 1/2, ..., top``; any, where a scale is 0."""
    return ((x / torch.where(scale == 0, 1.0, scale)) + top).round().clamp(0, 2 * top) - top


def _rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Never negative, so that codes and numbers are of one order."""
    return torch.nan_to_num(scale).abs().to(dtype).double()
