"""What a driver is, and the failures of the servers it drives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from loadtest.client import Target
from loadtest.small import Fixture


class PeerFailed(Exception):
    """A server that is there did not start, did not become ready, or could not be given its adapters."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What every server of a run is given: one base, its adapters, threads. ``work`` is kept between runs."""

    fixture: Fixture
    adapters: tuple[str, ...]
    work: Path
    threads: int = 2
    concurrency: int = 32

    @property
    def max_rank(self) -> int:
        return max((self.fixture.adapters[name][0] for name in self.adapters), default=1)

    def adapter_folder(self, name: str) -> Path:
        return self.fixture.adapters[name][1]

    @property
    def environment(self) -> dict[str, str]:
        """The one threads setting, and no way to the network."""
        return {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True, slots=True)
class Command:
    """How a server is started. ``environment`` is added to the caller's; an empty value takes the variable away."""

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


class Peer(Protocol):
    """A driver. ``options`` are what the user adds to the command line; they are written into the record."""

    name: str
    ready_path: str
    options: tuple[str, ...]
    serves_adapters: bool

    def missing(self) -> str | None:
        """Why the server cannot be started here; None when it is present."""
        ...

    def prepare(self, setup: Setup) -> None:
        """What must be done once before the first start (file conversion). Blocking; raises ``PeerFailed``."""
        ...

    def command(self, setup: Setup, port: int) -> Command: ...

    async def admit(self, session: aiohttp.ClientSession, url: str, setup: Setup) -> Target:
        """Once ready: give it the adapters it was not started with, and tell how requests name them."""
        ...


def missing_path(path: str | None, what: str) -> str | None:
    if not path:
        return f"no {what} is given"
    return None if Path(path).exists() else f"{what} {path} is not there"


async def get_json(session: aiohttp.ClientSession, address: str) -> Any:
    """Raises ``PeerFailed`` for anything but 200 and JSON."""
    try:
        async with session.get(address) as response:
            if response.status != 200:
                raise PeerFailed(f"{address} answered {response.status}: {(await response.text())[:200]}")
            return await response.json(content_type=None)
    except (aiohttp.ClientError, TimeoutError, ValueError) as problem:
        raise PeerFailed(f"{address} did not answer: {problem}") from problem
