"""Low-rank terms of deltas that need not be of low rank: exact where that is affordable, else the best, with loss.

Every matrix ``[out, in]`` has rank ``min(out, in)`` at most, so an identity on its narrower side makes it a low-rank
term without any loss; that is as large as the delta itself, and worth it up to ``ConversionLimits.exact_rank``. Beyond
that the term of rank ``ConversionLimits.rank`` nearest to the delta (Eckart and Young) takes its place, and what that
costs in logits is measured by the proof, which refuses above a limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve_store.file_names import MAX_TENSOR_FILE_BYTES
from deltaserve_store.formats.conversion_cost import MAX_FLOPS, qr_flops, svd_flops
from deltaserve_store.formats.peft_fields import MAX_RANK
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import LinearSpec

_OVERSAMPLING = 32
_ROUNDS = 8
_WHOLE_SIZE = 1024
"""Up to this many rows or columns the decomposition is computed whole; above, the leading directions alone."""
_COLUMN_BYTES = 4
_ROUNDING = 1e-7
"""Of the largest singular value: what float32 leaves of directions that are not there."""


@dataclass(frozen=True, slots=True)
class ConversionLimits:
    """``exact_rank``: the largest rank at which a delta is converted without loss. ``rank``: that of the best term for
    deltas beyond it. Both from 1 to ``MAX_RANK``, ``rank`` at most ``exact_rank``, else ``ValueError``.

    ``max_bytes``: of all terms of an adapter, with numbers of ``itemsize`` bytes: what the server holds of one adapter,
    or, where nobody says, what a file may have that holds such terms themselves. ``max_flops``: of all decompositions
    that converting an adapter takes.
    """

    exact_rank: int = MAX_RANK
    rank: int = 256
    max_bytes: int = MAX_TENSOR_FILE_BYTES
    itemsize: int = 2
    max_flops: float = MAX_FLOPS

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= self.exact_rank <= MAX_RANK:
            raise ValueError(f"ranks {self.rank} and {self.exact_rank} are not 1 <= rank <= exact_rank <= {MAX_RANK}")

    def rank_of(self, linear: LinearSpec, bound: int) -> int:
        """The rank of the term for a delta that has at most rank ``bound``, whatever its shape."""
        bound = min(bound, linear.narrow)
        return bound if bound <= self.exact_rank else min(self.rank, bound)

    def is_exact(self, linear: LinearSpec, bound: int) -> bool:
        return min(bound, linear.narrow) <= self.exact_rank

    def bytes_of(self, linear: LinearSpec, rank: int, num_entries: int) -> int:
        """Of a low-rank term and a sparse one, whose entries have a column each."""
        numbers = rank * (linear.out_features + linear.in_features)
        return self.itemsize * numbers + (self.itemsize + _COLUMN_BYTES) * num_entries

    def flops(self, linear: LinearSpec, bound: int) -> float:
        """Of finding the best term of a delta that has at most rank ``bound``; 0 where it is converted as it is."""
        if self.is_exact(linear, bound):
            return 0.0
        out_features, in_features = linear.out_features, linear.in_features
        if _is_decomposed_whole(linear.out_features, linear.in_features, self.rank):
            return svd_flops(out_features, in_features)
        width = self.rank + _OVERSAMPLING
        products = 2.0 * (2 * _ROUNDS + 2) * out_features * in_features * width
        bases = (_ROUNDS + 1) * qr_flops(out_features, width) + _ROUNDS * qr_flops(in_features, width)
        return products + bases + svd_flops(width, in_features)


DEFAULT_LIMITS = ConversionLimits()


def converted(linear: LinearSpec, delta: Tensor, limits: ConversionLimits, dense: Callable[[], Tensor]) -> LoraDelta:
    """The term of a delta without structure, float32 ``[out, in]``: whole or the best; ``dense`` is for the proof."""
    if limits.is_exact(linear, linear.narrow):
        a, b = whole(delta)
        return LoraDelta(linear.name, a, b, 1.0, dense=dense)
    a, b, is_exact = best(delta, limits.rank_of(linear, linear.narrow))
    return LoraDelta(linear.name, a, b, 1.0, dense=dense, is_exact=is_exact)


def from_factors(
    linear: LinearSpec,
    rank: int,
    factors: Callable[[], tuple[Tensor, Tensor]],
    scaling: float,
    limits: ConversionLimits,
    dense: Callable[[], Tensor],
) -> LoraDelta:
    """The term of ``scaling * left @ right`` where ``factors()`` gives ``right [rank, in]`` and ``left [out, rank]``.

    They are made only where they are the term; a larger rank than the narrower side or the limit is multiplied out.
    """
    if rank <= min(linear.narrow, limits.exact_rank):
        right, left = factors()
        return LoraDelta(linear.name, right, left, scaling, dense=dense)
    return converted(linear, dense(), limits, dense)


def whole(delta: Tensor) -> tuple[Tensor, Tensor]:
    """``(a, b)`` with ``b @ a`` equal to ``delta`` to the bit: itself, and the identity of its narrower side.

    A power of two moves half of a small delta's size to the identity, so that narrow dtypes keep all of its digits.
    """
    out_features, in_features = delta.shape
    largest = float(delta.abs().max())
    share = 2.0 ** round(math.log2(largest) / 2) if largest > 0 else 1.0
    if out_features <= in_features:
        return (delta / share).contiguous(), torch.eye(out_features) * share
    return torch.eye(in_features) * share, (delta / share).contiguous()


def best(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, bool]:
    """``(a [k, in], b [out, k])`` float32, ``k <= rank``: the nearest matrix of that rank, without directions that are
    rounding; and whether nothing but those was left out.

    Large matrices go through subspace iteration (Halko et al., arXiv:0909.4061) from a fixed start: as good as the
    decomposition but for directions that hardly differ in weight, and the same for the same delta.
    """
    if _is_decomposed_whole(delta.shape[0], delta.shape[1], rank):
        left, weights, right = torch.linalg.svd(delta.double(), full_matrices=False)
    else:
        basis = _leading_directions(delta, rank)
        inner, weights, right = torch.linalg.svd((basis.t() @ delta).double(), full_matrices=False)
        left = basis.double() @ inner
    num_there = int((weights > _ROUNDING * weights[0]).sum())
    kept = min(rank, num_there)
    root = weights[:kept].sqrt()
    a, b = root[:, None] * right[:kept], left[:, :kept] * root
    if not kept:  # a delta of zeros
        a, b = torch.zeros(1, delta.shape[1]), torch.zeros(delta.shape[0], 1)
    return a.float().contiguous(), b.float().contiguous(), num_there <= rank


def _is_decomposed_whole(rows: int, columns: int, rank: int) -> bool:
    return min(rows, columns) <= max(_WHOLE_SIZE, 2 * rank)


def _leading_directions(delta: Tensor, rank: int) -> Tensor:
    """Orthonormal float32 ``[out, rank + oversampling]``, spanning nearly what the leading left singular vectors do."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(delta.shape[1], min(rank + _OVERSAMPLING, *delta.shape), generator=generator)
    basis = torch.linalg.qr(delta @ start).Q
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(delta @ torch.linalg.qr(delta.t() @ basis).Q).Q
    return basis
