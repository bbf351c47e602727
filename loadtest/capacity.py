"""Throughput against the number of adapters in the traffic and their popularity, and overhead against their rank.

    python -m loadtest.capacity --fixture FIXTURE --counts 1,4,16,64 --laws distinct,uniform,zipf --out runs/popularity
    python -m loadtest.capacity --fixture FIXTURE --counts "" --ranks 4,8,16,32,64 --out runs/capacity

Closed loop at one concurrency. A point of ``--counts`` spreads the requests over so many adapters of the first rank, by
each of ``--laws``: in turn (``distinct``), uniformly or by a Zipf law. A point of ``--ranks`` gives each stream another
adapter of that rank; two more mix all ranks, and the least with the greatest. Every point of a round runs in a new
order, beside the base alone in the same round: overheads are ratios inside a round. A first round that is left out asks
every adapter once.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from loadtest.client import run_closed
from loadtest.figures import summarize
from loadtest.machine import stamp
from loadtest.peers.peer import PeerFailed
from loadtest.peers.process import run_until_done
from loadtest.plots_of_adapters import draw_adapters, draw_ranks
from loadtest.scrape import scrape, total
from loadtest.target_choice import OpenTarget, add_target, open_target
from loadtest.workload import POPULARITIES, ClosedLoop, check_popularity, streams

WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Point:
    """One condition. ``axis``: what it is a point of. ``rank`` None: the base alone, or (with adapters) several."""

    name: str
    models: tuple[str, ...]
    axis: str = "base"
    rank: int | None = None
    mean_rank: float = 0.0
    law: str = "distinct"

    @property
    def count(self) -> int:
        """Adapters."""
        return 0 if self.axis == "base" else len(self.models)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.capacity", description=__doc__.splitlines()[0])
    add_target(parser)
    parser.add_argument("--counts", default="1,4,16,32", help="adapters in the traffic")
    parser.add_argument("--laws", default="distinct", help=f"of {', '.join(POPULARITIES)}; for --counts")
    parser.add_argument("--zipf-s", type=float, default=0.9)
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


def laws_of(text: str) -> list[str]:
    found = [name for name in text.split(",") if name]
    for name in found:
        check_popularity(name)
    return found


def points_of(
    opened: OpenTarget, counts: Sequence[int], laws: Sequence[str], ranks: Sequence[int], wanted: int
) -> list[Point]:
    """The base first. Raises ``ValueError`` where the server does not hold enough adapters."""
    base, adapters, fixture = opened.target.base, opened.target.adapters, opened.fixture
    if not adapters and (counts or ranks):
        raise ValueError("the server holds no adapters")
    rank_of = {name: fixture.adapters[name][0] for name in adapters} if fixture else {}
    return [
        Point("base", (base,)),
        *by_count(adapters, rank_of, counts, laws),
        *by_rank(adapters, rank_of, ranks, wanted),
    ]


def by_count(
    adapters: Sequence[str], rank_of: Mapping[str, int], counts: Sequence[int], laws: Sequence[str]
) -> Iterator[Point]:
    first = rank_of.get(adapters[0]) if adapters else None
    alike = [name for name in adapters if rank_of.get(name) == first]
    for count in counts:
        if count > len(alike):
            raise ValueError(f"{count} adapters are asked for and the server holds {len(alike)} of one rank")
        for law in laws if count > 1 else laws[:1]:  # one adapter is asked alike by every law
            name = f"{count} adapters" if law == "distinct" else f"{count} adapters, {law}"
            yield Point(name, tuple(alike[:count]), "adapters", first, float(first or 0), law)


def by_rank(adapters: Sequence[str], rank_of: Mapping[str, int], ranks: Sequence[int], wanted: int) -> Iterator[Point]:
    own = {rank: [name for name in adapters if rank_of.get(name) == rank][:wanted] for rank in sorted(set(ranks))}
    for rank, names in own.items():
        if not names:
            raise ValueError(f"the server holds no adapters of rank {rank} that this run knows of")
        yield Point(f"rank {rank}", tuple(names), "rank", rank, float(rank))
    mixes = {"all ranks": list(own)} if len(own) > 1 else {}
    if len(own) > 2:
        mixes[f"ranks {min(own)} and {max(own)}"] = [min(own), max(own)]
    for title, mixed in mixes.items():
        turns = [name for name in chain.from_iterable(zip_longest(*(own[rank] for rank in mixed))) if name][:wanted]
        yield Point(title, tuple(turns), "rank", None, sum(rank_of[name] for name in turns) / len(turns))


async def measure(
    given: argparse.Namespace, opened: OpenTarget, point: Point, number: int, seed: int
) -> dict[str, Any]:
    """Figures of one point. Round -1 warms up: every adapter once, for a few tokens.

    Where there are more adapters than requests, the next round goes on where this one ended.
    """
    per_stream, max_tokens, law = given.requests_per_stream, given.max_tokens, point.law
    skipped = max(number, 0) * per_stream * given.concurrency if point.count > given.concurrency else 0
    if number < 0:
        per_stream, max_tokens, law = -(-max(point.count, 1) // given.concurrency), WARM_UP_TOKENS, "distinct"
    loop = ClosedLoop(
        given.concurrency, per_stream, seed, law, given.zipf_s, prompt_tokens=given.prompt_tokens, max_tokens=max_tokens
    )
    turned = skipped % len(point.models) if law == "distinct" else 0
    planned = streams(loop, point.models[turned:] + point.models[:turned], opened.plain_tokens)
    result = await run_closed(opened.session, opened.target, planned)
    samples = await scrape(opened.session, opened.target.url)
    figures = summarize(result)
    failed = figures["num_requests"] - figures["num_succeeded"]
    if failed:
        print(f"  {point.name}: {failed} requests failed: {next(iter(figures['failures']))}")
    asked = {request.model for stream in planned for request in stream}
    resident = total(samples, "adapter_bytes", 'level="device"')
    return {**figures, "num_asked": len(asked), "resident_adapter_bytes": resident}


async def bytes_of(opened: OpenTarget, point: Point) -> int | None:
    """Mean bytes of the point's adapters (64 of them at most), as the server lists them."""
    sizes = []
    for name in point.models[:64]:
        async with opened.session.get(f"{opened.target.url}/v1/adapters/{name}") as response:
            if response.status == 200:
                sizes.append((await response.json()).get("bytes"))
    known = [size for size in sizes if size is not None]
    return round(sum(known) / len(known)) if known else None


async def run_capacity(given: argparse.Namespace) -> dict[str, Any]:
    counts, ranks = numbers(given.counts), numbers(given.ranks)
    async with open_target(given) as opened:
        points = points_of(opened, counts, laws_of(given.laws), ranks, given.concurrency)
        sizes = {point.name: await bytes_of(opened, point) if point.count else 0 for point in points}
        rounds: list[Mapping[str, Any]] = []
        for number in range(-1, given.rounds):  # round -1 warms up and is left out
            order = list(points if number >= 0 else {point.models: point for point in points}.values())
            random.Random(f"{given.seed} {number}").shuffle(order)
            results = {}
            for place, point in enumerate(order):
                seed = 100_000 * given.seed + 1000 * (number + 1) + place
                results[point.name] = await measure(given, opened, point, number, seed)
            if number >= 0:
                rounds.append({"round": number, "order": [point.name for point in order], "results": results})
                shown = ", ".join(f"{p.name} {results[p.name]['tokens_per_second']:.0f}" for p in points)
                print(f"round {number}: tokens/s {shown}", flush=True)
        parameters = {
            "laws": laws_of(given.laws),
            "zipf_s": given.zipf_s,
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
                    "rank_sum": round(given.concurrency * point.mean_rank),
                    "law": point.law,
                    "axis": point.axis,
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
    if any(point["axis"] == "adapters" for point in made["points"]):
        draw_adapters(made, given.out / "throughput_against_adapters.png")
    if any(point["axis"] == "rank" for point in made["points"]):
        draw_ranks(made, given.out / "overhead_against_rank.png")
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
