"""Chunks written within the engine's delivery: what a client that dawdles, leaves or is hit by a bug makes of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deltaserve.api.app import create_app
from deltaserve.api.choice import Choice
from deltaserve.config import ServeConfig
from deltaserve.core import FinishReason, GenerationRequest, RequestOutput, SequenceDelta
from deltaserve.engine.stream import RequestStream
from deltaserve.metrics import Metrics
from deltatest.fake_engine import BASE, FakeAdmission, FakeEngine, FakeStore
from deltatest.live_server import LiveServer, serve
from deltatest.tokenizers import byte_level

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
LETTERS = [byte_level().encode(letter, add_special_tokens=False)[0] for letter in ALPHABET]


class PushedEngine(FakeEngine):
    """Outputs come when the test says so, as the engine's thread delivers them: in a callback of the event loop."""

    def __init__(self) -> None:
        super().__init__(max_model_len=1 << 20)
        self.streams: dict[str, RequestStream] = {}

    def submit(self, request: GenerationRequest) -> RequestStream:  # type: ignore[override]
        request_id = request.request_id
        self.requests.append(request)
        stream = RequestStream(
            request_id,
            abort=lambda: self.aborted.append(request_id),
            stop=lambda index: self.stopped.append((request_id, index)),
        )
        self.streams[request_id] = stream
        return stream


@pytest.fixture
def engine() -> PushedEngine:
    return PushedEngine()


@pytest.fixture
def live(engine: PushedEngine, config: ServeConfig, tmp_path: Path) -> Iterator[LiveServer]:
    store = FakeStore(tmp_path / "scratch")
    metrics = Metrics(version="test")
    with serve(create_app(engine, FakeAdmission(engine), store, engine.tokenizer, metrics, config), config) as server:
        yield server


def on_loop(live: LiveServer, work: Callable[[], Any]) -> Any:
    """``work()`` in one callback of the server's loop."""
    done, results = threading.Event(), []
    live.loop.call_soon_threadsafe(lambda: (results.append(work()), done.set()))
    assert done.wait(20)
    return results[0]


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.005)


def head_and_body(**fields: Any) -> bytes:
    body = json.dumps({"model": BASE, "prompt": "x", "max_tokens": 100_000, "stream": True, **fields}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def output(name: str, number: int, *, end: bool = False) -> RequestOutput:
    reason = FinishReason.LENGTH if end else None
    return RequestOutput(name, (SequenceDelta(0, (LETTERS[number % 26],), (), reason),), end, 1)


def only(engine: PushedEngine) -> tuple[str, RequestStream]:
    wait_until(lambda: bool(engine.streams))
    ((name, stream),) = engine.streams.items()
    return name, stream


def read_answer(connection: Any, start: bytes = b"") -> bytes:
    received = [start]
    while not received[-1].endswith(b"0\r\n\r\n"):
        received.append(connection.recv(1 << 16))
        assert received[-1], b"".join(received)[-300:]
    return b"".join(received)


def text_of(answer: bytes) -> str:
    lines = [line[6:] for line in answer.split(b"\n") if line.startswith(b"data: {")]
    return "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"])


def test_a_reader_that_stops_reading_fills_no_buffer_and_gets_all_in_order_later(
    live: LiveServer, engine: PushedEngine
) -> None:
    steps, per_step = 300, 100
    with live.connect() as connection:
        connection.sendall(head_and_body())
        name, stream = only(engine)
        sizes = []
        for step in range(steps):

            def deliver(step: int = step) -> int:
                for number in range(step * per_step, (step + 1) * per_step):
                    stream.push(output(name, number))
                (protocol,) = live.server.server_state.connections
                return protocol.transport.get_write_buffer_size()

            sizes.append(on_loop(live, deliver))
        assert 0 < max(sizes) < (64 << 10) + 1024  # asyncio's limit, passed by the chunk that met it
        on_loop(live, lambda: stream.push(output(name, steps * per_step, end=True)))
        answer = read_answer(connection)
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert text_of(answer) == "".join(ALPHABET[i % 26] for i in range(steps * per_step + 1))
    assert engine.aborted == []


def test_a_connection_that_closes_cancels_its_request_and_no_other(live: LiveServer, engine: PushedEngine) -> None:
    with live.connect() as stays:
        stays.sendall(head_and_body())
        name, stream = only(engine)
        with live.connect() as leaves:
            leaves.sendall(head_and_body())
            wait_until(lambda: len(engine.streams) == 2)
            gone = next(each for each in engine.streams if each != name)
            for each, own in engine.streams.items():
                on_loop(live, lambda each=each, own=own: own.push(output(each, 0)))
            assert b"text/event-stream" in leaves.recv(1 << 16)
        wait_until(lambda: engine.aborted == [gone], seconds=1)
        for each, own in engine.streams.items():
            on_loop(live, lambda each=each, own=own: own.push(output(each, 1)))
        on_loop(live, lambda: stream.push(output(name, 2, end=True)))
        assert text_of(read_answer(stays)) == "abc"
    assert engine.aborted == [gone]


def test_a_stop_string_ends_the_stream_in_the_delivery_that_completed_it(
    live: LiveServer, engine: PushedEngine
) -> None:
    with live.connect() as connection:
        connection.sendall(head_and_body(stop=["de"]))
        name, stream = only(engine)
        for number in range(8):
            on_loop(live, lambda number=number: stream.push(output(name, number)))
        answer = read_answer(connection)
    assert text_of(answer) == "abc"
    assert b'"finish_reason":"stop"' in answer
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert engine.aborted == [name]  # the engine works on it no longer


def test_a_bug_in_one_stream_s_text_spares_the_others_of_the_step(
    live: LiveServer, engine: PushedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = Choice.push

    def explode(self: Choice, delta: SequenceDelta) -> Any:
        if delta.token_ids == (LETTERS[5],):
            raise RuntimeError("secret prompt")
        return push(self, delta)

    monkeypatch.setattr(Choice, "push", explode)
    with live.connect() as first, live.connect() as second:
        first.sendall(head_and_body())
        broken, broken_stream = only(engine)
        second.sendall(head_and_body())
        wait_until(lambda: len(engine.streams) == 2)
        whole = next(each for each in engine.streams if each != broken)

        def deliver(number: int, *, end: bool = False) -> None:
            broken_stream.push(output(broken, 5 if number == 2 else 0))
            engine.streams[whole].push(output(whole, number, end=end))

        for number in range(3):
            on_loop(live, lambda number=number: deliver(number))
            time.sleep(0.02)
        on_loop(live, lambda: deliver(3, end=True))
        failed = read_answer(first)
        assert b"internal_error" in failed
        assert b"secret" not in failed
        assert b"[DONE]" not in failed
        assert text_of(read_answer(second)) == "abcd"
    assert engine.aborted == [broken]
