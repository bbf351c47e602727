"""What a delta is worth in each form, for how many bytes.

Low rank: singular values of ``dW L`` (see ``activations``). Mixed precision: what each direction keeps with each number
of bits is measured, by rounding its two rows. Sparse, dense, signs: what they leave is measured too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from deltaserve_store.packed_factors import BITS, row_bytes
from deltaserve_trainer.extraction.activations import Measure
from deltaserve_trainer.extraction.plan import FORMS, Curve, Form, Worth
from deltaserve_trainer.extraction.quantise import quantised, scale_dtype

INDEX_BYTES = 8
"""Row and column of an entry, int32 each."""
SCALE_BYTES = 2
SPAN = 64
MAX_RANK = 1024
NUM_BINS = 4096
ROUNDING = 1e-10
"""Of all squares: singular values below that are what two models in float32 differ by anyway."""
SPARSE_SHARES = tuple(2.0**-power for power in range(14, -1, -1))
ENTRIES: dict[Form, int] = {"low rank": 3, "mixed precision": 4, "sparse": 4, "dense": 2, "signs": 3}
"""Tensors of a form in a header and lines in ``adapter.json``, in units of ``Costs.entry_bytes`` and a name."""


@dataclass(frozen=True, slots=True)
class Costs:
    """``dtype`` of stored numbers. ``entry_bytes``: what a tensor costs beside its numbers and its name."""

    dtype: torch.dtype
    entry_bytes: int = 0

    @property
    def number_bytes(self) -> int:
        return self.dtype.itemsize

    def fixed(self, form: Form, name: str) -> int:
        return ENTRIES[form] * (self.entry_bytes + len(name)) if self.entry_bytes else 0


@dataclass(frozen=True, slots=True)
class Directions:
    """``dW = sum of outer(b_i, a_i)``: ``a`` [r, in] and ``b`` [r, out] of equal length, ``rooted`` [r, in] = ``a L``,
    ``squares`` [r] what each is worth, falling; float64."""

    a: Tensor
    b: Tensor
    rooted: Tensor
    squares: Tensor


def directions_of(delta: Tensor, measure: Measure, max_rank: int = MAX_RANK) -> Directions:
    u, s, v = torch.linalg.svd(measure.rooted(delta), full_matrices=False)
    squares = s.square()
    rank = min(max_rank, int((squares > ROUNDING * squares.sum()).sum()))
    u, s, v = u[:, :rank].t(), s[:rank, None], v[:rank]
    a, b = measure.unrooted(v), s * u
    lengths = [torch.linalg.vector_norm(side, dim=1, keepdim=True) for side in (a, b)]
    balance = (lengths[1] / lengths[0]).sqrt()
    return Directions(a * balance, b / balance, v * balance, squares[:rank])


def worth_of(name: str, delta: Tensor, measure: Measure, costs: Costs, *, forms: Sequence[Form] = FORMS) -> Worth:
    """Reads a float32 delta [out, in]."""
    rows, columns = delta.shape
    total = measure.squares(delta)
    curves: dict[Form, Curve] = {}
    if not total:
        return Worth((rows, columns), 0.0, curves)
    if "low rank" in forms or "mixed precision" in forms:
        found = directions_of(delta, measure)
        each = torch.full_like(found.squares, (rows + columns) * costs.number_bytes)
        curves["low rank"] = Curve.of("low rank", costs.fixed("low rank", name), found.squares, each)
        curves["mixed precision"] = _mixed(found, costs.fixed("mixed precision", name), measure)
    if "sparse" in forms:
        curves["sparse"] = _sparse(delta, measure, total, costs, name)
    if "dense" in forms:
        kept = total - measure.squares(delta - delta.to(costs.dtype).float())
        curves["dense"] = _single("dense", kept, rows * columns * costs.number_bytes, costs, name)
    if "signs" in forms:
        signs, scale = signs_of(delta, measure, costs.dtype)
        kept = total - measure.squares(delta - torch.where(signs, 1.0, -1.0) * scale.float()[:, None])
        size = rows * (-(-columns // 32) * 4 + costs.number_bytes)
        curves["signs"] = _single("signs", kept, size, costs, name)
    return Worth((rows, columns), total, {form: curve for form, curve in curves.items() if form in forms})


def signs_of(delta: Tensor, measure: Measure, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Which numbers are not negative, bool [out, in], and for each row the scale that leaves the least."""
    signs = delta >= 0
    rooted = measure.rooted(torch.where(signs, 1.0, -1.0))
    scale = (measure.rooted(delta) * rooted).sum(1) / rooted.square().sum(1)
    return signs, scale.clamp(min=0).to(dtype)


def heaviest(delta: Tensor, measure: Measure, count: int) -> Tensor:
    """Flat positions of the entries that are worth the most, most first."""
    return (delta.double().square() * measure.diagonal).flatten().topk(count).indices


def kept_by_bits(found: Directions, bits: int, measure: Measure) -> Tensor:
    """Squares that each direction keeps of its own when both rows have so many bits, float64 [r]."""
    dtype = scale_dtype(found.a, found.b)
    *_, a = quantised(found.a, bits, SPAN, measure.diagonal, dtype)
    rooted = measure.rooted(a)
    along = (found.rooted * rooted).sum(1) / rooted.square().sum(1)
    *_, b = quantised(found.b * along[:, None], bits, SPAN, dtype=dtype)
    agreed = (found.b * b).sum(1) * (found.rooted * rooted).sum(1)
    return 2 * agreed - b.square().sum(1) * rooted.square().sum(1)


def _mixed(found: Directions, fixed_bytes: int, measure: Measure) -> Curve:
    """Every direction gets its bits step by step: the steps of its concave hull, all directions' in one order."""
    widths = found.a.shape[1], found.b.shape[1]
    scales = SCALE_BYTES * sum(-(-width // SPAN) for width in widths)
    prices = [scales + sum(row_bytes(width, bits) for width in widths) for bits in sorted(BITS)]
    kept = torch.stack([kept_by_bits(found, bits, measure) for bits in sorted(BITS)], dim=1).tolist()
    steps: list[tuple[float, float, int, int]] = []
    for direction, worths in enumerate(kept):
        cost = worth = 0.0
        while ahead := [
            ((gain - worth) / (price - cost), price, gain, bits)
            for price, gain, bits in zip(prices, worths, sorted(BITS), strict=True)
            if price > cost and gain > worth
        ]:
            _, price, gain, bits = max(ahead)
            steps.append((gain - worth, price - cost, direction, bits))
            cost, worth = price, gain
    steps.sort(key=lambda step: -step[0] / step[1])
    table = torch.tensor(steps, dtype=torch.float64).reshape(-1, 4)
    upgrades = table[:, 2:].long()
    return Curve.of("mixed precision", fixed_bytes, table[:, 0], table[:, 1], upgrades=upgrades)


def _single(form: Form, kept: float, num_bytes: int, costs: Costs, name: str) -> Curve:
    found = [kept] if kept > 0 else []
    sizes = torch.full((len(found),), float(num_bytes), dtype=torch.float64)
    return Curve.of(form, costs.fixed(form, name), torch.tensor(found, dtype=torch.float64), sizes)


def _sparse(delta: Tensor, measure: Measure, total: float, costs: Costs, name: str) -> Curve:
    fixed, size = costs.fixed("sparse", name), INDEX_BYTES + costs.number_bytes
    if measure.root is None:
        gains, counts = _bins((delta.double().square() * measure.diagonal).flatten())
    else:
        gains, counts = _measured_entries(delta, measure, total)
    return Curve.of("sparse", fixed, gains, torch.full_like(gains, size), counts)


def _measured_entries(delta: Tensor, measure: Measure, total: float) -> tuple[Tensor, Tensor]:
    """Entries share in outputs, so what some of them keep is no sum over them: it is measured for a few numbers of
    entries, and taken to be linear between those on the concave hull."""
    order = heaviest(delta, measure, int((delta != 0).sum()))
    sizes = sorted({max(1, round(share * len(order))) for share in SPARSE_SHARES})
    points = [(0, 0.0)]
    for size in sizes:
        left = delta.clone()
        left.view(-1)[order[:size]] = 0
        points.append((size, total - measure.squares(left)))
    hull = [points[0]]
    for point in points[1:]:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    steps = [(_slope(before, after), after[0] - before[0]) for before, after in pairwise(hull)]
    found = torch.tensor([step for step in steps if step[0] > 0], dtype=torch.float64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _slope(before: tuple[int, float], after: tuple[int, float]) -> float:
    return (after[1] - before[1]) / (after[0] - before[0])


def _bins(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Mean square and number of the numbers that are not zero, in bins of equal ratio, falling."""
    found = squares[squares > 0]
    if not len(found):
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    logs = found.log()
    low, high = float(logs.min()), float(logs.max())
    place = ((high - logs) * ((NUM_BINS - 1) / max(high - low, 1e-12))).long().clamp(0, NUM_BINS - 1)
    counts = torch.bincount(place, minlength=NUM_BINS).double()
    sums = torch.bincount(place, weights=found, minlength=NUM_BINS)
    used = counts > 0
    return sums[used] / counts[used], counts[used]
