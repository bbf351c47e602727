"""Figures over rounds, read from a record alone: medians with their spread, and ratios taken inside a round."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtest.figures import spread

Figures = Mapping[str, Any]
Get = Callable[[Figures], float | None]


def throughput(figures: Figures) -> float | None:
    """Tokens per second; None for a run in which a request failed, whose time is not that of the work asked."""
    return figures["tokens_per_second"] if figures.get("num_succeeded") == figures.get("num_requests") else None


def latency(kind: str, percentile: str) -> Get:
    def get(figures: Figures) -> float | None:
        return figures["latency"][f"{kind}_seconds"].get(percentile)

    return get


def rounds_of(record: Mapping[str, Any], *keys: str) -> list[Figures | None]:
    """What lies under ``results[key][key]...`` of each round; None for a round that lacks it."""
    found: list[Figures | None] = []
    for entry in record["rounds"]:
        value: Any = entry["results"]
        for key in keys:
            value = value.get(key) if value is not None else None
        found.append(value)
    return found


def over_rounds(rounds: Sequence[Figures | None], get: Get) -> dict[str, float | int] | None:
    values = [value for figures in rounds if figures is not None and (value := get(figures)) is not None]
    return spread(values) if values else None


def ratio(above: Sequence[Figures | None], below: Sequence[Figures | None], get: Get) -> dict[str, float | int] | None:
    """Spread of ``ratios``; None where no round has both."""
    values = ratios(above, below, get)
    return spread(values) if values else None


def ratios(above: Sequence[Figures | None], below: Sequence[Figures | None], get: Get) -> list[float]:
    """``above / below`` of each round that has both: drift between rounds cancels."""
    values = []
    for one, other in zip(above, below, strict=True):
        a, b = (None if figures is None else get(figures) for figures in (one, other))
        if a is not None and b:
            values.append(a / b)
    return values


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Where the median of what ``values`` were drawn from lies, whatever its distribution; None for too few of them.

    Between the k-th least and the k-th greatest value, by the binomial of how many fall below the median.
    """
    found, count, below, k = sorted(values), len(values), 0.0, 0
    while (below := below + math.comb(count, k) / 2**count) <= (1 - confidence) / 2:
        k += 1
    return (found[k - 1], found[count - k]) if k else None


@dataclass(frozen=True, slots=True)
class Line:
    """Least squares; ``r_squared`` is the share of the variance of ``ys`` that it explains."""

    at_zero: float
    slope: float
    r_squared: float

    def at(self, x: float) -> float:
        return self.at_zero + self.slope * x


def line(xs: Sequence[float], ys: Sequence[float]) -> Line | None:
    """None where fewer than three points, or only one ``x``, leave nothing to explain."""
    if len(set(xs)) < 2 or len(xs) < 3:
        return None
    slope, at_zero = np.polyfit(xs, ys, 1)
    rest = np.asarray(ys) - (at_zero + slope * np.asarray(xs))
    whole = float(np.square(np.asarray(ys) - np.mean(ys)).sum())
    return Line(float(at_zero), float(slope), 1 - float(np.square(rest).sum()) / whole if whole else 1.0)


def shown(figure: Mapping[str, float | int] | None, *, scale: float = 1.0, digits: int = 0) -> str:
    """``median [least–greatest]``; one number for one round, a dash for none."""
    if figure is None:
        return "–"
    median, least, greatest = (f"{scale * figure[key]:,.{digits}f}" for key in ("median", "min", "max"))
    return median if figure["rounds"] == 1 else f"{median} [{least}–{greatest}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def layers_told(record: Mapping[str, Any]) -> str:
    """Which base the server had, where the record knows it: the fixture may have fewer layers than it is by itself."""
    layers = record["server"].get("layers")
    return "" if layers is None else f", a base of {layers} layers"
