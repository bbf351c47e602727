"""Tables of the records that concern one server in its traffic: sweep, churn, offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from loadtest.derive import latency, layers_told, over_rounds, ratio, rounds_of, shown, table

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
            shown(over_rounds(points, latency("ttft", "p95")), scale=1000),
            shown(over_rounds(points, latency("tpot", "p50")), scale=1000),
            shown(over_rounds(points, latency("tpot", "p95")), scale=1000),
            shown(over_rounds(points, latency("itl", "p99")), scale=1000),
            shown(over_rounds(points, lambda figures: figures["tokens_per_second"])),
        ]
        for rate, points in sorted(by_rate.items())
    ]
    header = ["requests/s", "good", "goodput req/s", "TTFT p50 ms", "p95", "mean ITL p50 ms", "p95", "ITL p99 ms"]
    header.append("tokens/s")
    knee = record["knee"]["rate"]
    found = f"{knee:g} requests/s" if knee is not None else "below the lowest rate"
    return (
        f"Open loop, Poisson, {record['server']['num_adapters']} adapters ({given['popularity']}), "
        f"{given['prompt_tokens']} + {given['max_tokens']} tokens{layers_told(record)}; "
        f"{given['seconds']:g} s a rate. Good: TTFT at most "
        f"{_limit(given['ttft_limit_seconds'])}, a request's mean ITL at most {_limit(given['itl_limit_seconds'])}. "
        f"**Knee (at least {100 * given['share']:.0f} % good): {found}.**\n\n" + table(header, rows)
    )


def _limit(seconds: float | None) -> str:
    return "anything" if seconds is None else f"{1000 * seconds:g} ms"


def churn(record: Record) -> str:
    given, whole = record["parameters"], record["whole"]
    quiet, resident = rounds_of(record, "quiet"), rounds_of(record, "resident")
    p99 = latency("itl", "p99")
    names = {
        "quiet": "nothing",
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
        operations = sum(sum(figures["background"]["operations"].values()) for figures in own if figures)
        failures = sum(sum(figures["background"]["failures"].values()) for figures in own if figures)
        rows.append(
            [
                title,
                f"{1000 * latency('itl', 'p50')(whole[phase]):.1f}",
                f"{1000 * p99(whole[phase]):.1f}",
                "" if phase == "quiet" else f"{p99(whole[phase]) / p99(whole['quiet']):.2f}",
                "" if phase == "quiet" else shown(ratio(own, quiet, p99), digits=2),
                shown(ratio(own, resident, p99), digits=2) if phase == "load" else "",
                f"{sum(entry['loads'] for entry in counted):.0f}",
                f"{sum(entry['evictions'] for entry in counted):.0f}",
                f"{operations}" + (f" ({failures} failed)" if failures else ""),
            ]
        )
    header = ["beside the steady streams", "ITL p50 ms", "ITL p99 ms", "p99 / quiet", "of a round", "p99 / resident"]
    header += ["loads", "evictions", "operations"]
    gaps = min(figures["latency"]["itl_seconds"]["count"] for figures in whole.values())
    return (
        f"{given['steady']} steady streams, {given['prompt_tokens']} + {given['max_tokens']} tokens"
        f"{layers_told(record)}; {given['rounds']} rounds, {given['seconds']:g} s a phase, at least {gaps:,} gaps a "
        f"phase; {given['background_rate']:g} background requests/s of {given['background_prompt_tokens']} + 1 tokens; "
        f"room for {_room(record['server']['options'])}.\n\n" + table(header, rows)
    )


def _room(options: Sequence[str]) -> str:
    """What the server was told to keep of its adapters."""
    found = dict(pairwise(options))
    slots, host = found.get("--adapter-slots"), found.get("--adapter-host-bytes")
    told = [f"{slots} adapters on the device"] if slots else []
    told += [f"{host} of them on the host"] if host else []
    return ", ".join(told) or "as many adapters as the server keeps by itself"


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
