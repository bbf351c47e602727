"""A real HTTP server on a free loopback port, in a thread of its own."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

from deltaserve.api.server import make_server
from deltaserve.config import ServeConfig


@dataclass(frozen=True)
class LiveServer:
    host: str
    port: int
    loop: asyncio.AbstractEventLoop
    server: uvicorn.Server

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=20)

    def exchange(self, data: bytes, *, timeout: float = 20) -> bytes:
        """Sends raw bytes on a new connection and reads until the server closes it (or has answered and waits)."""
        with self.connect() as connection:
            connection.settimeout(timeout)
            connection.sendall(data)
            received = b""
            try:
                while chunk := connection.recv(65536):
                    received += chunk
            except (TimeoutError, ConnectionResetError):
                pass
            return received


@contextmanager
def serve(app: FastAPI, config: ServeConfig) -> Iterator[LiveServer]:
    """Serves an application that needs nothing started."""

    @asynccontextmanager
    async def as_it_is() -> AsyncIterator[FastAPI]:
        yield app

    with serve_within(as_it_is, config) as live:
        yield live


@contextmanager
def serve_within(
    open_app: Callable[[], AbstractAsyncContextManager[FastAPI]], config: ServeConfig, *, start_seconds: float = 60
) -> Iterator[LiveServer]:
    """Serves the application that ``open_app`` opens on the server's own event loop and closes there at the end."""
    ready: queue.Queue[LiveServer | BaseException] = queue.Queue()
    servers: list[uvicorn.Server] = []

    async def main() -> None:
        async with open_app() as app:
            server = make_server(app, config)
            servers.append(server)
            teller = asyncio.create_task(_tell(server, ready))
            await server.serve()
            await teller

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=run, name="http", daemon=True)
    thread.start()
    try:
        live = ready.get(timeout=start_seconds)
        if isinstance(live, BaseException):
            raise live
        yield live
    finally:
        for server in servers:
            server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive(), "the server did not stop"


async def _tell(server: uvicorn.Server, ready: queue.Queue[LiveServer | BaseException]) -> None:
    while not server.started:
        await asyncio.sleep(0.005)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    ready.put(LiveServer(host, port, asyncio.get_running_loop(), server))
