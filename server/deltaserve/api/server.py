"""The HTTP server: uvicorn with h11, plus the deadlines that it lacks.

A request's head must arrive within ``receive_timeout_seconds``, its body at no less than ``MIN_BYTES_PER_SECOND`` after
the same grace, and a client that does not read its answer is cut off. Without these, a few hundred idle sockets hold a
server for ever.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from deltaserve.api.streaming import DIRECT_WRITER
from deltaserve.config import ServeConfig
from deltaserve.errors import DeltaserveError, InvalidRequest, RequestTimeout

MAX_HEADER_BYTES = 32 << 10
MIN_BYTES_PER_SECOND = 16 << 10
KEEP_ALIVE_SECONDS = 75
WRITE_STALL_SECONDS = 60.0
GRACE_SECONDS = 5
"""For sending the last answers once the engine has stopped."""


class ChunkWriter:
    """Writes parts of a response whose length is not told, past h11: with its state machine and the messages of ASGI's
    layers a part costs several times as much, and there is one for every token of every stream.

    h11 has chosen chunked framing when it wrote the head, keeps no state from chunk to chunk, and ends the body itself.
    """

    def __init__(self, protocol: H11Protocol) -> None:
        self._cycle = protocol.cycle
        self._flow = protocol.flow
        self._transport = protocol.transport

    def is_ready(self) -> bool:
        """False when a part must go through ``send``: nobody is there, or reads slowly."""
        cycle = self._cycle
        return not (self._flow.write_paused or cycle.disconnected or cycle.response_complete) and cycle.response_started

    def write(self, data: bytes) -> None:
        if data:  # an empty chunk is how a body ends
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class DeadlineProtocol(H11Protocol):
    """One connection. One timer at a time watches the request being received, another a stalled write."""

    receive_timeout_seconds = 20.0
    write_stall_seconds = WRITE_STALL_SECONDS

    _timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _phase: str | None = None
    _phase_started = 0.0
    _num_received = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.app = self._offer_direct_writer

    async def _offer_direct_writer(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["http_version"] == "1.1":  # what it knows how to frame
            scope.setdefault("extensions", {})[DIRECT_WRITER] = ChunkWriter(self)
        await self.config.loaded_app(scope, receive, send)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._watch()

    def data_received(self, data: bytes) -> None:
        self._num_received += len(data)
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.write_stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP at all also hears in OpenAI's shape."""
        self._answer_raw(400, "Bad Request", InvalidRequest("this is not a valid HTTP request", code="invalid_http"))

    def _watch(self) -> None:
        """Starts the timer of a phase when the connection enters it: ``head``, ``body``, or none."""
        phase = self._current_phase()
        if phase == self._phase:
            return
        self._phase = phase
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if phase is not None:
            self._phase_started, self._num_received = time.monotonic(), 0
            self._timer = self.loop.call_later(self.receive_timeout_seconds, self._check_deadline)

    def _current_phase(self) -> str | None:
        if self.transport.is_closing():
            return None
        if self.conn.their_state is h11.IDLE:
            is_idle = self.cycle is not None and not self.conn.trailing_data[0]
            return None if is_idle else "head"  # between requests the keep-alive timer watches
        return "body" if self.conn.their_state is h11.SEND_BODY else None

    def _check_deadline(self) -> None:
        """A body buys time with its bytes; time in which we did not read is not the client's."""
        if self.transport.is_closing() or self._phase is None:
            return
        left = 0.0
        if self._phase == "body":
            elapsed = time.monotonic() - self._phase_started
            left = self.receive_timeout_seconds + self._num_received / MIN_BYTES_PER_SECOND - elapsed
            if self.flow.read_paused:
                left = max(left, 1.0)
        if left > 0.001:
            self._timer = self.loop.call_later(left, self._check_deadline)
            return
        self._answer_raw(408, "Request Timeout", RequestTimeout("the request did not arrive in time"))

    def _answer_raw(self, status: int, phrase: str, error: DeltaserveError) -> None:
        """Answers past h11, whose state may not allow a response, and closes."""
        cycle = self.cycle
        if cycle is not None and cycle.response_started and self._phase == "body":
            self.transport.close()  # it has its answer and still sends
            return
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        body = json.dumps({"error": error.body()}).encode()
        head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()


class DrainingServer(uvicorn.Server):
    """On SIGINT or SIGTERM the engine drains while answers are still being sent: what does not finish in time ends
    with an error that its client can read, never with a cut connection."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._drain = drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn raises the signal again when it is done, which would end the process before the store, its lock and
        the threads are given back; the caller of ``serve`` ends the process instead. A second SIGINT stops waiting."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.ensure_future(self._drain())
        await super().shutdown(sockets)
        await draining


def make_server(app: FastAPI, config: ServeConfig) -> uvicorn.Server:
    """A server for ``config.host`` and ``config.port``; logging is left as the program set it up."""

    class Protocol(DeadlineProtocol):
        receive_timeout_seconds = config.receive_timeout_seconds

    async def drain() -> None:
        await app.state.services.engine.stop(config.drain_seconds)

    settings: dict[str, Any] = {
        "host": config.host,
        "port": config.port,
        "http": Protocol,
        "ws": "none",
        "loop": "asyncio",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "timeout_keep_alive": KEEP_ALIVE_SECONDS,
        "h11_max_incomplete_event_size": MAX_HEADER_BYTES,
        "timeout_graceful_shutdown": int(config.drain_seconds) + GRACE_SECONDS,
        "backlog": 2048,
    }
    return DrainingServer(uvicorn.Config(app, **settings), drain)
