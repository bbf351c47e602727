"""Tables of what adapters cost: how many are registered, how many are asked, of which popularity and rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loadtest.derive import (
    Line,
    latency,
    layers_told,
    line,
    median_interval,
    over_rounds,
    ratio,
    ratios,
    rounds_of,
    shown,
    table,
    throughput,
)
from loadtest.figures import spread

Record = Mapping[str, Any]
Point = Mapping[str, Any]


def registered(record: Record) -> str:
    given = record["parameters"]
    none = rounds_of(record, "none")
    names = {
        "none": "none",
        "none again": "none, a second server",
        "adapters": f"{given['num_adapters']:,}, {given['num_resident']:,} of them resident",
    }
    rows = []
    for name, title in names.items():
        own = rounds_of(record, name)
        found = [over_rounds(own, throughput), over_rounds(own, latency("itl", "p50"))]
        rows.append([title, shown(found[0]), shown(found[1], scale=1000, digits=2)])
        for get in (throughput, latency("itl", "p50")):
            rows[-1] += ["", ""] if name == "none" else _told_of(ratios(own, none, get))
    header = ["adapters registered", "tokens/s", "ITL p50 ms", "tokens/s / none", "95 %", "ITL p50 / none", "95 %"]
    return (
        f"Base-only traffic, closed loop, {given['concurrency']} streams x {given['requests_per_stream']} requests, "
        f"{given['prompt_tokens']} + {given['max_tokens']} tokens; a base of {given['layers']} layers, adapters of "
        f"rank {', '.join(map(str, given['ranks']))}. {len(record['rounds'])} rounds over {given['starts']} starts of "
        "the three servers; 95 %: where the median of the ratio lies.\n\n" + table(header, rows)
    )


def _told_of(values: Sequence[float]) -> list[str]:
    if not values:
        return [shown(None), ""]
    interval = median_interval(values)
    within = f"{interval[0]:.3f}–{interval[1]:.3f}" if interval else "too few rounds"
    return [shown(spread(values), digits=3), within]


def capacity(record: Record) -> str:
    given = record["parameters"]
    intro = (
        f"Closed loop, {given['concurrency']} streams x {given['requests_per_stream']} requests, "
        f"{given['prompt_tokens']} + {given['max_tokens']} tokens; {record['server']['num_adapters']:,} adapters "
        f"registered{layers_told(record)}; {len(record['rounds'])} rounds.\n\n"
    )
    parts = [part(record) for part in (adapters_asked, ranks) if points_on(record, part.__name__)]
    return intro + "\n".join(parts)


def points_on(record: Record, axis: str) -> list[Point]:
    axis = {"adapters_asked": "adapters", "ranks": "rank"}.get(axis, axis)
    return [point for point in record["points"] if point["axis"] == axis]


def adapters_asked(record: Record) -> str:
    """One row for each number of adapters, one column for each law of popularity."""
    laws, base = record["parameters"]["laws"], rounds_of(record, "base")
    points = {(point["adapters"], point["law"]): point["name"] for point in points_on(record, "adapters")}
    rows = [["the base alone", shown(over_rounds(base, throughput)), *[""] * (2 * len(laws) - 1)]]
    for count in sorted({count for count, _ in points}):
        rounds = [rounds_of(record, points[count, law]) if (count, law) in points else [] for law in laws]
        rows.append(
            [
                f"{count:,}",
                *(shown(over_rounds(own, throughput)) for own in rounds),
                *(shown(ratio(own, base, throughput), digits=2) if own else "–" for own in rounds),
            ]
        )
    told = [f"Zipf {record['parameters']['zipf_s']:g}" if law == "zipf" else law for law in laws]
    header = ["adapters in the traffic", *(f"{law}, tokens/s" for law in told), *(f"{law} / base" for law in told)]
    return table(header, rows)


def ranks(record: Record) -> str:
    base, itl = rounds_of(record, "base"), latency("itl", "p50")
    points = points_on(record, "rank")
    rows = [["the base alone", "0", "–", shown(over_rounds(base, throughput)), _ms(over_rounds(base, itl)), "", ""]]
    fitted, sizes = fits(record)
    for point in points:
        own = rounds_of(record, point["name"])
        size, by_line = point["adapter_bytes"], fitted.at(point["rank_sum"]) if fitted else None
        rows.append(
            [
                point["name"],
                f"{point['rank_sum']:,}",
                f"{size / 1e6:.2f}" if size else "–",
                shown(over_rounds(own, throughput)),
                _ms(over_rounds(own, itl)),
                shown(ratio(own, base, itl), digits=2),
                f"{by_line:.2f}" if by_line else "–",
            ]
        )
    header = [
        "adapters in the traffic",
        "rank sum",
        "MB an adapter",
        "tokens/s",
        "ITL p50 ms",
        "ITL / base",
        "by the line",
    ]
    return table(header, rows) + _lines(record, fitted, sizes)


def fits(record: Record) -> tuple[Line | None, Line | None]:
    """Time of a step over the base's, and bytes of the adapters in the traffic, each against the sum of their ranks.

    Drawn through the points of one rank: what is mixed is foretold by it.
    """
    base, itl = rounds_of(record, "base"), latency("itl", "p50")
    known = []
    for point in points_on(record, "rank"):
        found = ratio(rounds_of(record, point["name"]), base, itl)
        if point["rank"] is not None and found is not None:
            known.append((point["rank_sum"], float(found["median"]), point["adapter_bytes"], point["mean_rank"]))
    time = line([each[0] for each in known], [each[1] for each in known])
    sized = [each for each in known if each[2]]
    return time, line([each[3] for each in sized], [each[2] for each in sized])


def _lines(record: Record, time: Line | None, size: Line | None) -> str:
    told = []
    if time is not None:
        told.append(
            f"The line through the points of one rank: ITL / base = {time.at_zero:.2f} + {1000 * time.slope:.2f} per "
            f"1,000 of rank sum, R² {time.r_squared:.3f}."
        )
        greatest = max(point["rank"] or 0 for point in points_on(record, "rank"))
        if any(point["rank"] is None for point in points_on(record, "rank")):
            padded = time.at(greatest * record["parameters"]["concurrency"])
            told.append(f"If rows were padded to rank {greatest}, every mix would cost {padded:.2f}.")
    if size is not None:
        told.append(f"Bytes: {size.slope / 1e6:.3f} MB for each rank of an adapter, R² {size.r_squared:.3f}.")
    return f"\n{' '.join(told)}\n" if told else ""


def _ms(figure: Mapping[str, float | int] | None) -> str:
    return shown(figure, scale=1000, digits=1)
