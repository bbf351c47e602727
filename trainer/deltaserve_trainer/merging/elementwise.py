"""Merges that look at every number of a weight delta on its own. Pure functions of float32 tensors of one shape.

A weight delta is what peft calls a task tensor. TIES and DARE are computed as peft 0.21 computes them
(``peft/utils/merge_utils.py``): trimming by tensor, signs elected by the unweighted sum, weights applied after the
election, the sum of the survivors divided by their number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """The ``int(density * n)`` numbers of largest magnitude, zeros elsewhere."""
    count = int(density * delta.numel())
    if count >= delta.numel():
        return delta.clone()
    kept = torch.zeros(delta.numel(), dtype=delta.dtype)
    places = delta.abs().flatten().topk(count).indices
    kept[places] = delta.flatten()[places]
    return kept.view_as(delta)


def drop_at_random(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each number is kept with probability ``density`` and divided by it, so that the expected delta is the same."""
    if density >= 1:
        return delta.clone()
    kept = torch.bernoulli(torch.full_like(delta, density), generator=generator)
    return delta * kept / density


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES (Yadav et al., arXiv:2306.01708): trim each delta, elect a sign for each number, average what agrees."""
    trimmed = torch.stack([keep_largest(delta, density) for delta in deltas])
    elected = torch.where(trimmed.sum(dim=0) >= 0, 1.0, -1.0)
    agrees = trimmed.sign() == elected
    total = (trimmed * _column(weights, trimmed) * agrees).sum(dim=0)
    return total / agrees.sum(dim=0).clamp(min=1)


def dare(
    deltas: Sequence[Tensor], weights: Sequence[float], density: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """DARE (Yu et al., arXiv:2311.03099): drop numbers at random, rescale the rest, add with weights. One generator
    for each delta."""
    total = torch.zeros_like(deltas[0])
    for delta, weight, generator in zip(deltas, weights, generators, strict=True):
        total += weight * drop_at_random(delta, density, generator)
    return total


def negmerge(deltas: Sequence[Tensor], scale: float) -> Tensor:
    """NegMerge (Kim et al., arXiv:2410.05583): ``-scale`` times the mean of the numbers whose sign is the same in all.

    The deltas are fine-tunes to what shall be forgotten; numbers where one of them is zero do not count as agreed.
    """
    stack = torch.stack(list(deltas))
    signs = stack.sign()
    is_unanimous = (signs == signs[0]).all(dim=0) & (signs[0] != 0)
    return -scale * stack.mean(dim=0) * is_unanimous


def _column(weights: Sequence[float], stack: Tensor) -> Tensor:
    return torch.tensor(weights, dtype=stack.dtype).view(-1, *([1] * (stack.dim() - 1)))
