"""What HTTP, tokenising and streaming cost: the same requests to the engine in its own process, and over HTTP.

    python -m loadtest.offline FIXTURE --concurrency 64 --rounds 5 --out runs/offline
    python -m loadtest.offline --concurrency 64 --rounds 5 --out runs/offline      # the embedded base

Both sides run in processes of their own that live for the whole run, hold the same adapters, and take turns in an order
drawn for each round; the one that waits computes nothing. Every stream sends its next request when it has its answer.

Two figures come of a round. ``cpu_cost``: the share of the server's CPU time per token that the engine alone does not
take; the client is not in it. ``cost``: the share of the offline throughput that was lost, which includes what the
client took of the same cores, and all waiting. ``waiting`` is what of ``cost`` goes beyond the growth of CPU time per
token. Where ``cores_busy`` of both sides is all cores, that is time lost to the interpreter lock; where cores idle, the
lock may be inside the rest too, and no figure here tells it apart.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from loadtest.client import open_session
from loadtest.lean_client import Plan
from loadtest.machine import stamp
from loadtest.offline_sides import SERVE, WORK, Offline, OverHttp, child
from loadtest.peers.deltaserve import DeltaserveServer
from loadtest.peers.peer import PeerFailed, Setup
from loadtest.peers.process import run_until_done, running
from loadtest.small import BASE_NAME, Fixture
from loadtest.workload import ClosedLoop, streams

SIDES = ("offline", "http")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.offline", description=__doc__.splitlines()[0])
    parser.add_argument("fixture", type=Path, nargs="?", help="folder of loadtest.small; default: the embedded base")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--requests-per-stream", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument(
        "--num-adapters", type=int, default=32, help="of the fixture's; the embedded base is asked alone"
    )
    parser.add_argument("--base-only", action="store_true", help="ask the base instead of the adapters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="OMP_NUM_THREADS of both sides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/servers"), help="stores and logs; kept between runs")
    parser.add_argument("--out", type=Path, default=Path("runs/offline"))
    return parser


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """The record of a run. Raises ``PeerFailed`` when a side fails or they did not generate as many tokens."""
    fixture = None if given.fixture is None else Fixture.read(given.fixture)
    adapters = () if fixture is None or given.base_only else tuple(fixture.adapters)[: given.num_adapters]
    given.work.mkdir(parents=True, exist_ok=True)
    stores = stores_of(given, fixture, adapters)
    with ExitStack() as stack:
        words = ["--served-model-name", BASE_NAME, "--max-num-seqs", str(given.concurrency)]
        words += [] if fixture is None else ["--model", str(fixture.base)]

        def start(side: str, first: Sequence[str]) -> Any:
            log = given.work / f"{side}-side.log"
            return stack.enter_context(child([*first, *words, "--store", str(stores[side])], given.threads, log))

        offline = Offline(start("offline", WORK))
        sides: dict[str, Offline | OverHttp] = {"offline": offline, "http": OverHttp(start("http", SERVE))}
        tokens = (0, offline.vocab_size) if fixture is None else fixture.plain_tokens
        models = adapters or (BASE_NAME,)
        for side in sides.values():
            side.run(plan_of(given, models, tokens, -1, min(8, given.max_tokens)))
        rounds = []
        for number in range(given.rounds):
            order = random.Random(f"{given.seed} {number}").sample(SIDES, len(SIDES))
            plan = plan_of(given, models, tokens, number, given.max_tokens)
            rounds.append(compare(number, order, {name: sides[name].run(plan) for name in order}))
            print(line_of(rounds[-1]), flush=True)
    return {**stamp("offline", given.seed, parameters_of(given, len(adapters))), "rounds": rounds}


def stores_of(given: argparse.Namespace, fixture: Fixture | None, adapters: Sequence[str]) -> dict[str, Path]:
    """A store for each side, the second a copy of the first: a store has one server. New adapters are proven first."""
    store = given.work / "deltaserve-store" if fixture is not None else given.work / "embedded-store"
    if fixture is not None and adapters:
        setup = Setup(fixture, tuple(adapters), given.work, given.threads, given.concurrency)

        async def register() -> None:
            async with open_session(timeout_seconds=600) as session, running(DeltaserveServer({}), setup, session):
                pass

        run_until_done(register())
    copy = given.work / "offline-store"
    shutil.rmtree(copy, ignore_errors=True)
    if store.exists():
        shutil.copytree(store, copy)
    return {"http": store, "offline": copy}


def plan_of(
    given: argparse.Namespace, models: Sequence[str], plain_tokens: tuple[int, int], number: int, max_tokens: int
) -> Plan:
    """No two rounds share a prompt, so that none meets another's prefix cache."""
    seed = 1000 * given.seed + number if number >= 0 else (1 << 31) + given.seed
    loop = ClosedLoop(
        given.concurrency,
        given.requests_per_stream,
        seed,
        prompt_tokens=given.prompt_tokens,
        max_tokens=max_tokens,
    )
    return [
        [{"model": each.model, "prompt": list(each.prompt), "max_tokens": each.max_tokens} for each in own]
        for own in streams(loop, models, plain_tokens)
    ]


def parameters_of(given: argparse.Namespace, num_adapters: int) -> dict[str, Any]:
    names = ("concurrency", "requests_per_stream", "prompt_tokens", "max_tokens", "threads", "rounds")
    base = "embedded" if given.fixture is None else BASE_NAME
    return {"base": base, "num_adapters": num_adapters, **{name: getattr(given, name) for name in names}}


def compare(number: int, order: Sequence[str], results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One round, see the module. Raises ``PeerFailed`` where the sides did other work."""
    offline, http = results["offline"], results["http"]
    tokens = http["tokens"]
    if offline["tokens"] != tokens:
        raise PeerFailed(f"offline generated {offline['tokens']} tokens and HTTP {tokens}; they cannot be compared")
    us = {
        "offline": 1e6 * offline["cpu_seconds"] / tokens,
        "server": 1e6 * http["cpu_seconds"] / tokens,
        "event_loop": 1e6 * http["event_loop_cpu_seconds"] / tokens,
        "client": 1e6 * http["client_cpu_seconds"] / tokens,
    }
    cost = 1 - offline["seconds"] / http["seconds"]
    explained = share_beyond(us["offline"], us["server"] + us["client"])
    return {
        "round": number,
        "order": list(order),
        "results": {
            name: {
                **result,
                "tokens_per_second": tokens / result["seconds"],
                "cores_busy": result["cpu_seconds"] / result["seconds"],
            }
            for name, result in results.items()
        },
        "cpu_us_per_token": us,
        "cpu_cost": share_beyond(us["offline"], us["server"]),
        "cost": cost,
        "waiting": cost - explained,
        "client_share_of_a_core": http["client_cpu_seconds"] / http["seconds"],
    }


def share_beyond(least: float, all_of_it: float) -> float:
    """The share of ``all_of_it`` beyond ``least``; 0 where the system tells no CPU times."""
    return 1 - least / all_of_it if all_of_it > 0 else 0.0


def line_of(made: Mapping[str, Any]) -> str:
    offline, http = (made["results"][name]["tokens_per_second"] for name in SIDES)
    us = made["cpu_us_per_token"]
    return (
        f"round {made['round']}: offline {offline:.0f} tokens/s, HTTP {http:.0f}, cost {100 * made['cost']:.1f} %, "
        f"of CPU {100 * made['cpu_cost']:.1f} %; us a token: engine alone {us['offline']:.0f}, "
        f"server {us['server']:.0f} (event loop {us['event_loop']:.0f}), client {us['client']:.0f}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments()
    given = parser.parse_args(argv)
    for name in ("concurrency", "requests_per_stream", "prompt_tokens", "max_tokens", "rounds", "threads"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(given, name)}; it must be at least 1")
    try:
        made = measure(given)
    except (ValueError, RuntimeError, PeerFailed) as problem:
        print(f"loadtest: {problem}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "record.json").write_text(json.dumps(made, indent=1) + "\n")
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
