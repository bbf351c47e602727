"""A real HTTP server on a free loopback port, in a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    server = make_server(app, config)
    loops: list[asyncio.AbstractEventLoop] = []

    def run() -> None:
        async def main() -> None:
            loops.append(asyncio.get_running_loop())
            await server.serve()

        asyncio.run(main())

    thread = threading.Thread(target=run, name="http", daemon=True)
    thread.start()
    try:
        host, port = _address(server, thread)
        yield LiveServer(host, port, loops[0], server)
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive(), "the server did not stop"


def _address(server: uvicorn.Server, thread: threading.Thread) -> tuple[str, int]:
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < deadline, "the server took too long to start"
        time.sleep(0.005)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    return host, port
