"""The table of what each kind of adapter adds to a decode step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loadtest.derive import shown, table
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
    base = [1e3 * value for entry in record["kinds"] for value in entry["step_seconds"]["base"]]
    return (
        f"Decode steps of {given['rows']} rows at {given['context']} positions, {given['dtype']} "
        f"({given['instruction_set']}, {given['threads']} threads); a base of {shape['layers']} layers, "
        f"{shape['hidden']} wide, all linears of which have the adapter where nothing else is said. The base's step "
        f"takes {shown(spread(base), digits=1)} ms. In this run memory was read at "
        f"{rates['read_bytes_per_second'] / 1e9:.1f} GB/s and a product in fp32 ran at "
        f"{rates['flops_per_second'] / 1e9:.0f} GFLOP/s. Ratios are of neighbouring steps: median "
        f"[least–greatest].\n\n" + table(header, rows)
    )


def _cells(record: Record, entry: Mapping[str, Any], case: str) -> list[str]:
    found = added(entry, case)
    floor = floor_seconds(record, entry, case)
    seconds = spread(found["seconds"])["median"]
    on = " of that" if entry["on"] else ""
    return [
        f"{shown(spread(found['share']), scale=100, digits=1)} %{on}",
        f"{1e3 * floor:.2f}",
        f"{seconds / floor:.1f}" if seconds > 0 else "–",
    ]


def added(entry: Mapping[str, Any], case: str) -> dict[str, list[float]]:
    """``seconds`` of each round that the kind's step took longer than its reference, and ``share`` of the reference."""
    steps = entry["step_seconds"]
    reference = steps[f"{case} reference"] if entry["on"] else steps["base"]
    pairs = list(zip(steps[case], reference, strict=True))
    return {"seconds": [own - other for own, other in pairs], "share": [own / other - 1 for own, other in pairs]}


def floor_seconds(record: Record, entry: Mapping[str, Any], case: str) -> float:
    """What must be read, or computed, beyond the reference: whichever takes longer."""
    rates = record["rates"]
    times = (
        entry["read_bytes"][case] / rates["read_bytes_per_second"],
        record["parameters"]["rows"] * entry["flops_of_row"] / rates["flops_per_second"],
    )
    return max(times)
