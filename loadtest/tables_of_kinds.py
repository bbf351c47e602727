"""The table of what each kind of adapter adds to a decode step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from loadtest.derive import median_interval, shown, table
from loadtest.figures import spread

Record = Mapping[str, Any]
CASES = ("distinct", "shared")


def kinds(record: Record) -> str:
    given, shape, rates = record["parameters"], record["parameters"]["shape"], record["rates"]
    rows = [
        [
            entry["title"],
            f"{entry['adapter_bytes'] / 1e6:,.2f}",
            *(cell for case in CASES for cell in _cells(record, entry, case)),
        ]
        for entry in record["kinds"]
    ]
    header = ["every row has", "MB an adapter"]
    few = max(1, given["rows"] // 4)
    for adapters in (given["rows"], few):
        header += [f"{adapters} adapters: added", "floor ms", "added / floor"]
    base = [1e3 * value for entry in record["kinds"] for value in _base_seconds(entry)]
    return (
        f"Decode steps of {given['rows']} rows at {given['context']} positions, {given['dtype']} "
        f"({given['instruction_set']}, {given['threads']} threads); a base of {shape['layers']} layers, "
        f"{shape['hidden']} wide, all linears of which have the adapter where nothing else is said. "
        f"{_base_told(base)}In this run memory was read at "
        f"{rates['read_bytes_per_second'] / 1e9:.1f} GB/s and a product in fp32 ran at "
        f"{rates['flops_per_second'] / 1e9:.0f} GFLOP/s. Added: median of neighbouring pairs of steps, and where that "
        f"median lies at 95 %; {_pairs_told(record)}.\n\n" + table(header, rows)
    )


def _base_told(milliseconds: Sequence[float]) -> str:
    if not milliseconds:
        return ""
    return f"The base's step takes {shown(spread(milliseconds), digits=1)} ms, median [least–greatest]. "


def _pairs_told(record: Record) -> str:
    counts = {
        is_vector: [
            len(added(entry, case).shares)
            for entry in record["kinds"]
            if entry["is_vector"] == is_vector
            for case in CASES
        ]
        for is_vector in (True, False)
    }
    told = [
        f"{min(found)} to {max(found)} pairs {'of vectors' if is_vector else 'of other kinds'}"
        for is_vector, found in counts.items()
        if found
    ]
    return ", ".join(told)


def _cells(record: Record, entry: Mapping[str, Any], case: str) -> list[str]:
    found = added(entry, case)
    floor = floor_seconds(record, entry, case)
    on = " of that" if entry["on"] else ""
    return [
        f"{found.told()} %{on}",
        f"{1e3 * floor:.2f}",
        f"{found.seconds / floor:.1f}" if found.seconds > 0 else "–",
    ]


class Added(NamedTuple):
    """What the steps of a kind took longer than their neighbours: ``shares`` of these, by pair."""

    shares: list[float]
    differences: list[float]
    reference: list[float]

    @property
    def share(self) -> float:
        return float(np.median(self.shares))

    @property
    def seconds(self) -> float:
        return float(np.median(self.differences))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the median share lies at 95 %, whatever the distribution; None for too few pairs."""
        return median_interval(self.shares)

    def told(self) -> str:
        """In per cent."""
        ends = self.interval
        return f"{100 * self.share:.1f}" + (f" [{100 * ends[0]:.1f}–{100 * ends[1]:.1f}]" if ends else "")


def added(entry: Mapping[str, Any], case: str) -> Added:
    steps = entry["step_seconds"][case]
    pairs = list(zip(steps["own"], steps["reference"], strict=True))
    return Added(
        [own / other - 1 for own, other in pairs], [own - other for own, other in pairs], list(steps["reference"])
    )


def _base_seconds(entry: Mapping[str, Any]) -> list[float]:
    """Steps of the base alone, of a kind that is held against it."""
    return [] if entry["on"] else [value for case in CASES for value in added(entry, case).reference]


def floor_seconds(record: Record, entry: Mapping[str, Any], case: str) -> float:
    """What must be read, or computed, beyond the reference: whichever takes longer."""
    rates = record["rates"]
    times = (
        entry["read_bytes"][case] / rates["read_bytes_per_second"],
        record["parameters"]["rows"] * entry["flops_of_row"] / rates["flops_per_second"],
    )
    return max(times)
