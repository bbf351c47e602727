"""Records into Markdown tables, and tables into ``docs/benchmarks.md``.

    python -m loadtest.tables            # writes the page's tables and plots from docs/benchmarks/*.json
    python -m loadtest.tables --check    # exits 1 where the page says something else than the records

The page holds places, ``<!-- record: NAME -->`` to ``<!-- end -->``; what stands between them comes from
``docs/benchmarks/NAME.json`` and from nowhere else. A place without a record says so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtest import tables_of_adapters, tables_of_kinds, tables_of_ours
from loadtest.derive import latency, over_rounds, ratio, rounds_of, shown, table, throughput

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RECORDS = ROOT / "docs" / "benchmarks"
PLACE = re.compile(r"(<!-- record: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_TAKEN = "*No record yet.*\n"
OURS = "deltaserve"
CASES = {
    "mixed": "every stream its own adapter",
    "uniform": "adapters drawn uniformly",
    "zipf": "adapters drawn by a Zipf law",
    "base": "the base alone",
    "single": "one stream, one adapter",
    "single-base": "one stream, the base",
}

Record = Mapping[str, Any]


def render(record: Record) -> str:
    """The record's tables, with the line that says where they come from. Raises ``ValueError`` for other kinds."""
    kinds: dict[str, Callable[[Record], str]] = {
        "compare": compare,
        "sweep": tables_of_ours.sweep,
        "churn": tables_of_ours.churn,
        "registered": tables_of_adapters.registered,
        "capacity": tables_of_adapters.capacity,
        "offline": tables_of_ours.offline,
        "kinds": tables_of_kinds.kinds,
    }
    if record.get("kind") not in kinds:
        raise ValueError(f"a record of kind {record.get('kind')!r} has no table; there are {', '.join(kinds)}")
    return f"{head(record)}\n{kinds[record['kind']](record)}"


def head(record: Record) -> str:
    machine, versions = record["machine"], record["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    memory = machine["memory_bytes"] / (1 << 30)
    return (
        f"Taken {record['taken_at']} on {machine['processor']}, {machine['cores']} cores, {memory:.0f} GiB, "
        f"{machine['system']}, Python {machine['python']} ({packages}); seed {record['seed']}.\n"
    )


def compare(record: Record) -> str:
    parts = [compare_case(record, case) for case in record["parameters"]["cases"]]
    parts.append(own_share(record))
    parts.append(compare_answers(record))
    parts.append(servers(record))
    return "\n".join(part for part in parts if part)


def compare_case(record: Record, case: str) -> str:
    loop = record["parameters"]["cases"][case]
    ours = rounds_of(record, OURS, case)
    rows = []
    for name, entry in record["servers"].items():
        own = rounds_of(record, name, case)
        tokens = over_rounds(own, throughput)
        if entry["status"] != "measured":
            rows.append([name, entry["status"], *["–"] * 5])
        elif tokens is not None or any(own):
            better, sooner = ratio(ours, own, throughput), ratio(own, ours, latency("ttft", "p50"))
            rows.append(
                [
                    name,
                    shown(tokens),
                    shown(over_rounds(own, latency("ttft", "p50")), scale=1000),
                    shown(over_rounds(own, latency("itl", "p50")), scale=1000, digits=1),
                    shown(over_rounds(own, latency("itl", "p99")), scale=1000, digits=1),
                    "" if name == OURS else shown(better, digits=2),
                    "" if name == OURS else shown(sooner, digits=2),
                ]
            )
    title = (
        f"**{case}**: {CASES[case]}; {loop['concurrency']} streams x {loop['requests_per_stream']} requests, "
        f"{loop['prompt_tokens']} + {loop['max_tokens']} tokens\n\n"
    )
    header = ["server", "tokens/s", "TTFT p50 ms", "ITL p50 ms", "ITL p99 ms", f"{OURS} / it", "its TTFT / ours"]
    return title + table(header, rows)


def own_share(record: Record) -> str:
    """Mixed throughput as a share of the same server's base throughput: what adapters cost each of them."""
    if not {"mixed", "base"} <= set(record["parameters"]["cases"]):
        return ""
    rows = []
    for name in record["servers"]:
        found = ratio(rounds_of(record, name, "mixed"), rounds_of(record, name, "base"), throughput)
        if found is not None:
            rows.append([name, shown(found, digits=2)])
    return "**Mixed adapters against its own base traffic**\n\n" + table(["server", "mixed / base"], rows)


def compare_answers(record: Record) -> str:
    """Answers under load against the same request alone, and how far other servers' answers begin like ours."""
    rows = []
    for name in record["servers"]:
        for case in ("mixed", "base"):
            alone = [figures["alone"] for figures in rounds_of(record, name, case) if figures and "alone" in figures]
            checked = sum(entry["checked"] for entry in alone)
            different = sum(entry["different"] for entry in alone)
            shares = [entry.get("agreement", {}).get(case, {}).get(name) for entry in record["rounds"]]
            known = [share for share in shares if share is not None]
            if checked or known:
                same = f"{checked - different} of {checked}" if checked else "–"
                rows.append([name, case, same, f"{100 * sum(known) / len(known):.0f} %" if known else ""])
    if not rows:
        return ""
    header = ["server", "case", "answers under load equal to the answer alone", "common beginning with ours"]
    return "**Answers**\n\n" + table(header, rows)


def servers(record: Record) -> str:
    lines = []
    for name, entry in record["servers"].items():
        if entry["status"] == "not present":
            lines.append(f"- {name}: not present ({entry['reason']})\n")
            continue
        version = entry.get("version", {})
        told = ", ".join(f"{key} {value}" for key, value in version.items() if key != "base_fingerprint")
        options = f"; options `{' '.join(entry['options'])}`" if entry.get("options") else ""
        failed = f"; failed in {len(entry['failures'])} rounds" if entry.get("failures") else ""
        lines.append(f"- {name}: {told or 'version unknown'}{options}{failed}\n")
    return "".join(lines)


def page_with_records(page: str, records: Path) -> str:
    """The page with every place filled from its record. Raises ``ValueError`` for a record that no place shows."""
    places = [match.group(2) for match in PLACE.finditer(page)]
    unseen = sorted({path.stem for path in records.glob("*.json")} - set(places))
    if unseen:
        raise ValueError(f"no place of the page shows {', '.join(unseen)}; add <!-- record: {unseen[0]} --> to it")

    def fill(match: re.Match[str]) -> str:
        file = records / f"{match.group(2)}.json"
        body = NOT_TAKEN
        if file.exists():
            body = render(json.loads(file.read_text(encoding="utf-8")))
            for plot in sorted(records.glob(f"{match.group(2)}-*.png")):
                title = plot.stem.removeprefix(f"{match.group(2)}-").replace("_", " ")
                body += f"\n![{title}](benchmarks/{plot.name})\n"
        return f"{match.group(1)}{body}{match.group(3)}"

    return PLACE.sub(fill, page)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.tables", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the page is not up to date")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments().parse_args(argv)
    before = PAGE.read_text(encoding="utf-8")
    if not given.check:
        from loadtest.plots_of_adapters import draw_all

        for file in sorted(RECORDS.glob("*.json")):
            draw_all(json.loads(file.read_text(encoding="utf-8")), RECORDS, file.stem)
    try:
        after = page_with_records(before, RECORDS)
    except (ValueError, KeyError) as problem:
        print(f"loadtest: {problem}", file=sys.stderr)
        return 1
    if given.check:
        if before != after:
            print(f"loadtest: {PAGE.name} differs from its records; run python -m loadtest.tables", file=sys.stderr)
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
