"""Streams: their bytes, their chunks, their ends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from deltaserve.core import FinishReason
from deltaserve.errors import EngineFailed
from deltatest.fake_engine import BASE, DEFAULT_TEXT, TONE_V2, FakeEngine

ROUTES = {
    "/v1/completions": {"model": BASE, "prompt": "user: ", "max_tokens": 200},
    "/v1/chat/completions": {"model": BASE, "messages": [{"role": "user", "content": "hi"}]},
}


def raw(http: TestClient, route: str, **fields: Any) -> tuple[Any, bytes]:
    with http.stream("POST", route, json=ROUTES[route] | {"stream": True} | fields) as response:
        return response, response.read()


def events(http: TestClient, route: str, **fields: Any) -> list[Any]:
    """The chunks of a stream that ends well."""
    response, data = raw(http, route, **fields)
    assert response.status_code == 200, data
    assert data.endswith(b"data: [DONE]\n\n")
    blocks = data.decode().split("\n\n")[:-2]
    assert all(block.startswith("data: {") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def text_of(choice: Any) -> str:
    return choice["text"] if "text" in choice else choice["delta"].get("content", "")


def test_headers(http: TestClient) -> None:
    response, _ = raw(http, "/v1/completions", model="tone")
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-adapter-version"] == TONE_V2
    assert "content-length" not in response.headers


@pytest.mark.parametrize("route", ROUTES)
def test_chunks_share_their_envelope_and_join_to_the_text(http: TestClient, route: str) -> None:
    chunks = events(http, route, model="tone")
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert {chunk["system_fingerprint"] for chunk in chunks} == {TONE_V2}
    assert all("usage" not in chunk for chunk in chunks)
    assert "".join(text_of(chunk["choices"][0]) for chunk in chunks) == DEFAULT_TEXT
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert [reason for reason in reasons if reason] == ["stop"]
    assert reasons[-1] == "stop"
    assert all("\ufffd" not in text_of(chunk["choices"][0]) for chunk in chunks)


def test_chat_begins_with_the_role_and_ends_with_an_empty_delta(http: TestClient) -> None:
    chunks = events(http, "/v1/chat/completions")
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)


@pytest.mark.parametrize("route", ROUTES)
def test_usage_comes_last_when_asked_for(http: TestClient, route: str) -> None:
    chunks = events(http, route, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    plain = http.post(route, json=ROUTES[route]).json()
    assert chunks[-1]["usage"] == plain["usage"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("tokens_per_step", [1, 4])
@pytest.mark.parametrize(
    "fields",
    [
        {"n": 3},
        {"stop": ["are", "today"]},
        {"stop": ["ow a"], "include_stop_str_in_output": True, "n": 2},
        {"max_tokens": 3},
        {"return_token_ids": True},
    ],
    ids=str,
)
def test_streamed_equals_whole(
    http: TestClient, engine: FakeEngine, route: str, fields: dict[str, Any], tokens_per_step: int
) -> None:
    engine.tokens_per_step = tokens_per_step
    engine.script = lambda request, index: engine.tokenizer.encode(f"{index} hello how are you 🙂 today {index}")
    whole = http.post(route, json=ROUTES[route] | fields).json()["choices"]
    streamed: dict[int, list[Any]] = {}
    for chunk in events(http, route, **fields):
        for choice in chunk["choices"]:
            streamed.setdefault(choice["index"], []).append(choice)
    assert set(streamed) == {choice["index"] for choice in whole}
    for choice in whole:
        pieces = streamed[choice["index"]]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert "".join(map(text_of, pieces)) == text
        assert [piece["finish_reason"] for piece in pieces if piece["finish_reason"]] == [choice["finish_reason"]]
        assert pieces[-1]["finish_reason"]
        if "return_token_ids" in fields:
            assert [i for piece in pieces for i in piece.get("token_ids", [])] == choice["token_ids"]


@pytest.mark.parametrize("echo", [False, True])
def test_completion_logprobs_streamed_equal_whole(http: TestClient, echo: bool) -> None:
    fields = {"logprobs": 1, "echo": echo, "max_tokens": 8}
    whole = http.post("/v1/completions", json=ROUTES["/v1/completions"] | fields).json()["choices"][0]["logprobs"]
    joined: dict[str, list[Any]] = {name: [] for name in whole}
    for chunk in events(http, "/v1/completions", **fields):
        for name, values in chunk["choices"][0]["logprobs"].items():
            joined[name] += values or []
    assert joined == whole


def test_chat_logprobs_streamed_equal_whole(http: TestClient) -> None:
    fields = {"logprobs": True, "top_logprobs": 2}
    route = "/v1/chat/completions"
    whole = http.post(route, json=ROUTES[route] | fields).json()["choices"][0]["logprobs"]["content"]
    pieces = [chunk["choices"][0]["logprobs"] for chunk in events(http, route, **fields)]
    assert [entry for piece in pieces if piece for entry in piece["content"]] == whole


def test_echo_streams_the_prompt_first(http: TestClient) -> None:
    chunks = events(http, "/v1/completions", echo=True)
    assert chunks[0]["choices"][0]["text"] == "user: "


def test_several_prompts_in_one_stream(http: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request, index: [*request.prompt_ids, *engine.tokenizer.encode(f"{index}")]
    chunks = events(http, "/v1/completions", prompt=["one ", "two "], n=2)
    texts: dict[int, str] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {0: "one 0", 1: "one 1", 2: "two 0", 3: "two 1"}
    assert engine.num_open == 0


@pytest.mark.parametrize("route", ROUTES)
def test_a_failure_in_mid_stream_is_an_event(http: TestClient, engine: FakeEngine, route: str) -> None:
    engine.fail_after, engine.failure = 3, EngineFailed("the step loop died")
    response, data = raw(http, route)
    assert response.status_code == 200
    last = data.decode().rstrip("\n").split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
    assert b"[DONE]" not in data
    assert engine.num_open == 0


def test_a_bug_in_mid_stream_is_an_event_without_details(
    http: TestClient, engine: FakeEngine, monkeypatch: Any
) -> None:
    from deltaserve.api.choice import Choice

    push = Choice.push
    calls = iter(range(100))

    def explode(self: Choice, delta: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError("secret prompt")
        return push(self, delta)

    monkeypatch.setattr(Choice, "push", explode)
    _, data = raw(http, "/v1/completions")
    assert b"internal_error" in data
    assert b"secret" not in data
    assert engine.num_open == 0


def test_finish_reasons_are_words(http: TestClient) -> None:
    assert {reason.value for reason in FinishReason} >= {"stop", "length"}
    assert events(http, "/v1/completions", max_tokens=2)[-1]["choices"][0]["finish_reason"] == "length"
