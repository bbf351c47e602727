"""Open-loop load against a running server, over HTTP only.

    python -m loadtest --url http://127.0.0.1:8000 --rate 8 --seconds 20 --popularity zipf --out runs/load

Prints a summary, writes ``report.json`` and ``report.png`` into ``--out``. Exits 1 when an answer under load differed
from the answer alone, 2 when the run cannot be started, 3 when the client fell behind (its latencies say nothing,
its answers do).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import aiohttp

from loadtest.client import list_models, require_loopback, run
from loadtest.correctness import check
from loadtest.report import draw, record
from loadtest.workload import Workload, plan, popularity


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest", description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--rate", type=float, default=8.0, help="requests per second (Poisson)")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--popularity", choices=("uniform", "zipf"), default="uniform")
    parser.add_argument("--zipf-s", type=float, default=0.9)
    parser.add_argument("--base-share", type=float, default=0.1)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--ignore-eos", action="store_true", help="always generate max-tokens tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--api-key", default=None)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds one request may take")
    parser.add_argument("--out", type=Path, default=Path("runs/load"))
    return parser


async def main(given: argparse.Namespace) -> int:
    try:
        require_loopback(given.url)
        workload = Workload(
            rate=given.rate,
            seconds=given.seconds,
            seed=given.seed,
            popularity=given.popularity,
            zipf_s=given.zipf_s,
            base_share=given.base_share,
            num_prompts=given.num_prompts,
            max_tokens=given.max_tokens,
        )
    except ValueError as problem:
        print(f"loadtest: {problem}", file=sys.stderr)
        return 2
    headers = {"authorization": f"Bearer {given.api_key}"} if given.api_key else {}
    timeout = aiohttp.ClientTimeout(total=given.timeout)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        try:
            base, adapters = await list_models(session, given.url)
            async with session.get(f"{given.url}/version") as response:
                version: dict[str, Any] = await response.json()
        except (aiohttp.ClientError, ValueError) as problem:
            print(f"loadtest: {given.url} does not answer like a server: {problem}", file=sys.stderr)
            return 2
        planned = plan(workload, base, adapters)
        result = await run(session, given.url, planned, ignore_eos=given.ignore_eos)
        correctness = await check(session, given.url, result.answers, ignore_eos=given.ignore_eos)
    pmf = popularity(workload, len(adapters)) if adapters else []
    report = record(
        workload,
        result,
        base=base,
        adapters=adapters,
        pmf=list(pmf),
        correctness=correctness,
        server={**version, "base": base, "adapters": adapters},
    )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, given.out / "report.png")
    print(summary(report))
    print(f"wrote {given.out / 'report.json'} and {given.out / 'report.png'}")
    if correctness.mismatches:
        return 1
    if report["client"]["is_saturated"]:
        print("loadtest: the client itself fell behind; lower --rate before trusting the latencies", file=sys.stderr)
        return 3
    return 0


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
    for failure, count in report["failures"].items():
        lines.append(f"  failed {count}x: {failure}")
    correctness = report["correctness"]
    lines.append(
        f"  correctness: {correctness['num_checked']} answers of {correctness['num_pairs']} (model, prompt) pairs "
        f"compared with the answer alone, {len(correctness['mismatches'])} pairs differ"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(arguments().parse_args())))
