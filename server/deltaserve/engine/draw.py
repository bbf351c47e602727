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

CANDIDATES = (64, 1024)
"""How many best tokens filters look at, in turn, before they sort the whole row."""

_BUCKET = 64


def draw_plain(weights: Tensor, draws: Sequence[float]) -> list[int]:
    """One token per row of ``weights`` [n, vocab] (not negative, not all zero), ``draws`` in [0, 1)."""
    buckets = _buckets(weights)
    cumulative = buckets.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    targets = torch.tensor(draws, dtype=torch.float64, device=weights.device) * cumulative[:, -1]
    bucket = _invert(cumulative, targets, cumulative[:, -1])
    # What is left of the target inside the bucket; buckets are summed in float32, so it may overshoot a little.
    before = pad(cumulative, (1, 0)).gather(1, bucket[:, None])[:, 0]
    inside = buckets[torch.arange(len(bucket), device=weights.device), bucket].cumsum(dim=-1, dtype=torch.float64)
    tokens: list[int] = (bucket * _BUCKET + _invert(inside, targets - before, inside[:, -1])).tolist()
    return tokens


def draw_filtered(weights: Tensor, filters: Sequence[SamplingParams], draws: Sequence[float]) -> list[int]:
    """As ``draw_plain`` after top-k, top-p and min-p, in this order; the largest weight of each row is 1.

    Each filter keeps a head of the row sorted by weight, so together they keep the shortest of the heads.
    """
    totals = _buckets(weights).sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)[:, -1]
    vocab_size = weights.shape[1]
    tokens = [0] * len(filters)
    open_rows = list(range(len(filters)))
    for num_candidates in (*CANDIDATES, vocab_size):
        if num_candidates > vocab_size:
            continue
        rows = weights if len(open_rows) == len(weights) else weights[open_rows]
        if num_candidates < vocab_size:
            best, ids = rows.topk(num_candidates, dim=-1)
        else:
            best, ids = rows.sort(dim=-1, descending=True, stable=True)
        some = [filters[i] for i in open_rows]
        chosen, num_kept = _draw_heads(best, ids, totals[open_rows], some, [draws[i] for i in open_rows])
        still_open: list[int] = []
        for i, token, kept in zip(open_rows, chosen, num_kept, strict=True):
            tokens[i] = token
            if kept == num_candidates < vocab_size and not 0 < filters[i].top_k <= num_candidates:
                still_open.append(i)
        open_rows = still_open
        if not open_rows:
            break
    return tokens


def _draw_heads(
    best: Tensor, ids: Tensor, totals: Tensor, filters: Sequence[SamplingParams], draws: Sequence[float]
) -> tuple[list[int], list[int]]:
    """``best`` [n, c]: weights in descending order, ``ids`` their tokens, ``totals`` float64 [n] the row sums.

    Returns the tokens drawn and how many of the candidates each row kept.
    """
    num_candidates = best.shape[1]

    def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=best.device)[:, None]

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
    targets = torch.tensor(draws, dtype=torch.float64, device=best.device) * masses
    position = _invert(cumulative, targets, masses)
    return ids.gather(1, position[:, None])[:, 0].tolist(), num_kept.tolist()


def _buckets(weights: Tensor) -> Tensor:
    """[n, vocab] as [n, buckets, 64], padded with zeros."""
    return pad(weights, (0, -weights.shape[1] % _BUCKET)).view(len(weights), -1, _BUCKET)


def _invert(cumulative: Tensor, targets: Tensor, masses: Tensor) -> Tensor:
    """First index [n] at which ``cumulative`` [n, c] exceeds ``targets`` [n], kept below ``masses`` [n]: an index whose
    own weight is not zero."""
    below = torch.nextafter(masses, torch.zeros_like(masses))
    return torch.searchsorted(cumulative, torch.minimum(targets, below)[:, None], right=True)[:, 0]
