"""Base-only traffic on a server that holds many adapters, against servers that hold none.

    python -m loadtest.registered FIXTURE --num-adapters 1000 --out runs/registered

Three servers run at once and are loaded one at a time, in an order drawn anew each round: one with the adapters, each
of them asked once before, and two without any. A ratio of the two alike says what a ratio means here: it is noise.
``--starts`` starts all three again, because processes that are alike differ too. Exits 2 when a request failed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp

from loadtest.client import Target, open_session, run_closed
from loadtest.figures import summarize
from loadtest.machine import stamp
from loadtest.peers.deltaserve import DeltaserveServer
from loadtest.peers.peer import PeerFailed, Setup
from loadtest.peers.process import run_until_done, running
from loadtest.peers.settings import read
from loadtest.plots_of_adapters import draw_registered
from loadtest.scrape import scrape, total
from loadtest.small import Fixture
from loadtest.workload import ClosedLoop, streams

HOLDING, EMPTY, TWIN = "adapters", "none", "none again"
WARM_UP_TOKENS = 8


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.registered", description=__doc__.splitlines()[0])
    parser.add_argument("fixture", type=Path, help="folder of loadtest.small")
    parser.add_argument("--peers", type=Path, default=None, help="TOML file; [deltaserve] and threads are read")
    parser.add_argument("--num-adapters", type=int, default=None, help="default: all")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests-per-stream", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6, help="of each start")
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds one request may take")
    parser.add_argument("--work", type=Path, default=Path("runs/servers"))
    parser.add_argument("--out", type=Path, default=Path("runs/registered"))
    return parser


class Trio:
    """The three servers of one run."""

    def __init__(self, given: argparse.Namespace, session: aiohttp.ClientSession) -> None:
        if min(given.rounds, given.starts) < 1:
            raise ValueError("--rounds and --starts must be at least 1")
        settings = read(given.peers)
        fixture = Fixture.read(given.fixture)
        adapters = tuple(fixture.adapters)[: given.num_adapters]
        ours = settings.get("deltaserve", {})
        self._given, self._session = given, session
        self.setup = Setup(fixture, adapters, given.work, settings.get("threads", 2), given.concurrency)
        self.options = [str(word) for word in ours.get("options", ())]
        self.version: Mapping[str, Any] = {}
        self._servers = {
            HOLDING: DeltaserveServer(ours),
            EMPTY: DeltaserveServer(ours, has_adapters=False),
            TWIN: DeltaserveServer(ours, has_adapters=False, name="deltaserve-twin"),
        }

    async def start(self, stack: AsyncExitStack) -> tuple[dict[str, Target], int]:
        """All three, warm; and how many adapters are resident after each was asked once."""
        targets = {
            name: await stack.enter_async_context(running(server, self.setup, self._session))
            for name, server in self._servers.items()
        }
        holding = targets[HOLDING]
        turns = -(-len(holding.adapters) // self._given.concurrency)
        await self._ask(holding, holding.adapters, seed=9_999_998, requests=turns, max_tokens=1, prompt_tokens=8)
        samples = await scrape(self._session, holding.url)
        for target in targets.values():
            await self._ask(target, (target.base,), seed=9_999_999, requests=1, max_tokens=WARM_UP_TOKENS)
        self.version = holding.version
        return targets, int(total(samples, "adapter_slots_used", 'level="device"'))

    async def measure(self, target: Target, seed: int) -> dict[str, Any]:
        given = self._given
        requests, max_tokens = given.requests_per_stream, given.max_tokens
        return await self._ask(target, (target.base,), seed=seed, requests=requests, max_tokens=max_tokens)

    async def _ask(
        self,
        target: Target,
        models: Sequence[str],
        *,
        seed: int,
        requests: int,
        max_tokens: int,
        prompt_tokens: int | None = None,
    ) -> dict[str, Any]:
        """Raises ``PeerFailed`` where a request fails: nothing could be compared then."""
        given = self._given
        tokens = prompt_tokens or given.prompt_tokens
        loop = ClosedLoop(given.concurrency, requests, seed, prompt_tokens=tokens, max_tokens=max_tokens)
        planned = streams(loop, models, self.setup.fixture.plain_tokens)
        figures = summarize(await run_closed(self._session, target, planned))
        if figures["failures"]:
            raise PeerFailed(f"requests failed: {figures['failures']}")
        return figures


async def run_registered(given: argparse.Namespace) -> dict[str, Any]:
    rounds: list[dict[str, Any]] = []
    residents = []
    async with open_session(timeout_seconds=given.timeout) as session:
        trio = Trio(given, session)
        for start in range(given.starts):
            async with AsyncExitStack() as stack:
                targets, num_resident = await trio.start(stack)
                residents.append(num_resident)
                for _ in range(given.rounds):
                    number = len(rounds)
                    order = list(targets)
                    random.Random(f"{given.seed} {number}").shuffle(order)
                    seed = 10_000 * given.seed + number
                    results = {name: await trio.measure(targets[name], seed) for name in order}
                    rounds.append({"round": number, "start": start, "order": order, "results": results})
                    shown = ", ".join(f"{name} {results[name]['tokens_per_second']:.0f}" for name in targets)
                    print(f"start {start} round {number}: tokens/s {shown}", flush=True)
    parameters = {
        "num_adapters": len(trio.setup.adapters),
        "ranks": sorted({trio.setup.fixture.adapters[name][0] for name in trio.setup.adapters}),
        "layers": trio.setup.fixture.shape.layers,
        "num_resident": min(residents),
        "concurrency": given.concurrency,
        "requests_per_stream": given.requests_per_stream,
        "prompt_tokens": given.prompt_tokens,
        "max_tokens": given.max_tokens,
        "threads": trio.setup.threads,
        "rounds": given.rounds,
        "starts": given.starts,
    }
    head = stamp("registered", given.seed, parameters)
    return {**head, "server": {"version": dict(trio.version), "options": trio.options}, "rounds": rounds}


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments().parse_args(argv)
    try:
        made = run_until_done(run_registered(given))
    except (ValueError, PeerFailed) as problem:
        print(f"loadtest: {problem}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "record.json").write_text(json.dumps(made, indent=1) + "\n")
    draw_registered(made, given.out / "ratios.png")
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
