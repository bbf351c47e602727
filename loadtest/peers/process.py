"""One server at a time: started in a process group of its own, waited for, and stopped by that group."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import aiohttp

from loadtest.client import Target
from loadtest.peers.peer import Peer, PeerFailed, Setup

Result = TypeVar("Result")
POLL_SECONDS = 0.25
STOP_SECONDS = 30.0
TAIL_BYTES = 2000


def run_until_done(main: Coroutine[Any, Any, Result]) -> Result:
    """``asyncio.run`` for commands that start servers: SIGTERM unwinds like Ctrl-C, so that no server is left behind.

    Raises ``SystemExit`` with 143 then.
    """

    async def guarded() -> Result:
        task = asyncio.current_task()
        with suppress(RuntimeError, ValueError):  # signals reach the main thread only
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, cast(asyncio.Task, task).cancel)
        return await main

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        raise SystemExit(128 + signal.SIGTERM) from None


@asynccontextmanager
async def running(
    peer: Peer, setup: Setup, session: aiohttp.ClientSession, *, start_seconds: float = 600.0
) -> AsyncIterator[Target]:
    """The server started, ready, and holding its adapters; stopped at the end whatever happens.

    Its output goes to ``work/<name>.log``. Raises ``PeerFailed`` with the end of that file.
    """
    setup.work.mkdir(parents=True, exist_ok=True)
    port = free_port()
    log = setup.work / f"{peer.name}.log"
    command = peer.command(setup, port)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command.words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in {**os.environ, **command.environment}.items() if value},
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        await wait_ready(session, f"{url}{peer.ready_path}", process, start_seconds)
        yield await peer.admit(session, url, setup)
    except PeerFailed as problem:
        raise PeerFailed(f"{peer.name}: {problem}\n{tail(log)}") from problem
    finally:
        await stop(process)


async def wait_ready(
    session: aiohttp.ClientSession, address: str, process: subprocess.Popen, start_seconds: float
) -> None:
    """Until ``address`` answers 200. Raises ``PeerFailed`` when the process ends or the time is over."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + start_seconds
    while loop.time() < deadline:
        if process.poll() is not None:
            raise PeerFailed(f"ended with status {process.returncode} before it was ready")
        try:
            async with session.get(address, timeout=aiohttp.ClientTimeout(total=5)) as response:
                if response.status == 200:
                    return
        except (aiohttp.ClientError, TimeoutError):
            pass
        await asyncio.sleep(POLL_SECONDS)
    raise PeerFailed(f"was not ready after {start_seconds:g} s")


async def stop(process: subprocess.Popen) -> None:
    """Ends the group: politely, and after ``STOP_SECONDS`` for good. Workers that outlive their parent end too."""
    _signal(process.pid, signal.SIGTERM)
    with suppress(TimeoutError):
        await asyncio.wait_for(asyncio.to_thread(process.wait), STOP_SECONDS)
    _signal(process.pid, signal.SIGKILL)
    await asyncio.to_thread(process.wait)


def _signal(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(log: Path) -> str:
    try:
        return log.read_bytes()[-TAIL_BYTES:].decode("utf-8", "replace")
    except OSError:
        return ""
