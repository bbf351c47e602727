"""A closed loop of streamed completions over plain sockets, in one thread.

The cheapest client that still reads every byte: on a machine whose cores the server needs, a client that parses each
event would be most of what is measured. It checks status, error events and the token counts of the usage chunks.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Request = Mapping[str, Any]
"""``model``, ``prompt`` (token ids), ``max_tokens``."""
Plan = Sequence[Sequence[Request]]
"""Requests by stream."""

_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
_USAGE = re.compile(rb'"completion_tokens":(\d+)')
_TIMEOUT_SECONDS = 300.0
_KEPT_BYTES = 1 << 12
"""Of an answer's end: the usage chunk and ``[DONE]``."""


@dataclass(frozen=True, slots=True)
class LoopResult:
    tokens: int
    seconds: float
    client_cpu_seconds: float


@dataclass(slots=True)
class _Stream:
    """One connection; ``requests`` are still to be sent, the next one last."""

    connection: socket.socket
    requests: list[bytes]
    head: bytes = b""
    tail: bytes = field(default=b"", repr=False)

    def send_next(self) -> bool:
        if not self.requests:
            return False
        self.head = self.tail = b""
        self.connection.setblocking(True)
        self.connection.sendall(self.requests.pop())
        self.connection.setblocking(False)
        return True


def request_bytes(port: int, request: Request) -> bytes:
    body = {
        **request,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data


def run_closed_loop(port: int, plan: Plan) -> LoopResult:
    """All streams start together on 127.0.0.1; each sends its next request when it has its answer.

    Raises ``RuntimeError`` for anything but complete answers.
    """
    streams = []
    for own in plan:
        connection = socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_SECONDS)
        requests = [request_bytes(port, request) for request in reversed(own)]
        streams.append(_Stream(connection, requests))
    try:
        with selectors.DefaultSelector() as selector:
            return _run(selector, streams)
    finally:
        for stream in streams:
            stream.connection.close()


def _run(selector: selectors.BaseSelector, streams: list[_Stream]) -> LoopResult:
    began, cpu_before = time.monotonic(), time.process_time()
    num_open = tokens = 0
    for stream in streams:
        if stream.send_next():
            selector.register(stream.connection, selectors.EVENT_READ, stream)
            num_open += 1
    while num_open:
        ready = selector.select(_TIMEOUT_SECONDS)
        if not ready:
            raise RuntimeError(f"nothing came for {_TIMEOUT_SECONDS:.0f} seconds")
        for key, _ in ready:
            stream = key.data
            data = stream.connection.recv(1 << 18)
            if not _take(stream, data):
                continue
            tokens += _count(stream)
            if not stream.send_next():
                selector.unregister(stream.connection)
                num_open -= 1
    return LoopResult(tokens, time.monotonic() - began, time.process_time() - cpu_before)


def _take(stream: _Stream, data: bytes) -> bool:
    """Whether the answer is complete now."""
    if not stream.head:
        stream.head = data
        if data and not data.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(f"the server answered {data[:300]!r}")
    stream.tail = (stream.tail + data)[-_KEPT_BYTES:]
    if stream.tail.endswith(_END):
        return True
    if not data or b'data: {"error"' in data:
        raise RuntimeError(f"a stream failed; it ends with {stream.tail[-300:]!r}")
    return False


def _count(stream: _Stream) -> int:
    found = _USAGE.findall(stream.tail)
    if not found:
        raise RuntimeError("a stream ended without usage")
    return int(found[-1])
