"""Chunks are put together from parts written once: their bytes are the JSON encoder's, their frames what h11 writes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from deltaserve.api import wire_json
from deltaserve.config import ServeConfig
from deltatest.fake_engine import BASE, LONG_BASE, FakeEngine
from deltatest.live_server import LiveServer

ROUTES = {
    "/v1/completions": {"prompt": "user: ", "max_tokens": 300},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}
AWKWARD = 'a "quoted" \\ back\nline\r\ttab \x00\x1f\x7f \u2028\u2029 </script> 🙂 naïve 你好 \ufeff'


def plain(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


@pytest.fixture
def awkward(engine: FakeEngine) -> FakeEngine:
    engine.script = lambda request, index: engine.tokenizer.encode(AWKWARD, add_special_tokens=False)
    return engine


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("model", [BASE, LONG_BASE, "tone"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stream_options": {"include_usage": True}},
        {"n": 2, "stop": ["nothing like it"]},
        {"return_token_ids": True},
        {"max_tokens": 1},
    ],
    ids=str,
)
def test_every_chunk_is_what_the_encoder_writes(
    http: TestClient, awkward: FakeEngine, route: str, model: str, fields: dict[str, Any]
) -> None:
    body = {"model": model, "stream": True, **ROUTES[route], **fields}
    with http.stream("POST", route, json=body) as response:
        data = response.read()
    *events, done, rest = data.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    texts: dict[int, str] = {}
    for event in events:
        chunk = json.loads(event.removeprefix(b"data: "))
        assert event == b"data: " + plain(chunk)
        for choice in chunk["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
    if "max_tokens" not in fields:
        assert set(texts.values()) == {AWKWARD}


@given(st.text(max_size=20))
def test_quoted_text_is_what_the_encoder_writes(text: str) -> None:
    assert wire_json.quote(text) == json.dumps(text, ensure_ascii=False)
    assert wire_json.quote(None) == "null"


def frames(body: bytes) -> tuple[list[bytes], bytes]:
    """The chunks of a chunked body up to its end, and what follows."""
    found = []
    while True:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        chunk, end, body = body[:length], body[length : length + 2], body[length + 2 :]
        assert end == b"\r\n"
        if not length:
            return found, body
        found.append(chunk)


def exchange(live: LiveServer, version: bytes, **fields: Any) -> tuple[bytes, bytes]:
    body = plain({"model": BASE, "prompt": "user: ", "max_tokens": 300, "stream": True, **fields})
    head = b"POST /v1/completions HTTP/%b\r\nHost: localhost\r\nContent-Type: application/json\r\n" % version
    answer = live.exchange(head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.lower(), body


def test_direct_writes_are_whole_frames_that_end_once(live: LiveServer, awkward: FakeEngine) -> None:
    head, body = exchange(live, b"1.1")
    assert b"transfer-encoding: chunked" in head
    chunks, rest = frames(body)
    assert rest == b""
    assert len(chunks) > 20
    assert all(chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") for chunk in chunks)


def test_an_old_client_gets_no_frames(live: LiveServer, awkward: FakeEngine) -> None:
    head, body = exchange(live, b"1.0")
    assert b"transfer-encoding" not in head
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


def test_a_stream_leaves_the_connection_ready_for_the_next_request(live: LiveServer) -> None:
    body = plain({"model": BASE, "prompt": "user: ", "max_tokens": 5, "stream": True})
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with live.connect() as connection:
        for _ in range(3):
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            answer = b""
            while not answer.endswith(b"0\r\n\r\n"):
                received = connection.recv(65536)
                assert received, answer
                answer += received
            assert frames(answer.partition(b"\r\n\r\n")[2])[0][-1].endswith(b"data: [DONE]\n\n")


def test_without_our_server_the_stream_is_the_same(app: FastAPI, config: ServeConfig, live: LiveServer) -> None:
    """The direct writer is an extension of ours; any other ASGI server gets messages."""
    fields = {"model": BASE, "prompt": "user: ", "max_tokens": 300, "stream": True}
    with TestClient(app, base_url="http://127.0.0.1") as client:
        by_messages = client.post("/v1/completions", json=fields).content
    direct = b"".join(frames(exchange(live, b"1.1")[1])[0])

    def told(data: bytes) -> list[Any]:
        return [json.loads(event[6:])["choices"] for event in data.split(b"\n\n")[:-2]]

    assert told(by_messages) == told(direct)
