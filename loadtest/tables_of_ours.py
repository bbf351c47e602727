"""Tables of the records that concern one server: sweep, churn, capacity, offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loadtest.derive import latency, over_rounds, ratio, rounds_of, shown, table, throughput

Record = Mapping[str, Any]


def sweep(record: Record) -> str:
    given = record["parameters"]
    by_rate: dict[float, list[Mapping[str, Any]]] = {}
    for point in record["points"]:
        by_rate.setdefault(point["rate"], []).append(point)
    rows = [
        [
            f"{rate:g}",
            shown(over_rounds(points, lambda figures: figures["goodput"]["share"]), scale=100) + " %",
            shown(over_rounds(points, lambda figures: figures["goodput"]["requests_per_second"]), digits=1),
            shown(over_rounds(points, latency("ttft", "p50")), scale=1000),
            shown(over_rounds(points, latency("ttft", "p99")), scale=1000),
            shown(over_rounds(points, latency("itl", "p50")), scale=1000, digits=1),
            shown(over_rounds(points, latency("itl", "p99")), scale=1000, digits=1),
            shown(over_rounds(points, lambda figures: figures["tokens_per_second"])),
        ]
        for rate, points in sorted(by_rate.items())
    ]
    header = ["requests/s", "good", "goodput req/s", "TTFT p50 ms", "p99", "ITL p50 ms", "p99", "tokens/s"]
    knee = record["knee"]["rate"]
    found = f"{knee:g} requests/s" if knee is not None else "below the lowest rate"
    return (
        f"Open loop, Poisson, {record['server']['num_adapters']} adapters ({given['popularity']}), "
        f"{given['prompt_tokens']} + {given['max_tokens']} tokens, {given['seconds']:g} s a rate. Good: TTFT at most "
        f"{_limit(given['ttft_limit_seconds'])}, mean ITL at most {_limit(given['itl_limit_seconds'])}. "
        f"**Knee (at least {100 * given['share']:.0f} % good): {found}.**\n\n" + table(header, rows)
    )


def _limit(seconds: float | None) -> str:
    return "anything" if seconds is None else f"{1000 * seconds:g} ms"


def churn(record: Record) -> str:
    given = record["parameters"]
    quiet, resident = rounds_of(record, "quiet"), rounds_of(record, "resident")
    names = {
        "quiet": "quiet",
        "resident": "requests to one resident adapter",
        "load": f"the same requests to {given['other_adapters']} adapters in turn",
        "upload": "register, replace, delete over HTTP",
    }
    rows = []
    for phase, title in names.items():
        own = rounds_of(record, phase)
        if not any(own):
            continue
        counted = [figures["counted"] for figures in own if figures]
        operations = [sum(figures["background"]["operations"].values()) for figures in own if figures]
        failures = sum(sum(figures["background"]["failures"].values()) for figures in own if figures)
        rows.append(
            [
                title,
                shown(over_rounds(own, latency("itl", "p50")), scale=1000, digits=1),
                shown(over_rounds(own, latency("itl", "p99")), scale=1000, digits=1),
                "" if phase == "quiet" else shown(ratio(own, quiet, latency("itl", "p99")), digits=2),
                shown(ratio(own, resident, latency("itl", "p99")), digits=2) if phase == "load" else "",
                _mean([entry["adapter_loads_total"] for entry in counted]),
                _mean([entry["adapter_evictions_total"] for entry in counted]),
                _mean(operations) + (f" ({failures} failed)" if failures else ""),
            ]
        )
    header = ["beside the steady stream", "ITL p50 ms", "ITL p99 ms", "p99 / quiet", "p99 / resident"]
    header += ["loads", "evictions", "operations"]
    return (
        f"{given['steady']} steady streams, {given['prompt_tokens']} + {given['max_tokens']} tokens, "
        f"{given['seconds']:g} s a phase; {given['background_rate']:g} background requests/s of "
        f"{given['background_prompt_tokens']} + 1 tokens; loads, evictions and operations are means a phase.\n\n"
        + table(header, rows)
    )


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.0f}"


def capacity(record: Record) -> str:
    given = record["parameters"]
    base = rounds_of(record, "base")
    parts = []
    for axis, title in (("adapters", "Distinct adapters in the traffic"), ("rank", "Rank of every adapter")):
        points = [point for point in record["points"] if point["axis"] == axis]
        if axis == "rank" and not points:
            continue
        if axis == "rank":
            points = [point for point in record["points"] if point["name"] == "base"] + points
        rows = []
        for point in points:
            own = rounds_of(record, point["name"])
            size = point["adapter_bytes"]
            rows.append(
                [
                    point["name"],
                    f"{point['mean_rank']:g}",
                    f"{size / 1e6:.2f}" if size else "–",
                    shown(over_rounds(own, throughput)),
                    shown(over_rounds(own, latency("itl", "p50")), scale=1000, digits=1),
                    "" if point["name"] == "base" else shown(ratio(own, base, throughput), digits=2),
                    "" if point["name"] == "base" else shown(ratio(own, base, latency("itl", "p50")), digits=2),
                ]
            )
        header = ["traffic", "mean rank", "MB an adapter", "tokens/s", "ITL p50 ms", "tokens/s / base", "ITL / base"]
        parts.append(f"**{title}**\n\n" + table(header, rows))
    intro = (
        f"Closed loop, {given['concurrency']} streams, {given['prompt_tokens']} + {given['max_tokens']} tokens; "
        f"{record['server']['num_adapters']} adapters registered.\n\n"
    )
    return intro + "\n".join(parts)


def offline(record: Record) -> str:
    """The throughput of both sides, and, where the record has it, the CPU time that a token takes of each process."""
    given = record["parameters"]
    rounds = record["rounds"]
    sides = {name: rounds_of(record, name) for name in ("offline", "http")}
    per_second = {name: over_rounds(own, lambda figures: figures["tokens_per_second"]) for name, own in sides.items()}
    kept = ratio(sides["http"], sides["offline"], lambda figures: figures["tokens_per_second"])
    rows = [["tokens/s", shown(per_second["offline"]), shown(per_second["http"]), shown(kept, digits=2)]]

    def cpu(name: str) -> str:
        return shown(over_rounds(rounds, lambda each: each["cpu_us_per_token"][name]))

    def share(name: str) -> str:
        return shown(over_rounds(rounds, lambda each: each[name]), scale=100, digits=1) + " %"

    told = ""
    if all("cpu_us_per_token" in each for each in rounds):
        kept_of_cpu = shown(over_rounds(rounds, lambda each: 1 - each["cpu_cost"]), digits=2)
        rows += [
            ["CPU µs a token", cpu("offline"), cpu("server"), kept_of_cpu],
            ["of it the event loop's thread", "", cpu("event_loop"), ""],
            ["beside it the client's", "", cpu("client"), ""],
        ]
        client = shown(over_rounds(rounds, lambda each: each["client_share_of_a_core"]), digits=2)
        told = (
            f" **HTTP took {share('cpu_cost')} of the server's CPU time and {share('cost')} of the throughput**, the "
            f"client's share of the cores included ({client} of one core); {share('waiting')} of the throughput "
            "was lost beyond the growth of CPU time per token."
        )
    base = "the embedded base" if given.get("base") == "embedded" else f"{given['num_adapters']} adapters"
    return (
        f"{given['concurrency']} streams, {given['prompt_tokens']} + {given['max_tokens']} tokens, {base}.{told}\n\n"
        + table(["", "engine alone", "over HTTP, streamed", "share kept"], rows)
    )
