"""Goals over made-up figures: each is met, missed by one short figure, and not measured when a figure is absent."""

from __future__ import annotations

from typing import Any

import pytest

from deltabench import goals, report
from deltabench.goals import GROUPS, VLLM
from deltabench.points import DECODE_POINTS, EQUAL_BYTES, FEW_ACTIVE, MIXED, PREFILL_POINT


def kernel(kind: str, point: str, group: str, implementation: str, added: float, **fields: Any) -> dict[str, Any]:
    origin = {"two launches": "ours", "one launch": "ours", "prefill form": "ours", "sparse kernel": "ours"}
    entry = {"kind": kind, "key": f"{kind} {point} {group} {implementation}", "status": "ok", "reason": ""}
    entry |= {"point": point, "group": group, "implementation": implementation, "added_us": added, "floor_us": 10.0}
    return entry | {"origin": origin.get(implementation, "vendor"), "base_us": 100.0, **fields}


def step(point: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "step", "key": f"step {point}", "status": "ok", "reason": "", "point": point, **fields}


def good_run() -> list[dict[str, Any]]:
    """A run that meets every goal; ``one launch`` is the better form."""
    entries: list[dict[str, Any]] = []
    for group in GROUPS:
        for point in (*DECODE_POINTS, FEW_ACTIVE, MIXED, EQUAL_BYTES):
            entries.append(kernel("lora", point.name, group, "one launch", 12.0))
            entries.append(kernel("lora", point.name, group, "two launches", 14.0))
            entries.append(kernel("lora", point.name, group, VLLM, 40.0))
            entries.append(kernel("lora", point.name, group, "SGLang csgmv", 20.0))
        entries.append(kernel("lora", PREFILL_POINT.name, group, "prefill form", 11.0))
        for point in ("(64,64,0)", "(256,256,0)"):
            entries.append(kernel("sparse", point, group, "sparse kernel", 13.0))
            entries.append(kernel("sparse", point, group, "merge and GEMM", 80.0))
            entries.append(kernel("sparse", point, group, "torch CSR loop", 60.0))
    entries += [step(f"base T={rows}", over_floor=1.2) for rows in (1, 16, 64)]
    overheads = {"(1,1,16)": 0.03, "(16,16,16)": 0.15, "(64,64,16)": 0.5, "(256,32,16)": 0.3}
    entries += [step(point, overhead=share, added_ms=0.1, nodes_per_layer=4.0) for point, share in overheads.items()]
    entries.append(step("(64,64,16) on q, v", overhead=0.09))
    entries.append(step("base rows on an adapter server, T=64", over_base=1.002))
    entries.append(step("(64,1,16), one row of 64", added_ms=0.11))
    entries.append({"kind": "metadata", "key": "metadata", "status": "ok", "reason": "", "median_us": 8.0})
    repeat = {"kind": "repeatability", "key": "repeatability", "status": "ok", "reason": ""}
    entries.append({**repeat, "alone": True, "replay": True})
    return entries


def verdicts(entries: list[dict[str, Any]], dry_run: bool = False) -> dict[str, str]:
    return {f"{goal.number} {goal.measure}": goal.verdict for goal in goals.all_goals(entries, dry_run)}


def test_a_good_run_meets_every_goal() -> None:
    found = verdicts(good_run())
    assert set(found.values()) == {"met"}, found


def test_nothing_is_measured_by_a_dry_run_or_by_nothing() -> None:
    assert set(verdicts(good_run(), dry_run=True).values()) == {"not measured"}
    assert set(verdicts([]).values()) == {"not measured"}


def matches(entry: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(entry.get(name) == value for name, value in wanted.items())


SHORT: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("base ", {"point": "base T=16"}, {"over_floor": 1.3}),
    ("1 share of memory speed, large", {"point": "(64,64,64)", "group": "down", "origin": "ours"}, {"added_us": 12.6}),
    (
        "1 share of memory speed, small",
        {"point": "(64,64,16)", "group": "gate_up", "origin": "ours"},
        {"added_us": 15.0},
    ),
    ("2 speed", {"point": "(1,1,16)", "group": "o", "implementation": VLLM}, {"added_us": 12.5}),
    ("2 the same, 8", {"point": FEW_ACTIVE.name, "implementation": VLLM}, {"added_us": 34.0}),
    ("2 the same, ranks", {"point": MIXED.name, "implementation": VLLM}, {"added_us": 28.0}),
    ("3 ", {"point": "(1,1,16)", "group": "o", "origin": "vendor"}, {"added_us": 11.0}),
    ("4 decode step, added", {"point": "(64,64,16)", "kind": "step"}, {"overhead": 0.53}),
    ("4 decode step, 64", {"point": "(64,64,16) on q, v"}, {"overhead": 0.11}),
    ("5 ", {"point": "(64,64,16)", "kind": "step"}, {"nodes_per_layer": 8.0}),
    ("6 ", {"point": MIXED.name, "group": "qkv", "implementation": "one launch"}, {"added_us": 13.4}),
    ("7 base-only", {"point": "base rows on an adapter server, T=64"}, {"over_base": 1.03}),
    ("7 one", {"point": "(64,1,16), one row of 64"}, {"added_ms": 0.2}),
    ("8 ", {"implementation": "prefill form"}, {"added_us": 12.5}),
    ("9 sparse 0.5 %: share", {"point": "(256,256,0)", "implementation": "sparse kernel"}, {"added_us": 15.0}),
    ("9 sparse 0.5 %: speed", {"point": "(64,64,0)", "implementation": "torch CSR loop"}, {"added_us": 30.0}),
    ("10 ", {"kind": "metadata"}, {"median_us": 16.0}),
    ("11 ", {"kind": "repeatability"}, {"alone": False}),
]


@pytest.mark.parametrize(("goal", "where", "change"), SHORT, ids=lambda value: str(value)[:40])
def test_one_short_figure_misses_its_goal(goal: str, where: dict[str, Any], change: dict[str, Any]) -> None:
    entries = [{**entry, **change} if matches(entry, where) else entry for entry in good_run()]
    assert entries != good_run()
    missed = [name for name, verdict in verdicts(entries).items() if verdict == "missed"]
    assert any(name.startswith(goal) for name in missed), missed


@pytest.mark.parametrize(("goal", "where", "change"), SHORT, ids=lambda value: str(value)[:40])
def test_an_absent_figure_leaves_its_goal_unmeasured(goal: str, where: dict[str, Any], change: dict[str, Any]) -> None:
    entries = [entry for entry in good_run() if not matches(entry, where)]
    found = [verdict for name, verdict in verdicts(entries).items() if name.startswith(goal)]
    assert "not measured" in found


def test_a_wrong_result_is_no_figure() -> None:
    entries = [
        {**entry, "status": "wrong"} if entry.get("implementation") == "SGLang csgmv" else entry for entry in good_run()
    ]
    row = next(goal for goal in goals.all_goals(entries) if goal.number == "3")
    assert "SGLang" not in row.measure
    assert VLLM in row.measure


def record_of(entries: list[dict[str, Any]], sections: tuple[str, ...] = ("ok",)) -> dict[str, Any]:
    head = {"commit": None, "started": "2026-01-02T03:04:05+00:00", "dry_run": False}
    record = report.make_record(head, [], entries)
    record["sections"] = [{"name": "lora", "status": status, "seconds": 1.0, "reason": ""} for status in sections]
    return record


def test_missed_goals_do_not_fail_a_run() -> None:
    slow = [{**entry, "added_us": 1e6} if entry.get("origin") == "ours" else entry for entry in good_run()]
    record = record_of(slow)
    assert any(goal["verdict"] == "missed" for goal in record["goals"])
    assert report.exit_status(record) == 0


@pytest.mark.parametrize(
    ("origin", "status", "expected"),
    [
        ("ours", "wrong", 1),
        ("ours", "failed", 1),
        ("baseline", "wrong", 1),
        ("baseline", "failed", 0),
        ("vendor", "wrong", 0),
        ("vendor", "failed", 0),
        ("ours", "not present", 0),
        ("ours", "skipped", 0),
        (None, "failed", 1),
    ],
)
def test_exit_status(origin: str | None, status: str, expected: int) -> None:
    entry = kernel("lora", "(1,1,16)", "o", "someone", 1.0)
    entry |= {"status": status, "reason": "because"}
    del entry["origin"]
    if origin is not None:
        entry["origin"] = origin
    assert report.exit_status(record_of([entry])) == expected
    assert report.exit_status(record_of([], ("ok", "broken"))) == 1
    assert report.exit_status(record_of([], ("ok", "skipped"))) == 0


def test_the_table_shows_every_case_and_reason() -> None:
    entries = good_run()
    entries.append({**kernel("lora", "(1,1,16)", "o", "late", 1.0), "status": "skipped", "reason": "no time"})
    for entry in entries:
        if entry["kind"] in ("lora", "sparse"):
            entry |= {"over_floor": 1.2, "base_floor_us": 90.0, "clock": "cuda graph", "nodes": 2.0}
    table = report.render(record_of(entries))
    assert "| (64,64,64) | gate_up | 100.0 (1.11) | 10.00 | 12.0 (1.2) |" in table
    assert "late: skipped: no time" in table
    assert "Graph nodes added per layer at (64,64,16): one launch 8, two launches 8" in table
    assert table.count("| met |") == len(goals.all_goals(entries))
