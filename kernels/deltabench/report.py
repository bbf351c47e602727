"""The record of a run (JSON) and its table (Markdown), from the journal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deltabench.goals import all_goals
from deltabench.journal import Entry

FORMAT = 1
RATES = ("copy_bytes_per_second", "gemm_flops_per_second", "launch_us", "dtype")


def make_record(head: Mapping[str, Any], outcomes: Sequence[Any], entries: Sequence[Entry]) -> dict[str, Any]:
    """All of a run: benchmark, format, commit, started, dry_run, machine, versions, rates, sections, results, goals."""
    results = [entry for entry in entries if entry["kind"] not in ("started", "rates")]
    rates: dict[str, Any] = next((dict(entry) for entry in entries if entry["kind"] == "rates"), {})
    return {
        "benchmark": "gpu",
        "format": FORMAT,
        **head,
        "machine": rates.get("machine"),
        "versions": rates.get("versions"),
        "rates": {name: rates.get(name) for name in RATES},
        "sections": [asdict(outcome) for outcome in outcomes],
        "results": results,
        "goals": [asdict(goal) for goal in all_goals(results, bool(head.get("dry_run")))],
    }


def exit_status(record: Mapping[str, Any]) -> int:
    """1 when a test failed, a section broke, something of ours failed, or a result of ours or of a baseline is wrong.

    A competitor that fails here, and one of another project that is wrong, is left out of comparisons and listed.
    """
    broken = any(section["status"] == "broken" for section in record["sections"])
    failed = any(e["status"] == "failed" and e.get("origin", "ours") == "ours" for e in record["results"])
    wrong = any(e["status"] == "wrong" and e.get("origin") != "vendor" for e in record["results"])
    return int(broken or failed or wrong)


def file_stem(record: Mapping[str, Any]) -> str:
    """gpu-<card>-<date>."""
    name = (record["machine"] or {}).get("gpu") or "host"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"gpu-{'dry-run' if record['dry_run'] else slug}-{str(record['started'])[:10]}"


def write(json_path: Path, table_path: Path, record: Mapping[str, Any], table: str) -> None:
    """The table first, the record last: a record that exists is whole."""
    table_path.write_text(table, encoding="utf-8")
    json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def render(record: Mapping[str, Any]) -> str:
    """The Markdown page of a record."""
    parts = [_head(record), _sections(record), _goals(record), _steps(record)]
    parts += [_kernels(record, kind, title) for kind, title in (("lora", "Low-rank"), ("sparse", "Sparse, 0.5 %"))]
    parts.append(_absent(record))
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(record: Mapping[str, Any]) -> str:
    machine, versions, rates = record["machine"] or {}, record["versions"] or {}, record["rates"]
    title = "# GPU benchmark" + (" (dry run: no figures)" if record["dry_run"] else "")
    lines = [title, "", f"{record['started']}, commit {record['commit'] or 'unknown'}.", ""]
    card = machine.get("gpu") or f"no GPU, {machine.get('processor', 'unknown')}"
    lines.append(f"{card}; driver {machine.get('driver')}; {machine.get('system')}.")
    lines.append(", ".join(f"{name} {version}" for name, version in versions.items() if version) + ".")
    if rates["copy_bytes_per_second"]:
        lines.append(
            f"Measured in this run: copy {rates['copy_bytes_per_second'] / 1e12:.3f} TB/s, "
            f"{rates['dtype']} GEMM {rates['gemm_flops_per_second'] / 1e12:.1f} TFLOP/s. Floors are made of these."
        )
    if rates["launch_us"]:
        lines.append(f"One more small kernel in a graph: {rates['launch_us']:.2f} us.")
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _sections(record: Mapping[str, Any]) -> str:
    rows = [(s["name"], s["status"], f"{s['seconds']:.0f}", s["reason"]) for s in record["sections"]]
    return "## Sections\n\n" + _table(("section", "status", "s", "why"), rows)


def _goals(record: Mapping[str, Any]) -> str:
    rows = [(g["number"], g["measure"], g["goal"], g["measured"], g["verdict"]) for g in record["goals"]]
    return "## Goals\n\n" + _table(("#", "measure", "goal", "measured", "verdict"), rows)


def _steps(record: Mapping[str, Any]) -> str:
    steps = [entry for entry in record["results"] if entry["kind"] == "step"]
    if not steps:
        return ""
    head = (
        "step",
        "graph ms",
        "whole ms",
        "eager ms",
        "floor ms",
        "/ floor",
        "added",
        "floor's",
        "nodes / layer",
        "status",
    )
    rows = [
        (
            entry.get("point", entry["key"]),
            *(_number(entry.get(name), 3) for name in ("graph_ms", "whole_ms", "eager_ms", "floor_ms")),
            _number(entry.get("over_floor"), 2),
            _percent(entry.get("overhead")),
            _percent(entry.get("floor_overhead")),
            _number(entry.get("nodes_per_layer"), 1),
            entry["status"] if entry["status"] == "ok" else f"{entry['status']}: {entry['reason']}",
        )
        for entry in steps
    ]
    note = "Graph: replay alone. Whole: with the host's part. Added: by adapters, over the base."
    return f"## Whole decode step\n\n{note}\n\n" + _table(head, rows)


def _kernels(record: Mapping[str, Any], kind: str, title: str) -> str:
    entries = [entry for entry in record["results"] if entry["kind"] == kind and "group" in entry]
    if not entries:
        return ""
    names = list(dict.fromkeys(entry["implementation"] for entry in entries))
    cases: dict[tuple[str, str], dict[str, Entry]] = {}
    for entry in entries:
        cases.setdefault((entry["point"], entry["group"]), {})[entry["implementation"]] = entry
    rows = []
    for (point, group), found in cases.items():
        any_entry = next((entry for entry in found.values() if "base_us" in entry), next(iter(found.values())))
        base, floor = any_entry.get("base_us"), any_entry["floor_us"]
        over = "" if base is None else f" ({base / any_entry['base_floor_us']:.2f})"
        rows.append(
            (point, group, _number(base, 1) + over, _number(floor, 2), *(_cell(found.get(name)) for name in names))
        )
    note = "Microseconds that adapters add to the base's product, and (times their floor). Point: (T, G, r)."
    table = _table(("point", "linear", "base", "floor", *names), rows)
    return f"## {title}\n\n{note}\n\n{table}{_nodes(cases, names)}"


def _nodes(cases: Mapping[tuple[str, str], Mapping[str, Entry]], names: Sequence[str]) -> str:
    """What each adds to a captured layer, over the first point that has every linear."""
    point = next(iter(cases))[0]
    told = []
    for name in names:
        found = [entries.get(name, {}).get("nodes") for (where, _), entries in cases.items() if where == point]
        known = [count for count in found if count is not None]
        if known and len(known) == len(found):
            told.append(f"{name} {sum(known):.0f}")
    return f"\n\nGraph nodes added per layer at {point}: {', '.join(told)}." if told else ""


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return ""
    if entry["status"] != "ok" or entry.get("added_us") is None:
        return str(entry["status"])
    queued = "" if entry["clock"] != "queued launches" else "*"
    return f"{entry['added_us']:.1f} ({entry['over_floor']:.1f}){queued}"


def _absent(record: Mapping[str, Any]) -> str:
    """Every reason why a figure is missing, once."""
    reasons: dict[str, int] = {}
    for entry in record["results"]:
        if entry["status"] != "ok":
            line = f"{entry.get('implementation', entry['key'])}: {entry['status']}: {entry['reason']}"
            reasons[line] = reasons.get(line, 0) + 1
    if not reasons:
        return ""
    lines = [f"- {line}" + (f" ({count} times)" if count > 1 else "") for line, count in reasons.items()]
    return "## Not measured\n\n`*`: launched one by one, not from a graph.\n\n" + "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
