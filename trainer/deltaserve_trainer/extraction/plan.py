"""How many bytes each linear gets, and in which form.

A linear's delta is worth the squares that a form keeps of it (what is left over is the squared error). In every form
the next item is worth less for its bytes than the one before, and one price per byte settles everything: at a price
each linear takes what is worth more than it costs, in the form that gains more (Everett, 1963). The price is halved
between two bounds until the budget is met; what is left after the last step goes to the next best items.
"""

from __future__ import annotations

import heapq
import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias, get_args

import torch
from torch import Tensor

Form = Literal["low rank", "mixed precision", "sparse", "dense", "signs"]
FORMS: tuple[Form, ...] = get_args(Form)
PRICE_PRECISION = 1e-9
"""Relative; below that nothing is between two prices."""
Floats: TypeAlias = "array[float]"


@dataclass(frozen=True, slots=True)
class Curve:
    """Worth over bytes for one form of one delta; ``fixed_bytes`` are paid with the first item.

    Steps are items of one sort: ``gains`` is what one is worth and ``item_bytes`` what it takes; their quotient falls
    from step to step, and ``negated`` is minus that. ``ends``: items up to and with each step; ``sums`` and ``costs``:
    what these are worth and take. Arrays of floats, since they are looked into one by one, many times. ``upgrades``
    int64 [steps, 2], of mixed precision: a direction, and its bits from then on.
    """

    form: Form
    fixed_bytes: int
    gains: Floats
    item_bytes: Floats
    negated: Floats
    ends: Floats
    sums: Floats
    costs: Floats
    upgrades: Tensor | None = None

    @classmethod
    def of(
        cls,
        form: Form,
        fixed_bytes: int,
        gains: Tensor,
        item_bytes: Tensor,
        counts: Tensor | None = None,
        upgrades: Tensor | None = None,
    ) -> Self:
        """float64 [steps] each. ``counts``: items of each step; None: one."""
        counts = torch.ones(len(gains), dtype=torch.float64) if counts is None else counts
        return cls(
            form,
            fixed_bytes,
            gains=_floats(gains),
            item_bytes=_floats(item_bytes),
            negated=_floats(-gains / item_bytes),
            ends=_floats(counts.cumsum(0)),
            sums=_floats((gains * counts).cumsum(0)),
            costs=_floats((item_bytes * counts).cumsum(0)),
            upgrades=upgrades,
        )

    def at(self, price: float) -> tuple[int, float, int]:
        """Items that are worth more than ``price`` for each of their bytes; what they are worth, and take."""
        step = bisect_left(self.negated, -price)
        if step == 0:
            return 0, 0.0, 0
        return int(self.ends[step - 1]), self.sums[step - 1], self.fixed_bytes + round(self.costs[step - 1])

    def cost(self, size: int) -> int:
        return self.fixed_bytes + round(self._up_to(size, self.costs, self.item_bytes)) if size else 0

    def worth(self, size: int) -> float:
        return self._up_to(size, self.sums, self.gains) if size else 0.0

    def most_for(self, num_bytes: int) -> int:
        """Items that so many bytes buy from nothing."""
        left = num_bytes - self.fixed_bytes
        step = bisect_right(self.costs, left)
        whole = int(self.ends[step - 1]) if step else 0
        if step == len(self.ends):
            return whole
        left -= round(self.costs[step - 1]) if step else 0
        return whole + max(0, int(left // self.item_bytes[step]))

    def next_gain(self, size: int) -> float:
        """Of one more item, for each of its bytes; 0 where there is none."""
        step = bisect_right(self.ends, size)
        return -self.negated[step] if step < len(self.gains) else 0.0

    def more_for(self, size: int, num_bytes: int) -> int:
        """Items of the step that comes after ``size`` ones, as many as so many bytes buy."""
        step = bisect_right(self.ends, size)
        if step == len(self.gains):
            return 0
        return min(int(num_bytes // self.item_bytes[step]), int(self.ends[step]) - size)

    def _up_to(self, size: int, sums: Floats, each: Floats) -> float:
        step = bisect_left(self.ends, size)
        before = (self.ends[step - 1], sums[step - 1]) if step else (0.0, 0.0)
        return before[1] + (size - before[0]) * each[step]


@dataclass(frozen=True, slots=True)
class Worth:
    """What a delta [out, in] is worth in each form that it may have; ``total`` is all of its squares."""

    shape: tuple[int, int]
    total: float
    curves: Mapping[Form, Curve]


@dataclass(frozen=True, slots=True)
class Choice:
    """``size``: the rank of low rank, the number of entries, 1 of dense and signs; of mixed precision the steps that
    are taken, and ``bits`` what they give each direction (0: nothing)."""

    form: Form
    size: int
    num_bytes: int = 0
    bits: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """Directions that are held."""
        return sum(map(bool, self.bits)) if self.form == "mixed precision" else self.size


@dataclass(frozen=True, slots=True)
class Plan:
    """``num_bytes`` with what names and headers take. ``kept``: squares kept, as far as curves can tell."""

    choices: Mapping[str, Choice]
    num_bytes: int
    kept: float


def plan(worths: Mapping[str, Worth], budget: int, *, forms: Sequence[Form] = FORMS) -> Plan:
    """The best use of ``budget`` bytes that one price finds; never above it."""
    curves: dict[str, list[Curve]] = {}
    for name, found in worths.items():
        offered = [found.curves[form] for form in forms if form in found.curves and len(found.curves[form].gains)]
        if found.total and offered:
            curves[name] = offered
    if not curves:
        return Plan({}, 0, 0.0)
    low, high = _price_bounds([curve for choices in curves.values() for curve in choices])
    taken = {name: (choices[0], 0) for name, choices in curves.items()}
    while high > low * (1 + PRICE_PRECISION):
        price = math.sqrt(low * high)
        trial = {name: _best(choices, price) for name, choices in curves.items()}
        if sum(cost for *_, cost in trial.values()) <= budget:
            high, taken = price, {name: (curve, size) for name, (curve, size, _) in trial.items()}
        else:
            low = price
    left = budget - sum(curve.cost(size) for curve, size in taken.values())
    taken = _spend(taken, curves, left)
    choices = {name: _choice(curve, size) for name, (curve, size) in taken.items() if size}
    num_bytes = sum(curve.cost(size) for curve, size in taken.values())
    return Plan(choices, num_bytes, sum(curve.worth(size) for curve, size in taken.values()))


def best_plan(worths: Mapping[str, Worth], budget: int, *, forms: Sequence[Form] = FORMS) -> Plan:
    """The mixture, or one form alone where rounding to whole items makes that better."""
    some = [forms, *((form,) for form in forms)] if len(forms) > 1 else [forms]
    return max((plan(worths, budget, forms=these) for these in some), key=lambda found: found.kept)


def _floats(column: Tensor) -> Floats:
    return array("d", column.tolist())


def _choice(curve: Curve, size: int) -> Choice:
    if curve.upgrades is None:
        return Choice(curve.form, size, curve.cost(size))
    taken = curve.upgrades[:size]
    bits = torch.zeros(int(taken[:, 0].max()) + 1, dtype=torch.int64)
    bits.scatter_reduce_(0, taken[:, 0], taken[:, 1], "amax")
    return Choice(curve.form, size, curve.cost(size), tuple(bits.tolist()))


def _best(curves: Sequence[Curve], price: float) -> tuple[Curve, int, int]:
    """The curve that gains the most at a price, with the items taken of it and what they take."""
    best, most = (curves[0], 0, 0), 0.0
    for curve in curves:
        size, worth, cost = curve.at(price)
        if worth - price * cost > most:
            best, most = (curve, size, cost), worth - price * cost
    return best


def _spend(
    taken: Mapping[str, tuple[Curve, int]], curves: Mapping[str, Sequence[Curve]], left: int
) -> dict[str, tuple[Curve, int]]:
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
        more = curve.more_for(size, left if size else left - curve.fixed_bytes)
        if more < 1:
            continue
        result[name] = (curve, size + more)
        left -= curve.cost(size + more) - curve.cost(size)
        heapq.heappush(waiting, (-curve.next_gain(size + more), name, place))
    return result


def _price_bounds(curves: Sequence[Curve]) -> tuple[float, float]:
    """A price at which everything is bought, and one at which nothing is."""
    gains = [(-curve.negated[0], -curve.negated[-1]) for curve in curves if curve.negated[0] < 0]
    most = max((first for first, _ in gains), default=1.0)
    return min((last for _, last in gains if last > 0), default=most) / 2, most * 2
