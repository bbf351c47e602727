"""Figures of one run, and of the same run repeated: plain data, seconds and tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtest.client import Answer, RunResult

PERCENTILES = (50, 90, 95, 99)
SATURATED_LAG_SECONDS = 0.25
"""Past this lag of its own event loop the client, not the server, shapes the latencies."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must keep to count as good: TTFT, and the mean time between its tokens. None sets no limit."""

    ttft_seconds: float | None = None
    itl_seconds: float | None = None

    def are_kept_by(self, answer: Answer) -> bool:
        if not answer.is_ok or answer.ttft_seconds is None:
            return False
        if self.ttft_seconds is not None and answer.ttft_seconds > self.ttft_seconds:
            return False
        tpot = answer.tpot_seconds
        return self.itl_seconds is None or tpot is None or tpot <= self.itl_seconds


def percentiles(seconds: Sequence[float]) -> dict[str, float | int]:
    """p50, p90, p95, p99, mean and max, in seconds; only ``count`` when there is nothing."""
    if not seconds:
        return {"count": 0}
    values = np.asarray(seconds, dtype=np.float64)
    figures: dict[str, float | int] = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return {"count": len(values), "mean": float(values.mean()), "max": float(values.max()), **figures}


def latencies(answers: Sequence[Answer]) -> dict[str, dict[str, float | int]]:
    """TTFT, ITL, TPOT and end-to-end time of the answers that succeeded."""
    good = [answer for answer in answers if answer.is_ok]
    return {
        "ttft_seconds": percentiles([a.ttft_seconds for a in good if a.ttft_seconds is not None]),
        "itl_seconds": percentiles([gap for a in good for gap in a.itl_seconds]),
        "tpot_seconds": percentiles([a.tpot_seconds for a in good if a.tpot_seconds is not None]),
        "e2e_seconds": percentiles([a.e2e_seconds for a in good]),
    }


def summarize(
    result: RunResult, limits: Limits | None = None, *, offered_seconds: float | None = None
) -> dict[str, Any]:
    """One run as plain data. Latencies are of successful requests; failures are counted by kind.

    With ``limits``, ``goodput`` tells the share, the rate and the tokens per second of the requests that kept them;
    a failed request kept none. Its rates are over ``offered_seconds``, the time in which requests arrived, where it is
    given: the answers that are waited for after it would make every rate look missed.
    """
    good = [answer for answer in result.answers if answer.is_ok]
    tokens = sum(answer.completion_tokens for answer in good)
    wall = result.wall_seconds
    figures: dict[str, Any] = {
        "num_requests": len(result.answers),
        "num_succeeded": len(good),
        "failures": dict(Counter((answer.error or "")[:60] for answer in result.answers if not answer.is_ok)),
        "wall_seconds": wall,
        "requests_per_second": len(good) / wall,
        "tokens_per_second": tokens / wall,
        "completion_tokens": tokens,
        "latency": latencies(good),
        "client": client_health(result),
    }
    if limits is not None:
        seconds = offered_seconds or wall
        kept = [answer for answer in good if limits.are_kept_by(answer)]
        figures["goodput"] = {
            "ttft_limit_seconds": limits.ttft_seconds,
            "itl_limit_seconds": limits.itl_seconds,
            "share": len(kept) / len(result.answers) if result.answers else 0.0,
            "requests_per_second": len(kept) / seconds,
            "tokens_per_second": sum(answer.completion_tokens for answer in kept) / seconds,
        }
    return figures


def client_health(result: RunResult) -> dict[str, Any]:
    return {
        "max_lag_seconds": result.max_lag_seconds,
        "cpu_seconds": result.client_cpu_seconds,
        "is_saturated": result.max_lag_seconds > SATURATED_LAG_SECONDS,
    }


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median, least and greatest of a figure over rounds. ``values`` is not empty."""
    found = np.asarray(values, dtype=np.float64)
    return {
        "median": float(np.median(found)),
        "min": float(found.min()),
        "max": float(found.max()),
        "rounds": len(found),
    }
