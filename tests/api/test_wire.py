"""Raw bytes on a socket: broken HTTP, slow senders, slow readers, clients that vanish."""

from __future__ import annotations

import dataclasses
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from deltaserve.api.server import DeadlineProtocol
from deltaserve.config import ServeConfig
from deltatest.fake_engine import BASE, FakeEngine
from deltatest.live_server import LiveServer, serve

BODY = json.dumps({"model": BASE, "prompt": "user", "max_tokens": 3}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def post(body: bytes = BODY, *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return HEAD + lines + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def read_until(connection: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        chunk = connection.recv(65536)
        assert chunk, data
        data += chunk
    return data


@pytest.fixture
def impatient(app: FastAPI, config: ServeConfig) -> Iterator[LiveServer]:
    """A server that waits half a second for a request."""
    with serve(app, dataclasses.replace(config, receive_timeout_seconds=0.5)) as server:
        yield server


HOSTILE = {
    "not http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50 + b"\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "bad version": b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "bad method": b"G\x00T / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "space in header": b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
    "huge header": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
    "huge target": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "negative length": HEAD + b"Content-Length: -5\r\n\r\nhello",
    "length and chunks": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bad chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
    "unknown coding": HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
    "two hosts": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
    "escaped path": b"GET /v1/models/%00%ff%2e%2e/..%2f HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "bad escape": b"GET /v1/%zz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "bytes in id": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: \xff\xfe\r\nConnection: close\r\n\r\n",
    "bytes in key": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\r\n\r\n",
    "upgrade": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "absolute target": b"GET http://evil/v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "options star": b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "trace": b"TRACE / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "empty json": post(b""),
    "binary body": post(bytes(range(256))),
    "deep body": post(b"[" * 500_000),
    "bad multipart": (
        b"POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        b"Connection: close\r\nContent-Length: 9\r\n\r\n--y\r\n\r\n\r\n"
    ),
    "no boundary": (
        b"POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data\r\n"
        b"Connection: close\r\nContent-Length: 2\r\n\r\nxx"
    ),
    "bad limit": b"GET /v1/adapters?limit=\xc2\xb2&after=%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
}


def test_hostile_bytes_never_give_a_server_error(impatient: LiveServer) -> None:
    for name, data in HOSTILE.items():
        answer = impatient.exchange(data, timeout=0.7)
        assert status_of(answer) in (0, *range(200, 500)), (name, answer[:300])
        if 400 <= status_of(answer) < 500 and b"\r\n\r\n" in answer and name not in ("trace",):
            body = answer.split(b"\r\n\r\n", 1)[1]
            assert b'"error"' in body, (name, answer[:400])
    assert status_of(impatient.exchange(post())) == 200


def test_slow_heads_and_bodies_are_closed(impatient: LiveServer) -> None:
    for name, data in {
        "nothing": b"",
        "half a head": HEAD,
        "half a body": HEAD + b"Content-Length: 100\r\n\r\n{",
        "endless chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
    }.items():
        started = time.monotonic()
        answer = impatient.exchange(data)
        assert 0.3 < time.monotonic() - started < 3, name
        assert status_of(answer) == 408, (name, answer)
        assert b"request_timeout" in answer


def test_trickled_bytes_do_not_buy_time(impatient: LiveServer) -> None:
    def trickle(connection: socket.socket) -> None:
        for byte in HEAD * 2:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)

    started = time.monotonic()
    with impatient.connect() as connection, pytest.raises(OSError):
        trickle(connection)
    assert time.monotonic() - started < 3


def test_a_second_request_on_a_connection_has_its_own_deadline(impatient: LiveServer) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with impatient.connect() as connection:
        connection.sendall(request)
        assert b"live" in read_until(connection, b"}")
        time.sleep(0.8)  # an idle connection is not a slow request
        connection.sendall(request)
        assert b"live" in read_until(connection, b"}")
        connection.sendall(request[:20])
        assert status_of(connection.recv(65536)) == 408
        assert connection.recv(65536) == b""


def test_a_long_answer_is_not_a_slow_request(impatient: LiveServer, engine: FakeEngine) -> None:
    engine.step_seconds = 0.3
    answer = impatient.exchange(post())
    assert status_of(answer) == 200


def test_slow_sockets_do_not_hold_up_others(impatient: LiveServer) -> None:
    slow = [impatient.connect() for _ in range(100)]
    try:
        for connection in slow:
            connection.sendall(HEAD)
        started = time.monotonic()
        assert status_of(impatient.exchange(post())) == 200
        assert time.monotonic() - started < 1
    finally:
        for connection in slow:
            connection.close()


def test_a_stalled_reader_is_cut(live: LiveServer, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    connected = DeadlineProtocol.connection_made

    def with_small_buffer(self: DeadlineProtocol, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        connected(self, transport)

    monkeypatch.setattr(DeadlineProtocol, "connection_made", with_small_buffer)
    monkeypatch.setattr(DeadlineProtocol, "write_stall_seconds", 0.3)
    engine.max_model_len = 40_000
    engine.tokens_per_step = 50
    engine.script = lambda request, index: [40] * 5000
    body = json.dumps({"model": BASE, "prompt": "user", "max_tokens": 5000, "stream": True, "logprobs": 5}).encode()
    with live.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(post(body))
        deadline = time.monotonic() + 10
        while not engine.aborted:
            assert time.monotonic() < deadline, "the stalled stream still runs"
            time.sleep(0.02)
    assert engine.num_open == 0


def test_vanishing_at_any_point_leaves_nothing_open(live: LiveServer, engine: FakeEngine) -> None:
    engine.step_seconds = 0.01
    engine.script = lambda request, index: [40] * 300
    whole = post(json.dumps({"model": BASE, "prompt": "user", "max_tokens": 300, "stream": True}).encode())
    for i in range(30):
        with live.connect() as connection:
            connection.sendall(whole[: len(whole) if i % 2 else 10 + 5 * i])
            if i % 4 == 1:
                connection.recv(100)
            if i % 3 == 0:  # a reset instead of an orderly end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    deadline = time.monotonic() + 2
    while engine.num_open:
        assert time.monotonic() < deadline, f"{engine.num_open} requests are still open"
        time.sleep(0.01)
    assert status_of(live.exchange(post())) == 200


def test_expect_continue(live: LiveServer) -> None:
    with live.connect() as connection:
        connection.sendall(
            HEAD + b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY)
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 100")
        connection.sendall(BODY)
        assert b"200 OK" in read_until(connection, b"}")
