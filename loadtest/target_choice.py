"""Which server a command loads: one that runs already (``--url``), or one it starts itself around a fixture."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from loadtest.client import Target, find_target, open_session
from loadtest.peers.peer import PeerFailed, Setup
from loadtest.peers.process import running
from loadtest.peers.settings import peers, read
from loadtest.small import Fixture

EMBEDDED_PLAIN_TOKENS = (6, 2048)
"""The embedded base's ids that are no control tokens."""


@dataclass(frozen=True, slots=True)
class OpenTarget:
    """A server to load. ``fixture`` is None for one that ran already."""

    session: aiohttp.ClientSession
    target: Target
    plain_tokens: tuple[int, int]
    fixture: Fixture | None = None
    options: tuple[str, ...] = ()

    def described(self) -> dict:
        """What the record says of it."""
        told = {
            "version": dict(self.target.version),
            "base": self.target.base,
            "num_adapters": len(self.target.adapters),
            "options": list(self.options),
        }
        return told if self.fixture is None else {**told, "layers": self.fixture.shape.layers}


def add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=None, help="a running server on this machine")
    parser.add_argument("--fixture", type=Path, default=None, help="folder of loadtest.small: start a server around it")
    parser.add_argument("--server", default="deltaserve", help="which server to start (with --fixture)")
    parser.add_argument("--peers", type=Path, default=None, help="TOML file that says where the servers are")
    parser.add_argument("--server-option", action="append", default=[], help="one more word of its command line")
    parser.add_argument("--num-adapters", type=int, default=None, help="adapters to register; default: all")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("runs/servers"), help="stores, converted files and logs")
    parser.add_argument("--api-key", default=None)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds one request may take")
    low, high = EMBEDDED_PLAIN_TOKENS
    parser.add_argument(
        "--plain-tokens", default=f"{low}:{high}", metavar="LOW:HIGH", help="ids of prompts (with --url)"
    )


@asynccontextmanager
async def open_target(given: argparse.Namespace) -> AsyncIterator[OpenTarget]:
    """Raises ``ValueError`` for flags that make no sense, ``PeerFailed`` when the server is not to be had."""
    if (given.url is None) == (given.fixture is None):
        raise ValueError("give either --url or --fixture")
    async with open_session(api_key=given.api_key, timeout_seconds=given.timeout) as session:
        if given.url is not None:
            low, _, high = given.plain_tokens.partition(":")
            try:
                target = await find_target(session, given.url)
            except aiohttp.ClientError as problem:
                raise PeerFailed(f"{given.url} does not answer like a server: {problem}") from problem
            yield OpenTarget(session, target, (int(low), int(high)))
            return
        fixture = Fixture.read(given.fixture)
        settings = read(given.peers)
        section = settings.setdefault("deltaserve", {}) if given.server.startswith("deltaserve") else {}
        section["options"] = [*section.get("options", ()), *given.server_option]
        known = peers(settings)
        if given.server not in known:
            raise ValueError(f"--server is {given.server!r}; it must be one of {', '.join(known)}")
        peer = known[given.server]
        reason = peer.missing()
        if reason:
            raise PeerFailed(f"{peer.name} is not present: {reason}")
        adapters = tuple(fixture.adapters)[: given.num_adapters]
        setup = Setup(fixture, adapters, given.work, settings.get("threads", 2), given.concurrency)
        peer.prepare(setup)
        async with running(peer, setup, session) as target:
            yield OpenTarget(session, target, fixture.plain_tokens, fixture, peer.options)
