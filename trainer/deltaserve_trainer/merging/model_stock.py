"""Model Stock (Jang et al., arXiv:2403.19522): the mean of k fine-tunes, pulled toward the base by their angle.

``w = w0 + t * mean(delta)`` with ``t = k cos / (1 + (k - 1) cos)``, per weight; ``cos`` is the mean cosine of all pairs
of deltas. Only inner products are needed, and of low-rank and sparse deltas they come without forming a matrix. An
adapter that leaves a weight alone stands at the base there: its cosine with others counts as 0, and so does a
negative mean, for which the formula would walk away from all fine-tunes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from deltaserve_trainer.merging.low_rank import Factors, inner
from deltaserve_trainer.merging.update import Entries, LinearUpdate


def ratio_of(cosine: float, count: int) -> float:
    """``t``; 1 for equal deltas, 0 for orthogonal ones."""
    cosine = max(0.0, cosine)
    return count * cosine / (1 + (count - 1) * cosine)


def stock_ratio(parts: Sequence[LinearUpdate], count: int, weight: Callable[[], Tensor]) -> float:
    """``t`` of one weight changed by ``parts``, of ``count`` adapters."""
    if any(part.has_gate for part in parts):
        return ratio_of(_mean_cosine([part.dense(weight).double().flatten() for part in parts], count, _dot), count)
    return ratio_of(_mean_cosine([part for part in parts if part.has_matrix], count, _inner), count)


def pull(parts: Sequence[Mapping[str, Tensor]], count: int, only: str | None = None) -> dict[str, Tensor]:
    """The same for vectors (biases, gains, shifts), each by its own angle."""
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for part in parts for name in part if only in (None, name)):
        vectors = [part[name].double() for part in parts if name in part]
        ratio = ratio_of(_mean_cosine(vectors, count, _dot), count)
        found[name] = (ratio * sum(vectors) / count).float()  # type: ignore[union-attr]
    return found


def _mean_cosine(parts: Sequence, count: int, product: Callable) -> float:
    sizes = [product(part, part) ** 0.5 for part in parts]
    cosines = [
        product(parts[i], parts[j]) / (sizes[i] * sizes[j])
        for i, j in itertools.combinations(range(len(parts)), 2)
        if sizes[i] > 0 and sizes[j] > 0
    ]
    return sum(cosines) / (count * (count - 1) / 2)


def _dot(one: Tensor, other: Tensor) -> float:
    return float(one @ other)


def _inner(one: LinearUpdate, other: LinearUpdate) -> float:
    """``<dW1, dW2>`` of low-rank and sparse parts."""
    total = 0.0
    if one.factors is not None and other.factors is not None:
        total += inner(one.factors, other.factors)
    for factors, entries in ((one.factors, other.entries), (other.factors, one.entries)):
        if factors is not None and entries is not None:
            total += _mixed(factors, entries)
    if one.entries is not None and other.entries is not None:
        shared, mine, theirs = _shared(one.entries.keys, other.entries.keys)
        if shared:
            total += float(one.entries.values.double()[mine] @ other.entries.values.double()[theirs])
    return total


def _mixed(factors: Factors, entries: Entries) -> float:
    width = factors.a.shape[1]
    rows, cols = entries.keys // width, entries.keys % width
    at = (factors.b.double()[rows] * factors.a.double()[:, cols].t()).sum(dim=1)
    return float(at @ entries.values.double())


def _shared(one: Tensor, other: Tensor) -> tuple[int, Tensor, Tensor]:
    """How many keys both have, and where they are; both ascend."""
    places = torch.searchsorted(other, one).clamp(max=len(other) - 1)
    mine = (other[places] == one).nonzero().flatten()
    return len(mine), mine, places[mine]
