"""One JSON record per run, and a PNG drawn from that record alone."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.client import Answer, RunResult
from loadtest.correctness import Correctness
from loadtest.workload import Workload

PERCENTILES = (50, 90, 95, 99)
SATURATED_LAG_SECONDS = 0.25
"""Past this lag of its own event loop the client, not the server, shapes the latencies."""


def percentiles(seconds: Sequence[float]) -> dict[str, float | int]:
    """p50, p90, p95, p99 and the mean, in seconds; only ``count`` when there is nothing."""
    if not seconds:
        return {"count": 0}
    values = np.asarray(seconds, dtype=np.float64)
    figures: dict[str, float | int] = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return {"count": len(values), "mean": float(values.mean()), "max": float(values.max()), **figures}


def machine() -> dict[str, str]:
    return {"system": platform.system(), "processor": platform.machine(), "python": platform.python_version()}


def record(
    workload: Workload,
    result: RunResult,
    *,
    base: str,
    adapters: Sequence[str],
    pmf: Sequence[float],
    correctness: Correctness | None,
    server: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole run as plain data. Latencies are of successful requests; failures are counted by kind."""
    good = [answer for answer in result.answers if answer.is_ok]
    kinds: dict[str, list[Answer]] = {"base": [], "adapter": []}
    for answer in good:
        kinds["base" if answer.request.model == base else "adapter"].append(answer)
    tokens = sum(answer.completion_tokens for answer in good)
    return {
        "workload": asdict(workload),
        "machine": machine(),
        "server": dict(server),
        "num_adapters": len(adapters),
        "popularity_pmf": [float(p) for p in pmf],
        "num_requests": len(result.answers),
        "num_succeeded": len(good),
        "failures": dict(Counter((answer.error or "")[:60] for answer in result.answers if not answer.is_ok)),
        "wall_seconds": result.wall_seconds,
        "requests_per_second": len(good) / result.wall_seconds,
        "tokens_per_second": tokens / result.wall_seconds,
        "completion_tokens": tokens,
        "latency": {
            kind: {
                "ttft_seconds": percentiles([a.ttft_seconds for a in chosen if a.ttft_seconds is not None]),
                "itl_seconds": percentiles([gap for a in chosen for gap in a.itl_seconds]),
                "e2e_seconds": percentiles([a.e2e_seconds for a in chosen]),
            }
            for kind, chosen in {"all": good, **kinds}.items()
        },
        "timeline": [
            {"at": a.request.at_seconds, "ttft": a.ttft_seconds, "e2e": a.e2e_seconds, "kind": kind}
            for kind, chosen in kinds.items()
            for a in chosen
        ],
        "client": {
            "max_lag_seconds": result.max_lag_seconds,
            "cpu_seconds": result.client_cpu_seconds,
            "is_saturated": result.max_lag_seconds > SATURATED_LAG_SECONDS,
        },
        "correctness": asdict(correctness) if correctness else None,
    }


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Latency over the run, and its distribution: base beside adapters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (over_time, spread) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for kind, colour in (("base", "#4c72b0"), ("adapter", "#dd8452")):
        points = [point for point in report["timeline"] if point["kind"] == kind and point["ttft"] is not None]
        if not points:
            continue
        over_time.plot([p["at"] for p in points], [1000 * p["ttft"] for p in points], ".", color=colour, label=kind)
        for key, style in (("ttft", "-"), ("e2e", "--")):
            values = np.sort([1000 * p[key] for p in points])
            share = np.arange(1, len(values) + 1) / len(values)
            spread.step(values, share, style, where="post", color=colour, label=f"{kind}, {key.upper()}")
    over_time.set(xlabel="scheduled arrival (s)", ylabel="TTFT (ms)", title="Time to first token over the run")
    over_time.set_ylim(bottom=0)
    spread.set(xlabel="milliseconds", ylabel="share of requests", title="TTFT and end-to-end latency", xscale="log")
    for axes in (over_time, spread):
        axes.grid(alpha=0.3)
        axes.legend()
    load = report["workload"]
    figure.suptitle(
        f"{load['rate']:g} requests/s, {report['num_adapters']} adapters ({load['popularity']}): "
        f"{report['tokens_per_second']:.0f} tokens/s, {report['num_succeeded']}/{report['num_requests']} succeeded"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
