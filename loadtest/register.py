"""Registers a fixture's adapters with a server's store, so that the runs that follow find them proven.

    python -m loadtest.register FIXTURE --num-adapters 1000 --work runs/servers

The other commands do it by themselves, but the door takes its time for each adapter: with this it lies outside a run
that wants the machine to itself. What is in the store already is left alone, so it may be stopped and started again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from loadtest.client import open_session
from loadtest.peers.deltaserve import DeltaserveServer
from loadtest.peers.peer import PeerFailed, Setup
from loadtest.peers.process import run_until_done, running
from loadtest.peers.settings import read
from loadtest.small import Fixture


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.register", description=__doc__.splitlines()[0])
    parser.add_argument("fixture", type=Path, help="folder of loadtest.small")
    parser.add_argument("--peers", type=Path, default=None, help="TOML file; [deltaserve] and threads are read")
    parser.add_argument("--num-adapters", type=int, default=None, help="default: all")
    parser.add_argument("--work", type=Path, default=Path("runs/servers"))
    return parser


async def register(given: argparse.Namespace) -> int:
    """How many adapters the store holds of those wanted. Raises ``ValueError`` for flags that make no sense."""
    settings, fixture = read(given.peers), Fixture.read(given.fixture)
    adapters = tuple(fixture.adapters)[: given.num_adapters]
    setup = Setup(fixture, adapters, given.work, settings.get("threads", 2))
    async with (
        open_session(timeout_seconds=600.0) as session,
        running(DeltaserveServer(settings.get("deltaserve", {})), setup, session) as target,
    ):
        return len(target.adapters)


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments().parse_args(argv)
    began = time.monotonic()
    try:
        count = run_until_done(register(given))
    except (ValueError, PeerFailed) as problem:
        print(f"loadtest: {problem}", file=sys.stderr)
        return 2
    print(f"{given.work} holds {count} adapters; {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
