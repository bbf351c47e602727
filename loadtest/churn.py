"""A steady stream while adapters come and go: what the stream feels of it.

    python -m loadtest.churn --fixture FIXTURE --num-adapters 509 --steady 8 --seconds 8 --rounds 6 \\
        --server-option=--adapter-slots --server-option=64 --out runs/churn

The steady streams, on the first ``--steady`` adapters, run from the beginning to the end (``steady.py``); their
inter-token latency is what is reported. Beside them the phases take turns, in a new order each round:

- ``quiet``: nothing.
- ``resident``: short requests at ``--background-rate`` to one adapter that stays loaded. What they cost any server is
  no cost of loading.
- ``load``: the same requests, each to the next of the other adapters (the next round goes on where this one ended), so
  that each loads one and evicts another.
- ``upload``: adapters are registered, replaced and deleted over HTTP, one operation after the other, whole turns.

Counters of loads and evictions are taken from the server, so that a phase that churned nothing shows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtest.client import Answer, ask
from loadtest.figures import percentiles
from loadtest.machine import stamp
from loadtest.peers.deltaserve import delete, upload
from loadtest.peers.peer import PeerFailed
from loadtest.peers.process import run_until_done
from loadtest.plots import draw_churn
from loadtest.scrape import scrape, total
from loadtest.small import Shape, adapter_config, adapter_tensors
from loadtest.steady import SteadyStreams, steady_streams
from loadtest.target_choice import OpenTarget, add_target, open_target
from loadtest.workload import PlannedRequest, token_prompts

PHASES = ("quiet", "resident", "load", "upload")
COUNTED = {
    "loads": ("adapter_loads_total", 'from="disk"'),
    "evictions": ("adapter_evictions_total", 'level="device"'),
    "uploads": ("adapter_uploads_total", ""),
}
"""What a phase did, by the server's own counters: ``(metric, label)``."""
SETTLE_SECONDS = 0.5
"""Between two phases: what the last one began has ended."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.churn", description=__doc__.splitlines()[0])
    add_target(parser)
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--steady", type=int, default=8, help="streams of the steady load, each on its own adapter")
    parser.add_argument("--background-rate", type=float, default=5.0, help="background requests per second")
    parser.add_argument("--background-prompt-tokens", type=int, default=8, help="short, so that loading is what costs")
    parser.add_argument("--upload-rank", type=int, default=8)
    parser.add_argument("--operations-per-second", type=float, default=5.0, help="at most, in the phase upload")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each phase")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a steady request: long, to seldom begin anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/churn"))
    parser.set_defaults(concurrency=8)
    return parser


@dataclass(slots=True)
class Background:
    """What ran beside the steady stream. ``done`` counts operations by kind, ``failures`` what went wrong."""

    done: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def num_operations(self) -> int:
        return self.done.total() + self.failures.total()

    def as_dict(self) -> dict[str, Any]:
        return {
            "operations": dict(self.done),
            "seconds": percentiles(self.seconds),
            "failures": dict(self.failures),
        }


async def ask_in_turn(
    opened: OpenTarget,
    models: Sequence[str],
    rate: float,
    prompt_tokens: int,
    seed: int,
    stop: asyncio.Event,
    *,
    first: int = 0,
) -> Background:
    """Requests of one token at ``rate``, to ``models`` in turn from ``first``, until ``stop``. Prompts are distinct."""
    found = Background()
    asked = token_prompts(4096, prompt_tokens, opened.plain_tokens, seed)
    start = time.monotonic()
    tasks: set[asyncio.Task[None]] = set()

    async def one(number: int) -> None:
        request = PlannedRequest(
            number, time.monotonic() - start, models[(first + number) % len(models)], asked[number % 4096], 1
        )
        answer = Answer(request)
        await ask(opened.session, opened.target, answer, start, True)
        if answer.is_ok:
            found.done["request"] += 1
            found.seconds.append(answer.e2e_seconds)
        else:
            found.failures[str(answer.error)[:60]] += 1

    number = 0
    while not await _stopped(stop, max(0.0, number / rate - (time.monotonic() - start))):
        tasks.add(asyncio.create_task(one(number)))
        number += 1
    await asyncio.gather(*tasks)
    return found


def adapter_bodies(shape: Shape, rank: int, seed: int, count: int) -> list[dict[str, bytes]]:
    """Files of ``count`` adapters of different content: one made in full, the others it with two numbers changed.

    Made before the phase begins, so that the client's own work is no part of it.
    """
    from safetensors.torch import save

    whole = save(adapter_tensors(shape, rank, seed), metadata={"format": "pt"})
    config = json.dumps(adapter_config(shape, rank)).encode()
    made = []
    for number in range(count):
        changed = bytearray(whole)
        # The last two bfloat16 numbers of the file; the high byte keeps them near 0.01 whatever the low byte is.
        changed[-4:] = bytes((number % 256, 0x3C, number // 256 % 256, 0x3C))
        made.append({"adapter_config.json": config, "adapter_model.safetensors": bytes(changed)})
    return made


async def register_replace_delete(
    opened: OpenTarget, bodies: Sequence[dict[str, bytes]], rate: float, prefix: str, stop: asyncio.Event
) -> Background:
    """Registers a name, replaces it, deletes it, and so on with the next, one operation at a time, until ``stop``; what
    has begun with a name is then brought to its end, so that the server is left as it was found."""
    found = Background()
    url, session = opened.target.url, opened.session
    start = time.monotonic()
    kinds = ("register", "replace", "delete")
    number = 0
    while not await _stopped(stop, max(0.0, number / rate - (time.monotonic() - start))) or number % 3:
        kind, name = kinds[number % 3], f"{prefix}-{number // 3}"
        before = time.monotonic()
        try:
            if kind == "delete":
                await delete(session, url, name)
            else:
                body = bodies[(number - number // 3) % len(bodies)]
                await upload(session, url, name, body)
            found.done[kind] += 1
            found.seconds.append(time.monotonic() - before)
        except PeerFailed as problem:
            found.failures[str(problem)[:80]] += 1
        number += 1
    return found


async def _stopped(stop: asyncio.Event, seconds: float) -> bool:
    """Waits for ``seconds`` or the end, whichever is first; True at the end."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds) if seconds > 0 else await asyncio.sleep(0)
    return stop.is_set()


class Churn:
    """The phases of one run on one server."""

    def __init__(self, given: argparse.Namespace, opened: OpenTarget) -> None:
        adapters = opened.target.adapters
        if len(adapters) < given.steady + 2:
            raise ValueError(
                f"the server holds {len(adapters)} adapters; {given.steady} steady ones and at least 2 more are needed"
            )
        self._given, self._opened = given, opened
        self.steady = adapters[: given.steady]
        self.others = adapters[given.steady :]
        self.num_asked = 0  # of the others, in the phases load so far
        self._bodies: list[dict[str, bytes]] = []
        if "upload" in given.phases:
            shape = opened.fixture.shape if opened.fixture else None
            if shape is None:
                raise ValueError("the phase upload needs --fixture, which knows the shape of an adapter")
            count = int(given.operations_per_second * given.seconds * 2) + 8
            self._bodies = adapter_bodies(shape, given.upload_rank, given.seed + 77, min(count, 512))

    async def phase(self, name: str, steady: SteadyStreams, seed: int, *, seconds: float) -> dict[str, Any]:
        """What ran beside the streams, and from when to when: the gaps are read when the streams have ended."""
        opened = self._opened
        before = await scrape(opened.session, opened.target.url)
        stop = asyncio.Event()
        begin = steady.now()
        beside = asyncio.create_task(self._beside(name, seed, stop))
        await asyncio.sleep(seconds)
        end = steady.now()
        stop.set()
        background = await beside
        await asyncio.sleep(SETTLE_SECONDS)
        after = await scrape(opened.session, opened.target.url)
        counted = {key: total(after, *what) - total(before, *what) for key, what in COUNTED.items()}
        return {"window": (begin, end), "background": background.as_dict(), "counted": counted}

    async def _beside(self, name: str, seed: int, stop: asyncio.Event) -> Background:
        given, opened = self._given, self._opened
        rate, tokens = given.background_rate, given.background_prompt_tokens
        if name == "resident":
            return await ask_in_turn(opened, self.others[:1], rate, tokens, seed + 1, stop)
        if name == "load":
            found = await ask_in_turn(opened, self.others[1:], rate, tokens, seed + 1, stop, first=self.num_asked)
            self.num_asked += found.num_operations
            return found
        if name == "upload":
            return await register_replace_delete(
                opened, self._bodies, given.operations_per_second, f"churn-{seed}", stop
            )
        await stop.wait()
        return Background()


async def run_churn(given: argparse.Namespace) -> dict[str, Any]:
    phases = [name for name in given.phases.split(",") if name]
    unknown = [name for name in phases if name not in PHASES]
    if unknown or "quiet" not in phases:
        raise ValueError(f"--phases is {given.phases!r}; it must hold quiet and be of {', '.join(PHASES)}")
    async with open_target(given) as opened:
        churn = Churn(given, opened)
        rounds = []
        async with steady_streams(
            opened, churn.steady, prompt_tokens=given.prompt_tokens, max_tokens=given.max_tokens, seed=given.seed
        ) as steady:
            await churn.phase("load", steady, 9_999_999, seconds=given.seconds)  # warm-up, left out; it fills the slots
            for number in range(given.rounds):
                order = list(phases)
                random.Random(f"{given.seed} {number}").shuffle(order)
                results = {}
                for place, name in enumerate(order):
                    seed = 100_000 * given.seed + 100 * (number + 1) + place
                    results[name] = await churn.phase(name, steady, seed, seconds=given.seconds)
                rounds.append({"round": number, "order": order, "results": results})
                print(f"round {number} of {given.rounds} done", flush=True)
        windows = {name: [entry["results"][name].pop("window") for entry in rounds] for name in phases}
        for name in phases:
            for entry, window in zip(rounds, windows[name], strict=True):
                entry["results"][name] |= steady.over([window])
        parameters = {
            "steady": given.steady,
            "other_adapters": min(len(churn.others) - 1, churn.num_asked),
            "background_rate": given.background_rate,
            "background_prompt_tokens": given.background_prompt_tokens,
            "operations_per_second": given.operations_per_second,
            "upload_rank": given.upload_rank,
            "seconds": given.seconds,
            "rounds": given.rounds,
            "prompt_tokens": given.prompt_tokens,
            "max_tokens": given.max_tokens,
        }
        streams = {"num_requests": len(steady.answers), "failures": steady.failures()}
        head = stamp("churn", given.seed, parameters)
        whole = {name: steady.over(windows[name]) for name in phases}
        return {**head, "server": opened.described(), "steady": streams, "whole": whole, "rounds": rounds}


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments().parse_args(argv)
    try:
        made = run_until_done(run_churn(given))
    except (ValueError, PeerFailed, TimeoutError) as problem:
        print(f"loadtest: {problem}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "record.json").write_text(json.dumps(made, indent=1) + "\n")
    draw_churn(made, given.out / "itl_under_churn.png")
    for entry in made["rounds"]:
        load = entry["results"].get("load")
        if load and not load["counted"]["evictions"]:
            print(f"loadtest: round {entry['round']} evicted nothing; give the server fewer slots", file=sys.stderr)
    if made["steady"]["failures"]:
        print(f"loadtest: steady requests failed: {made['steady']['failures']}", file=sys.stderr)
        return 1
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
