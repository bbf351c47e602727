"""How many bytes each linear gets, and in which form: low rank or sparse.

A linear's delta is worth the squares that a form keeps of it (what is left over is the squared error). Singular values
and magnitudes fall, so each form's worth is concave in its bytes, and one price per byte settles everything: at a price
each linear takes what is worth more than it costs, in the form that gains more (Everett, 1963). The price is halved
between two bounds until the budget is met; what is left after the last step goes to the next best items.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["low rank", "sparse"]
FORMS: tuple[Form, ...] = ("low rank", "sparse")
INDEX_BYTES = 8
"""Row and column of an entry, int32 each."""
MAX_RANK = 1024
NUM_BINS = 4096
PRICE_STEPS = 100
ROUNDING = 1e-10
"""Of all squares: singular values below that are what two models in float32 differ by anyway."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What a delta [out, in] would be worth. ``singular`` float64: squared singular values, falling, as many as may be
    served. ``bins``: mean square and number of the entries in a histogram over magnitudes, falling; float64 each.
    """

    shape: tuple[int, int]
    total: float
    singular: Tensor
    bins: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Choice:
    """``size`` is the rank, or the number of entries."""

    form: Form
    size: int


@dataclass(frozen=True, slots=True)
class Plan:
    """``num_bytes`` of numbers and indices, without headers. ``kept``: squares kept, as far as bins can tell."""

    choices: Mapping[str, Choice]
    num_bytes: int
    kept: float


def spectrum(delta: Tensor) -> Spectrum:
    """Reads a float32 delta [out, in] once; its singular vectors are not computed."""
    rows, columns = delta.shape
    squares = delta.flatten().double().square()
    total = float(squares.sum())
    singular = torch.linalg.svdvals(delta.double()).square()[:MAX_RANK]
    return Spectrum((rows, columns), total, singular[singular > ROUNDING * total], _bins(squares))


def plan(
    spectra: Mapping[str, Spectrum],
    budget: int,
    *,
    number_bytes: int,
    entry_bytes: int = 0,
    forms: Sequence[Form] = FORMS,
) -> Plan:
    """The best use of ``budget`` bytes that one price finds; never above it.

    ``number_bytes``: of one number. ``entry_bytes``: what a tensor costs beside its numbers, and its name; a linear
    pays for its tensors and once more for being listed.
    """
    curves: dict[str, list[_Curve]] = {}
    for name, found in spectra.items():
        entry = entry_bytes + len(name) if entry_bytes else 0
        if found.total:
            curves[name] = [_Curve.of(found, form, number_bytes, entry) for form in forms]
    low, high = _price_bounds([curve for choices in curves.values() for curve in choices])
    taken = {name: (choices[0], 0) for name, choices in curves.items()}
    for _ in range(PRICE_STEPS):
        price = math.sqrt(low * high)
        trial = {name: _best(choices, price) for name, choices in curves.items()}
        if sum(curve.cost(size) for curve, size in trial.values()) <= budget:
            high, taken = price, trial
        else:
            low = price
    left = budget - sum(curve.cost(size) for curve, size in taken.values())
    taken = _spend(taken, curves, left)
    choices = {name: Choice(curve.form, size) for name, (curve, size) in taken.items() if size}
    num_bytes = sum(curve.cost(size) for curve, size in taken.values())
    return Plan(choices, num_bytes, sum(curve.worth(size) for curve, size in taken.values()))


def best_plan(spectra: Mapping[str, Spectrum], budget: int, *, number_bytes: int, entry_bytes: int = 0) -> Plan:
    """The mixture, or one form alone where rounding to whole ranks makes that better."""
    plans = [
        plan(spectra, budget, number_bytes=number_bytes, entry_bytes=entry_bytes, forms=forms)
        for forms in (FORMS, FORMS[:1], FORMS[1:])
    ]
    return max(plans, key=lambda found: found.kept)


@dataclass(frozen=True, slots=True)
class _Curve:
    """Worth over size for one form of one delta; ``fixed_bytes`` are paid with the first item.

    Steps: ``gains`` of one item each, falling; ``ends``: items up to and with each step; ``sums``: worth of them.
    """

    form: Form
    item_bytes: int
    fixed_bytes: int
    gains: Tensor
    ends: Tensor
    sums: Tensor

    @classmethod
    def of(cls, found: Spectrum, form: Form, number_bytes: int, entry_bytes: int) -> _Curve:
        if form == "low rank":
            count, gains = torch.ones(len(found.singular), dtype=torch.float64), found.singular
            item_bytes, num_entries = sum(found.shape) * number_bytes, 3
        else:
            gains, count = found.bins
            item_bytes, num_entries = INDEX_BYTES + number_bytes, 4
        return cls(form, item_bytes, num_entries * entry_bytes, gains, count.cumsum(0), (gains * count).cumsum(0))

    def cost(self, size: int) -> int:
        return self.fixed_bytes + size * self.item_bytes if size else 0

    def most_for(self, num_bytes: int) -> int:
        """Items that so many bytes buy from nothing."""
        return min(
            max(0, (num_bytes - self.fixed_bytes) // self.item_bytes), int(self.ends[-1]) if len(self.ends) else 0
        )

    def size_at(self, price: float) -> int:
        """Items that are worth more than ``price`` for each of their bytes."""
        step = int((self.gains > price * self.item_bytes).sum())
        return int(self.ends[step - 1]) if step else 0

    def worth(self, size: int) -> float:
        if size == 0:
            return 0.0
        step = int(torch.searchsorted(self.ends, float(size)))
        before = float(self.ends[step - 1]) if step else 0.0
        worth_before = float(self.sums[step - 1]) if step else 0.0
        return worth_before + (size - before) * float(self.gains[step])

    def next_gain(self, size: int) -> float:
        """Of one more item, for each of its bytes; 0 where there is none."""
        step = int(torch.searchsorted(self.ends, float(size), right=True))
        return float(self.gains[step]) / self.item_bytes if step < len(self.gains) else 0.0

    def room(self, size: int) -> int:
        """Items left on the step that comes next."""
        step = int(torch.searchsorted(self.ends, float(size), right=True))
        return int(self.ends[step]) - size


def _best(curves: Sequence[_Curve], price: float) -> tuple[_Curve, int]:
    sizes = [(curve, curve.size_at(price)) for curve in curves]
    gain, place = max(
        (curve.worth(size) - price * curve.cost(size), place) for place, (curve, size) in enumerate(sizes)
    )
    return sizes[place] if gain > 0 else (curves[0], 0)


def _spend(
    taken: Mapping[str, tuple[_Curve, int]], curves: Mapping[str, Sequence[_Curve]], left: int
) -> dict[str, tuple[_Curve, int]]:
    """More items, the most worthy first, until none fits: of the form already chosen, or of any where there is none."""
    result = dict(taken)
    waiting: list[tuple[float, str, int]] = []
    for name, (chosen, size) in result.items():
        for place, curve in enumerate(curves[name]):
            if size and curve is chosen:
                waiting.append((-curve.next_gain(size), name, place))
            elif not size and (most := curve.most_for(left)):
                waiting.append((-curve.worth(most) / curve.cost(most), name, place))
    heapq.heapify(waiting)
    while waiting:
        gain, name, place = heapq.heappop(waiting)
        curve, (chosen, size) = curves[name][place], result[name]
        if gain == 0 or (size and curve is not chosen):
            continue
        free = left if size else left - curve.fixed_bytes
        more = min(free // curve.item_bytes, curve.room(size))
        if more < 1:
            continue
        result[name] = (curve, size + more)
        left -= curve.cost(size + more) - curve.cost(size)
        heapq.heappush(waiting, (-curve.next_gain(size + more), name, place))
    return result


def _price_bounds(curves: Sequence[_Curve]) -> tuple[float, float]:
    """A price at which everything is bought, and one at which nothing is."""
    gains = [curve.gains[curve.gains > 0] / curve.item_bytes for curve in curves]
    gains = [found for found in gains if len(found)]
    return min(float(found.min()) for found in gains) / 2, max(float(found.max()) for found in gains) * 2


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
