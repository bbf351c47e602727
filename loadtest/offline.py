"""What HTTP, tokenising and streaming cost: the same requests to the engine in its own process, and over HTTP.

    python -m loadtest.offline FIXTURE --concurrency 64 --rounds 3 --out runs/offline

Rounds are interleaved, and each half starts a process of its own around the same store. Over HTTP the client shares the
machine's cores with the server, and what it takes of them is counted as cost; its CPU time is in the record.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from loadtest.client import open_session, run_closed
from loadtest.figures import summarize
from loadtest.machine import stamp
from loadtest.peers.deltaserve import DeltaserveServer
from loadtest.peers.peer import PeerFailed, Setup
from loadtest.peers.process import run_until_done, running
from loadtest.peers.settings import read
from loadtest.small import Fixture
from loadtest.workload import ClosedLoop, PlannedRequest, streams

HALVES = ("offline", "http")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.offline", description=__doc__.splitlines()[0])
    parser.add_argument("fixture", type=Path, help="folder of loadtest.small")
    parser.add_argument("--peers", type=Path, default=None, help="TOML file; [deltaserve] and threads are read")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--requests-per-stream", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--num-adapters", type=int, default=32)
    parser.add_argument("--base-only", action="store_true", help="ask the base instead of the adapters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--work", type=Path, default=Path("runs/servers"))
    parser.add_argument("--out", type=Path, default=Path("runs/offline"))
    return parser


class Halves:
    """Both ways of one run. Each gets the same requests in a round."""

    def __init__(self, given: argparse.Namespace, session: aiohttp.ClientSession) -> None:
        settings = read(given.peers)
        fixture = Fixture.read(given.fixture)
        adapters = tuple(fixture.adapters)[: given.num_adapters]
        self._given, self._session = given, session
        self._peer = DeltaserveServer(settings.get("deltaserve", {}))
        self.setup = Setup(fixture, adapters, given.work, settings.get("threads", 2), given.concurrency)
        if self._peer.options:
            raise ValueError("[deltaserve] options would reach only one of the halves; this command takes none")

    def plan(self, seed: int, max_tokens: int) -> list[list[PlannedRequest]]:
        given = self._given
        loop = ClosedLoop(
            given.concurrency,
            given.requests_per_stream,
            seed,
            prompt_tokens=given.prompt_tokens,
            max_tokens=max_tokens,
        )
        models = (self.setup.fixture.base.name,) if given.base_only else self.setup.adapters
        return streams(loop, models, self.setup.fixture.plain_tokens)

    async def http(self, seed: int) -> dict[str, Any]:
        async with running(self._peer, self.setup, self._session) as target:
            await run_closed(self._session, target, self.plan(-seed - 1 + (1 << 31), 8))
            return summarize(await run_closed(self._session, target, self.plan(seed, self._given.max_tokens)))

    async def offline(self, seed: int) -> dict[str, Any]:
        plans = {"warm_up": self.plan(-seed - 1 + (1 << 31), 8), "timed": self.plan(seed, self._given.max_tokens)}
        file = self.setup.work / "offline-plan.json"
        file.write_text(json.dumps({name: [[_plain(r) for r in own] for own in plan] for name, plan in plans.items()}))
        return await asyncio.to_thread(self._run_engine, file)

    def _run_engine(self, plan: Path) -> dict[str, Any]:
        store = self.setup.work / f"{self._peer.name}-store"
        words = [sys.executable, "-m", "loadtest.offline_engine", "--fixture", str(self.setup.fixture.folder)]
        words += ["--store", str(store), "--plan", str(plan)]
        environment = {**os.environ, **self.setup.environment}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        if done.returncode != 0:
            raise PeerFailed(f"the offline engine failed:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def _plain(request: PlannedRequest) -> dict[str, Any]:
    return {"model": request.model, "prompt": list(request.prompt), "max_tokens": request.max_tokens}


async def run_offline(given: argparse.Namespace) -> dict[str, Any]:
    async with open_session(timeout_seconds=given.timeout) as session:
        halves = Halves(given, session)
        given.work.mkdir(parents=True, exist_ok=True)
        async with running(halves._peer, halves.setup, session):
            pass  # registers the adapters, so that both halves find them in the store
        rounds = []
        for number in range(given.rounds):
            order = list(HALVES)
            random.Random(f"{given.seed} {number}").shuffle(order)
            results = {}
            for half in order:
                results[half] = await getattr(halves, half)(1000 * given.seed + number)
                print(f"round {number} {half:>8}: {results[half]['tokens_per_second']:.0f} tokens/s", flush=True)
            rounds.append({"round": number, "order": order, "results": results})
        parameters = {
            "concurrency": given.concurrency,
            "requests_per_stream": given.requests_per_stream,
            "prompt_tokens": given.prompt_tokens,
            "max_tokens": given.max_tokens,
            "num_adapters": 0 if given.base_only else len(halves.setup.adapters),
            "threads": halves.setup.threads,
            "rounds": given.rounds,
        }
        return {**stamp("offline", given.seed, parameters), "rounds": rounds}


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments().parse_args(argv)
    try:
        made = run_until_done(run_offline(given))
    except (ValueError, PeerFailed) as problem:
        print(f"loadtest: {problem}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "record.json").write_text(json.dumps(made, indent=1) + "\n")
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
