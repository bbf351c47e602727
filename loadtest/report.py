"""One JSON record of an open-loop run, and its summary in lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from loadtest.client import Answer, RunResult, Target
from loadtest.correctness import Correctness
from loadtest.figures import Limits, latencies, summarize
from loadtest.machine import stamp
from loadtest.workload import Workload


def record(
    workload: Workload,
    result: RunResult,
    target: Target,
    *,
    pmf: Sequence[float],
    correctness: Correctness | None,
    limits: Limits | None = None,
) -> dict[str, Any]:
    """The whole run as plain data; ``timeline`` has a point per answered request."""
    good = [answer for answer in result.answers if answer.is_ok]
    kinds: dict[str, list[Answer]] = {"base": [], "adapter": []}
    for answer in good:
        kinds["base" if answer.request.model == target.base else "adapter"].append(answer)
    return {
        **stamp("load", workload.seed, asdict(workload)),
        "server": {**target.version, "base": target.base, "adapters": list(target.adapters)},
        "num_adapters": len(target.adapters),
        "popularity_pmf": [float(p) for p in pmf],
        **summarize(result, limits),
        "latency": {kind: latencies(chosen) for kind, chosen in {"all": good, **kinds}.items()},
        "timeline": [
            {"at": a.request.at_seconds, "ttft": a.ttft_seconds, "e2e": a.e2e_seconds, "kind": kind}
            for kind, chosen in kinds.items()
            for a in chosen
        ],
        "correctness": asdict(correctness) if correctness else None,
    }


def summary(report: dict[str, Any]) -> str:
    lines = [
        f"{report['num_succeeded']}/{report['num_requests']} requests succeeded in {report['wall_seconds']:.1f} s, "
        f"{report['requests_per_second']:.1f} requests/s, {report['tokens_per_second']:.0f} tokens/s"
    ]
    for kind in ("base", "adapter"):
        for name, figures in report["latency"][kind].items():
            if figures["count"]:
                shown = "  ".join(f"{p} {1000 * figures[p]:8.1f}" for p in ("p50", "p95", "p99"))
                lines.append(f"  {kind:<8}{name.removesuffix('_seconds'):<5} ms  {shown}")
    if "goodput" in report:
        good = report["goodput"]
        lines.append(
            f"  goodput  {100 * good['share']:.0f} % of requests within the limits, "
            f"{good['requests_per_second']:.1f} requests/s, {good['tokens_per_second']:.0f} tokens/s"
        )
    for failure, count in report["failures"].items():
        lines.append(f"  failed {count}x: {failure}")
    correctness = report["correctness"]
    lines.append(
        f"  correctness: {correctness['num_checked']} answers of {correctness['num_pairs']} (model, prompt) pairs "
        f"compared with the answer alone, {len(correctness['mismatches'])} pairs differ"
    )
    return "\n".join(lines)
