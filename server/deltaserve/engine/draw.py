"""Drawing tokens from rows of weights, by inverting each row's cumulative distribution at one uniform number.

Every row is reduced on its own and in the same way whatever rows are beside it, so its token depends on its weights,
its filters and its number alone. Sorting a whole vocabulary costs a hundred times what the choice needs, so filters
look at the best few first, and only at rows that keep all of those in full.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltaserve.core import SamplingParams
from deltaserve_kernels import upload

CANDIDATES = (64, 1024)
"""How many best tokens filters look at, in turn, before they sort the whole row."""

_BUCKET = 64


def draw_plain(weights: Tensor, draws: Sequence[float]) -> Tensor:
    """One token per row of ``weights`` [n, vocab] (not negative, not all zero), ``draws`` in [0, 1): int64 [n].

    No sync. A row that breaks those rules, NaN in it, gets some token.
    """
    buckets = _buckets(weights)
    cumulative = buckets.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    targets = upload(torch.tensor(draws, dtype=torch.float64), weights.device) * cumulative[:, -1]
    bucket = _invert(cumulative, targets, cumulative[:, -1])
    # What is left of the target inside the bucket; buckets are summed in float32, so it may overshoot a little.
    before = pad(cumulative, (1, 0)).gather(1, bucket[:, None])[:, 0]
    inside = buckets[torch.arange(len(bucket), device=weights.device), bucket].cumsum(dim=-1, dtype=torch.float64)
    return bucket * _BUCKET + _invert(inside, targets - before, inside[:, -1])


class FilteredDraw:
    """As ``draw_plain`` after top-k, top-p and min-p, in this order; the largest weight of each row is 1.

    Each filter keeps a head of the row sorted by weight, so together they keep the shortest of the heads. ``first``,
    int64 [2, n], are the tokens drawn from the best few and how many of those each row kept; ``finish`` draws again for
    the rows that kept them all, seldom any.
    """

    def __init__(self, weights: Tensor, filters: Sequence[SamplingParams], draws: Sequence[float]) -> None:
        self._weights = weights
        self._filters = filters
        self._draws = draws
        self._totals = _buckets(weights).sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)[:, -1]
        self._sizes = [size for size in CANDIDATES if size < weights.shape[1]] + [weights.shape[1]]
        self.first = self._draw(list(range(len(filters))), self._sizes[0])

    def finish(self, tokens: list[int], num_kept: list[int]) -> list[int]:
        """The tokens; ``first`` as lists. Waits for the device only when some row is still open."""
        tokens = list(tokens)
        open_rows = self._still_open(range(len(tokens)), num_kept, self._sizes[0])
        for size in self._sizes[1:]:
            if not open_rows:
                break
            chosen, num_kept = self._draw(open_rows, size).tolist()
            for i, token in zip(open_rows, chosen, strict=True):
                tokens[i] = token
            open_rows = self._still_open(open_rows, num_kept, size)
        return tokens

    def _still_open(self, rows: Sequence[int], num_kept: Sequence[int], size: int) -> list[int]:
        """Rows that kept all the ``size`` best, and may keep more."""
        is_last = size == self._sizes[-1]
        return [
            i
            for i, kept in zip(rows, num_kept, strict=True)
            if kept == size and not is_last and not 0 < self._filters[i].top_k <= size
        ]

    def _draw(self, rows: list[int], size: int) -> Tensor:
        """int64 [2, n]: tokens of these rows drawn from their ``size`` best, and how many of those they kept."""
        weights, totals = self._weights, self._totals
        if len(rows) < len(weights):
            index = upload(torch.tensor(rows), weights.device)
            weights, totals = weights.index_select(0, index), totals.index_select(0, index)
        if size < weights.shape[1]:
            best, ids = weights.topk(size, dim=-1)
        else:
            best, ids = weights.sort(dim=-1, descending=True, stable=True)
        return _draw_heads(best, ids, totals, [self._filters[i] for i in rows], [self._draws[i] for i in rows])


def _draw_heads(
    best: Tensor, ids: Tensor, totals: Tensor, filters: Sequence[SamplingParams], draws: Sequence[float]
) -> Tensor:
    """``best`` [n, c]: weights in descending order, ``ids`` their tokens, ``totals`` float64 [n] the row sums.

    int64 [2, n]: the tokens drawn and how many of the candidates each row kept.
    """
    num_candidates = best.shape[1]

    def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return upload(torch.tensor(values, dtype=dtype), best.device)[:, None]

    top_k = column([min(f.top_k, num_candidates) or num_candidates for f in filters], torch.int64)
    has_top_k = column([0 < f.top_k <= num_candidates for f in filters], torch.bool)
    cumulative = best.cumsum(dim=-1, dtype=torch.float64)
    # What top-p is a share of: everything that top-k left.
    mass = torch.where(has_top_k, cumulative.gather(1, top_k - 1), totals[:, None])
    keep = torch.arange(num_candidates, device=best.device) < top_k
    keep &= cumulative - best < column([f.top_p for f in filters], torch.float64) * mass
    keep &= best >= column([f.min_p for f in filters], best.dtype)
    keep[:, 0] = True
    num_kept = keep.sum(dim=-1)
    masses = cumulative.gather(1, num_kept[:, None] - 1)[:, 0]
    targets = column(draws, torch.float64)[:, 0] * masses
    position = _invert(cumulative, targets, masses)
    return torch.stack([ids.gather(1, position[:, None])[:, 0], num_kept])


def _buckets(weights: Tensor) -> Tensor:
    """[n, vocab] as [n, buckets, 64], padded with zeros."""
    return pad(weights, (0, -weights.shape[1] % _BUCKET)).view(len(weights), -1, _BUCKET)


def _invert(cumulative: Tensor, targets: Tensor, masses: Tensor) -> Tensor:
    """First index [n] at which ``cumulative`` [n, c] exceeds ``targets`` [n], kept below ``masses`` [n]: an index whose
    own weight is not zero. Always an index of ``cumulative``, whatever the numbers are."""
    below = torch.nextafter(masses, torch.zeros_like(masses))
    found = torch.searchsorted(cumulative, torch.minimum(targets, below)[:, None], right=True)[:, 0]
    return found.clamp_(max=cumulative.shape[1] - 1)
