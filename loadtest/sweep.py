"""Raises the arrival rate until requests no longer keep their limits: latency against rate, goodput, and the knee.

    python -m loadtest.sweep --fixture FIXTURE --rates 1,2,4,8,16 --ttft-limit 1 --itl-limit 0.1 --out runs/sweep

Open loop, Poisson arrivals given their number: no rate is missed by the luck of a short run. The knee is the highest
rate at which at least ``--share`` of the requests keep both limits; between the last rate that does and the first that
does not, ``--refine`` more rates are tried. ``--rounds`` repeats the list in a new order each time.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from loadtest.client import run
from loadtest.figures import Limits, summarize
from loadtest.load import add_traffic, workload_of
from loadtest.machine import stamp
from loadtest.peers.peer import PeerFailed
from loadtest.peers.process import run_until_done
from loadtest.plots import draw_sweep
from loadtest.target_choice import OpenTarget, add_target, open_target
from loadtest.workload import plan, token_prompts

Measure = Callable[[float, int], Awaitable[dict[str, Any]]]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.sweep", description=__doc__.splitlines()[0])
    add_target(parser)
    add_traffic(parser)
    parser.add_argument("--rates", default="1,2,4,8,16", help="requests per second, comma-separated")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each rate")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.9, help="of requests that must keep the limits")
    parser.add_argument("--refine", type=int, default=2, help="rates tried between the last good and the first bad")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.set_defaults(ttft_limit=1.0, itl_limit=0.1, ignore_eos=True)
    return parser


def rates_of(text: str) -> list[float]:
    """Ascending and distinct. Raises ``ValueError`` for anything but numbers above 0."""
    rates = sorted({float(part) for part in text.split(",") if part.strip()})
    if not rates or rates[0] <= 0 or not math.isfinite(rates[-1]):
        raise ValueError(f"--rates is {text!r}; it must be numbers greater than 0, comma-separated")
    return rates


def share_by_rate(points: Sequence[Mapping[str, Any]]) -> dict[float, float]:
    """Median share of good requests of each rate over rounds, by ascending rate."""
    found: dict[float, list[float]] = {}
    for point in points:
        found.setdefault(point["rate"], []).append(point["goodput"]["share"])
    return {rate: median(shares) for rate, shares in sorted(found.items())}


def knee(points: Sequence[Mapping[str, Any]], share: float) -> tuple[float | None, float | None]:
    """The highest rate below which every rate was good, and the first rate that was not; None where there is none."""
    last_good = None
    for rate, found in share_by_rate(points).items():
        if found < share:
            return last_good, rate
        last_good = rate
    return last_good, None


async def sweep(
    measure: Measure, rates: Sequence[float], *, rounds: int, share: float, refine: int, seed: int
) -> list[dict[str, Any]]:
    """Points of every round, then ``refine`` bisections (in all rounds' number) of the gap around the knee."""
    points: list[dict[str, Any]] = []
    for number in range(rounds):
        order = list(rates)
        if number:  # the first round ascends, so that a server is not thrown into overload before it is warm
            random.Random(f"{seed} {number}").shuffle(order)
        for rate in order:
            points.append(await measure(rate, number))
    for _ in range(refine):
        good, bad = knee(points, share)
        if good is None or bad is None or bad / good < 1.05:
            break
        middle = round((good + bad) / 2, 2)
        for number in range(rounds):
            points.append(await measure(middle, number))
    return points


def measured_on(given: argparse.Namespace, opened: OpenTarget) -> Measure:
    limits = Limits(given.ttft_limit, given.itl_limit)
    target = opened.target

    async def measure(rate: float, number: int) -> dict[str, Any]:
        seed = 1_000_000 * given.seed + 100_000 * (number + 1) + round(100 * rate)
        count = max(1, round(2 * rate * given.seconds))
        asked = token_prompts(count, given.prompt_tokens, opened.plain_tokens, seed)
        workload = replace(workload_of(given, rate=rate, seed=seed), is_count_fixed=True)
        planned = plan(workload, target.base, target.adapters, asked)
        result = await run(opened.session, target, planned, ignore_eos=given.ignore_eos)
        figures = {"rate": rate, "round": number, **summarize(result, limits, offered_seconds=given.seconds)}
        ttft = figures["latency"]["ttft_seconds"].get("p50", math.nan)
        print(
            f"{rate:7.2f} requests/s: {100 * figures['goodput']['share']:3.0f} % good, TTFT p50 {1000 * ttft:.0f} ms, "
            f"{figures['tokens_per_second']:.0f} tokens/s",
            flush=True,
        )
        return figures

    return measure


async def run_sweep(given: argparse.Namespace) -> dict[str, Any]:
    rates = rates_of(given.rates)
    workload_of(given, rate=rates[0], seed=0)
    async with open_target(given) as opened:
        measure = measured_on(given, opened)
        given_seconds, given.seconds = given.seconds, min(given.seconds, 5.0)
        await measure(rates[0], -1)  # warm-up, left out
        given.seconds = given_seconds
        points = await sweep(
            measure, rates, rounds=given.rounds, share=given.share, refine=given.refine, seed=given.seed
        )
        good, bad = knee(points, given.share)
        parameters = {
            "seconds": given.seconds,
            "rounds": given.rounds,
            "popularity": given.popularity,
            "zipf_s": given.zipf_s,
            "base_share": given.base_share,
            "prompt_tokens": given.prompt_tokens,
            "max_tokens": given.max_tokens,
            "ttft_limit_seconds": given.ttft_limit,
            "itl_limit_seconds": given.itl_limit,
            "share": given.share,
        }
        return {
            **stamp("sweep", given.seed, parameters),
            "server": opened.described(),
            "points": sorted(points, key=lambda point: (point["rate"], point["round"])),
            "knee": {"rate": good, "first_bad_rate": bad},
        }


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments().parse_args(argv)
    try:
        made = run_until_done(run_sweep(given))
    except (ValueError, PeerFailed) as problem:
        print(f"loadtest: {problem}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "record.json").write_text(json.dumps(made, indent=1) + "\n")
    draw_sweep(made, given.out / "latency_against_rate.png")
    found = made["knee"]["rate"]
    print(f"knee: {found:g} requests/s" if found else "knee: below the lowest rate")
    print(f"wrote {given.out}")
    if all(point["client"]["is_saturated"] for point in made["points"]):
        print("loadtest: the client itself fell behind at every rate", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
