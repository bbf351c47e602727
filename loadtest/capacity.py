"""Throughput against the number of distinct adapters in the traffic, and overhead against their rank.

    python -m loadtest.capacity --fixture FIXTURE --counts 1,2,4,8,16,32 --ranks 8,16,64 --out runs/capacity

Closed loop at one concurrency. A point of ``--counts`` spreads the streams over so many adapters of the first rank; a
point of ``--ranks`` gives each stream another adapter of that rank; ``mixed`` gives them all ranks in turn. Every point
of a round runs in a new order, beside the base alone in the same round: overheads are ratios inside a round.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from loadtest.client import run_closed
from loadtest.figures import summarize
from loadtest.machine import stamp
from loadtest.peers.peer import PeerFailed
from loadtest.peers.process import run_until_done
from loadtest.plots import draw_adapters, draw_ranks
from loadtest.scrape import scrape, total
from loadtest.small import Fixture
from loadtest.target_choice import OpenTarget, add_target, open_target
from loadtest.workload import ClosedLoop, streams


@dataclass(frozen=True, slots=True)
class Point:
    """One condition. ``rank`` None: the base alone, or (with adapters) several ranks."""

    name: str
    models: tuple[str, ...]
    count: int
    rank: int | None = None
    mean_rank: float = 0.0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.capacity", description=__doc__.splitlines()[0])
    add_target(parser)
    parser.add_argument("--counts", default="1,4,16,32", help="distinct adapters in the traffic")
    parser.add_argument("--ranks", default="", help="ranks to compare; needs a fixture with adapters of each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests-per-stream", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/capacity"))
    return parser


def numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",") if part.strip()]
    if any(number < 1 for number in found):
        raise ValueError(f"{text!r} must be whole numbers of at least 1, comma-separated")
    return found


def points_of(
    base: str,
    adapters: Sequence[str],
    fixture: Fixture | None,
    counts: Sequence[int],
    ranks: Sequence[int],
    wanted: int,
) -> list[Point]:
    """Raises ``ValueError`` where the server does not hold enough adapters."""
    made = [Point("base", (base,), 0)]
    if not adapters and (counts or ranks):
        raise ValueError("the server holds no adapters")
    rank_of = {name: fixture.adapters[name][0] for name in adapters if fixture} if fixture else {}
    first = rank_of.get(adapters[0]) if adapters else None
    alike = [name for name in adapters if rank_of.get(name) == first]
    for count in counts:
        if count > len(alike):
            raise ValueError(f"{count} adapters are asked for and the server holds {len(alike)} of one rank")
        made.append(Point(f"{count} adapters", tuple(alike[:count]), count, first, float(first or 0)))
    by_rank = {}
    for rank in ranks:
        own = [name for name in adapters if rank_of.get(name) == rank][:wanted]
        if not own:
            raise ValueError(f"the server holds no adapters of rank {rank} that this run knows of")
        by_rank[rank] = own
        made.append(Point(f"rank {rank}", tuple(own), len(own), rank, float(rank)))
    if len(by_rank) > 1:
        turns = [name for name in chain.from_iterable(zip_longest(*by_rank.values())) if name][:wanted]
        mean = sum(rank_of[name] for name in turns) / len(turns)
        made.append(Point("mixed ranks", tuple(turns), len(turns), None, mean))
    return made


async def measure(
    given: argparse.Namespace, opened: OpenTarget, point: Point, seed: int, *, max_tokens: int | None = None
) -> dict[str, Any]:
    """Figures of one point: at least so many requests a stream that every adapter is asked."""
    per_stream = max(given.requests_per_stream, -(-point.count // given.concurrency))
    loop = ClosedLoop(
        given.concurrency,
        per_stream,
        seed,
        prompt_tokens=given.prompt_tokens,
        max_tokens=max_tokens or given.max_tokens,
    )
    planned = streams(loop, point.models, opened.plain_tokens)
    result = await run_closed(opened.session, opened.target, planned)
    samples = await scrape(opened.session, opened.target.url)
    figures = summarize(result)
    failed = figures["num_requests"] - figures["num_succeeded"]
    if failed:
        print(f"  {point.name}: {failed} requests failed: {next(iter(figures['failures']))}")
    resident = total(samples, "adapter_bytes", 'level="device"')
    return {**figures, "resident_adapter_bytes": resident, "resident_adapters": total(samples, "adapter_slots_used")}


async def bytes_of(opened: OpenTarget, point: Point) -> int | None:
    """Mean bytes at rest of the point's adapters, as the server lists them."""
    sizes = []
    for name in point.models:
        async with opened.session.get(f"{opened.target.url}/v1/adapters/{name}") as response:
            if response.status == 200:
                sizes.append((await response.json()).get("bytes"))
    known = [size for size in sizes if size is not None]
    return round(sum(known) / len(known)) if known else None


async def run_capacity(given: argparse.Namespace) -> dict[str, Any]:
    counts, ranks = numbers(given.counts), numbers(given.ranks)
    async with open_target(given) as opened:
        target = opened.target
        points = points_of(target.base, target.adapters, opened.fixture, counts, ranks, given.concurrency)
        sizes = {point.name: await bytes_of(opened, point) if point.count else 0 for point in points}
        rounds: list[Mapping[str, Any]] = []
        for number in range(-1, given.rounds):  # round -1 warms up and is left out
            order = list(points)
            random.Random(f"{given.seed} {number}").shuffle(order)
            results = {}
            for place, point in enumerate(order):
                seed = 100_000 * given.seed + 1000 * (number + 1) + place
                results[point.name] = await measure(given, opened, point, seed, max_tokens=8 if number < 0 else None)
                if number >= 0:
                    print(
                        f"round {number} {point.name:>14}: {results[point.name]['tokens_per_second']:.0f} tokens/s",
                        flush=True,
                    )
            if number >= 0:
                rounds.append({"round": number, "order": [point.name for point in order], "results": results})
        parameters = {
            "concurrency": given.concurrency,
            "requests_per_stream": given.requests_per_stream,
            "prompt_tokens": given.prompt_tokens,
            "max_tokens": given.max_tokens,
            "rounds": given.rounds,
        }
        return {
            **stamp("capacity", given.seed, parameters),
            "server": opened.described(),
            "points": [
                {
                    "name": point.name,
                    "adapters": point.count,
                    "rank": point.rank,
                    "mean_rank": point.mean_rank,
                    "axis": "rank" if "rank" in point.name else "adapters",
                    "adapter_bytes": sizes[point.name],
                }
                for point in points
            ],
            "rounds": rounds,
        }


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments().parse_args(argv)
    try:
        made = run_until_done(run_capacity(given))
    except (ValueError, PeerFailed) as problem:
        print(f"loadtest: {problem}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "record.json").write_text(json.dumps(made, indent=1) + "\n")
    draw_adapters(made, given.out / "throughput_against_adapters.png")
    if any(point["axis"] == "rank" for point in made["points"]):
        draw_ranks(made, given.out / "overhead_against_rank.png")
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
