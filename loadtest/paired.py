"""Two ways of doing something, told apart on a machine whose speed moves: neighbouring runs, in both orders by turns.

Whatever slows down the machine for longer than two runs meets both of a pair. Which of the two comes first changes with
every pair, so that what the one leaves in the caches, or a drift, favours neither. The estimate is the median of the
pairs' own ratios, which single interruptions do not move.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

Run = Callable[[], object]
WARM_ROUNDS = 2


class Samples(NamedTuple):
    """Of two ways, by round: neighbours in one place; ``reference`` was first in the first, third, ... round."""

    reference: list[float]
    own: list[float]


class Pair(NamedTuple):
    reference: Run
    own: Run


def in_pairs(pairs: Mapping[str, Pair], rounds: int, seconds: float) -> dict[str, Samples]:
    """Seconds of each run, after rounds that warm up: one at least of either sort, however long they take; an even
    number of measured rounds where there are more."""
    samples = {name: Samples([], []) for name in pairs}
    began = time.perf_counter()
    warm, taken = 0, 0
    while warm < WARM_ROUNDS and (not warm or time.perf_counter() - began < seconds):
        for pair in pairs.values():
            pair.reference()
            pair.own()
        warm += 1
    while taken < rounds and (taken < 2 or taken % 2 or time.perf_counter() - began < seconds):
        for name, pair in pairs.items():
            found = samples[name]
            if taken % 2 == 0:
                found.reference.append(seconds_of(pair.reference))
                found.own.append(seconds_of(pair.own))
            else:
                found.own.append(seconds_of(pair.own))
                found.reference.append(seconds_of(pair.reference))
        taken += 1
    return samples


def seconds_of(run: Run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
