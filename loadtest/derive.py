"""Figures over rounds, read from a record alone: medians with their spread, and ratios taken inside a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    """Spread of ``above / below`` over the rounds that have both: drift between rounds cancels."""
    values = []
    for one, other in zip(above, below, strict=True):
        a, b = (None if figures is None else get(figures) for figures in (one, other))
        if a is not None and b:
            values.append(a / b)
    return spread(values) if values else None


def shown(figure: Mapping[str, float | int] | None, *, scale: float = 1.0, digits: int = 0) -> str:
    """``median [least–greatest]``; one number for one round, a dash for none."""
    if figure is None:
        return "–"
    median, least, greatest = (f"{scale * figure[key]:,.{digits}f}" for key in ("median", "min", "max"))
    return median if figure["rounds"] == 1 else f"{median} [{least}–{greatest}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
