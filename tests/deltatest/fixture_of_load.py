"""The load test's fixture at a size that tests can afford, and a driver of the fake peer."""

from __future__ import annotations

import sys
from pathlib import Path

import aiohttp

from loadtest.client import Target
from loadtest.peers.peer import Command, Setup, get_json
from loadtest.small import Shape

TINY = Shape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=96, vocab=900, max_len=512)
SCRIPT = Path(__file__).with_name("fake_peer.py")


class FakePeer:
    """A driver like any other, of ``fake_peer.py``."""

    ready_path = "/health"

    def __init__(
        self, name: str, *options: str, reason: str | None = None, serves_adapters: bool = True, base: str = "small"
    ) -> None:
        self.name = name
        self.options = options
        self.serves_adapters = serves_adapters
        self._reason = reason
        self._base = base

    def missing(self) -> str | None:
        return self._reason

    def prepare(self, setup: Setup) -> None:
        """Nothing to convert."""

    def command(self, setup: Setup, port: int) -> Command:
        adapters = ",".join(setup.adapters if self.serves_adapters else ())
        words = (sys.executable, str(SCRIPT), "--port", str(port), "--name", self.name, "--adapters", adapters)
        return Command((*words, *self.options), setup.environment)

    async def admit(self, session: aiohttp.ClientSession, url: str, setup: Setup) -> Target:
        adapters = setup.adapters if self.serves_adapters else ()
        return Target(url, self._base, adapters, version=await get_json(session, f"{url}/version"))
