"""Open-loop load against a running server, over HTTP only.

    python -m loadtest --url http://127.0.0.1:8000 --rate 8 --seconds 20 --popularity zipf --out runs/load

Prints a summary, writes ``report.json`` and ``report.png`` into ``--out``. Exits 1 when an answer under load differed
from the answer alone, 2 when the run cannot be started, 3 when the client fell behind (its latencies say nothing,
its answers do).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import aiohttp

from loadtest.client import find_target, open_session, require_loopback, run
from loadtest.correctness import check
from loadtest.figures import Limits
from loadtest.plots import draw_load
from loadtest.report import record, summary
from loadtest.workload import POPULARITIES, Workload, plan, popularity


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest", description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--rate", type=float, default=8.0, help="requests per second (Poisson)")
    parser.add_argument("--seconds", type=float, default=20.0)
    add_traffic(parser)
    parser.add_argument("--api-key", default=None)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds one request may take")
    parser.add_argument("--out", type=Path, default=Path("runs/load"))
    return parser


def add_traffic(parser: argparse.ArgumentParser) -> None:
    """Flags that say who is asked what, shared by every open-loop command."""
    parser.add_argument("--popularity", choices=POPULARITIES, default="uniform")
    parser.add_argument("--zipf-s", type=float, default=0.9)
    parser.add_argument("--base-share", type=float, default=0.1)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--ignore-eos", action="store_true", help="always generate max-tokens tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ttft-limit", type=float, default=None, metavar="SECONDS", help="for goodput")
    parser.add_argument(
        "--itl-limit", type=float, default=None, metavar="SECONDS", help="for goodput: a request's mean"
    )


def workload_of(given: argparse.Namespace, *, rate: float, seed: int) -> Workload:
    """Raises ``ValueError`` for flags that make no sense."""
    return Workload(
        rate=rate,
        seconds=given.seconds,
        seed=seed,
        popularity=given.popularity,
        zipf_s=given.zipf_s,
        base_share=given.base_share,
        num_prompts=given.num_prompts,
        max_tokens=given.max_tokens,
    )


def limits_of(given: argparse.Namespace) -> Limits | None:
    if given.ttft_limit is None and given.itl_limit is None:
        return None
    return Limits(given.ttft_limit, given.itl_limit)


async def main(given: argparse.Namespace) -> int:
    try:
        require_loopback(given.url)
        workload = workload_of(given, rate=given.rate, seed=given.seed)
    except ValueError as problem:
        print(f"loadtest: {problem}", file=sys.stderr)
        return 2
    async with open_session(api_key=given.api_key, timeout_seconds=given.timeout) as session:
        try:
            target = await find_target(session, given.url)
        except (aiohttp.ClientError, ValueError) as problem:
            print(f"loadtest: {given.url} does not answer like a server: {problem}", file=sys.stderr)
            return 2
        planned = plan(workload, target.base, target.adapters)
        result = await run(session, target, planned, ignore_eos=given.ignore_eos)
        correctness = await check(session, target, result.answers, ignore_eos=given.ignore_eos)
    count = len(target.adapters)
    pmf = list(popularity(workload.popularity, count, workload.zipf_s)) if count else []
    report = record(workload, result, target, pmf=pmf, correctness=correctness, limits=limits_of(given))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw_load(report, given.out / "report.png")
    print(summary(report))
    print(f"wrote {given.out / 'report.json'} and {given.out / 'report.png'}")
    if correctness.mismatches:
        return 1
    if report["client"]["is_saturated"]:
        print("loadtest: the client itself fell behind; lower --rate before trusting the latencies", file=sys.stderr)
        return 3
    return 0
