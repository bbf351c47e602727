"""deltaserve itself, started as a user starts it; adapters go through its door over HTTP."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from loadtest.client import Target
from loadtest.peers.peer import Command, PeerFailed, Setup, get_json, missing_path
from loadtest.small import BASE_NAME


class DeltaserveServer:
    """The store stays in ``work`` between starts, so that each adapter is proven once per machine, not once a round.

    With ``has_adapters`` False the server holds none: the twin that base-only traffic is compared with. ``name`` gives
    a second one of a run its own store and log.
    """

    ready_path = "/health/ready"

    def __init__(self, settings: Mapping[str, Any], *, has_adapters: bool = True, name: str | None = None) -> None:
        self.name = name or ("deltaserve" if has_adapters else "deltaserve-base")
        self.serves_adapters = has_adapters
        self.options = tuple(str(word) for word in settings.get("options", ()))
        self._python = str(settings.get("python", sys.executable))
        self._environment = {key: str(value) for key, value in settings.get("environment", {}).items()}

    def missing(self) -> str | None:
        return missing_path(self._python, "python")

    def prepare(self, setup: Setup) -> None:
        """Nothing: it reads the fixture's files as they are."""

    def command(self, setup: Setup, port: int) -> Command:
        words = (self._python, "-c", "from deltaserve.cli import main; main()", "serve")
        options = ("--model", str(setup.fixture.base), "--served-model-name", BASE_NAME, "--port", str(port))
        store = ("--store", str(setup.work / f"{self.name}-store"), "--no-demo-adapters")
        return Command((*words, *options, *store, *self.options), {**setup.environment, **self._environment})

    async def admit(self, session: aiohttp.ClientSession, url: str, setup: Setup) -> Target:
        wanted = setup.adapters if self.serves_adapters else ()
        known = set(await adapter_names(session, url))
        for name in wanted:
            if name not in known:
                folder = setup.adapter_folder(name)
                await upload(session, url, name, {path.name: path for path in sorted(folder.iterdir())})
        return Target(url, BASE_NAME, tuple(wanted), version=await get_json(session, f"{url}/version"))


async def upload(
    session: aiohttp.ClientSession, url: str, name: str, files: Mapping[str, Path | bytes]
) -> dict[str, Any]:
    """One adapter through the door; returns it as the server lists it. Raises ``PeerFailed`` for a refusal."""
    form = aiohttp.FormData()
    form.add_field("name", name)
    for file, content in files.items():
        body = content if isinstance(content, bytes) else content.read_bytes()
        form.add_field("files", body, filename=file, content_type="application/octet-stream")
    try:
        async with session.post(f"{url}/v1/adapters", data=form) as response:
            answer = await response.json(content_type=None)
            if response.status not in (200, 201):
                raise PeerFailed(f"adapter {name} was answered {response.status}: {str(answer)[:300]}")
            return answer
    except (aiohttp.ClientError, TimeoutError, ValueError) as problem:
        raise PeerFailed(f"adapter {name} could not be sent: {type(problem).__name__} {problem}") from problem


async def delete(session: aiohttp.ClientSession, url: str, name: str) -> None:
    """Raises ``PeerFailed`` where the server refuses."""
    try:
        async with session.delete(f"{url}/v1/adapters/{name}") as response:
            if response.status != 200:
                raise PeerFailed(f"deleting {name} was answered {response.status}: {(await response.text())[:200]}")
    except (aiohttp.ClientError, TimeoutError) as problem:
        raise PeerFailed(f"{name} could not be deleted: {type(problem).__name__} {problem}") from problem


async def adapter_names(session: aiohttp.ClientSession, url: str) -> list[str]:
    """Every adapter that the server holds, page after page."""
    names: list[str] = []
    after = ""
    while True:
        page = await get_json(session, f"{url}/v1/adapters?limit=1000{after}")
        names += [item["id"] for item in page["data"]]
        if not page.get("has_more") or not page["data"]:
            return names
        after = f"&after={names[-1]}"
