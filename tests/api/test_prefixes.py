"""What HTTP says and does about an adapter that puts virtual tokens before a prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from deltaserve_store.names import NameEntry, NameMap
from deltatest.fake_engine import CODE_V1, FakeEngine, record

NUM_PREFIX_TOKENS = 37
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def code_is_a_prefix(engine: FakeEngine) -> None:
    """The adapter ``code`` has 37 virtual tokens."""
    names: NameMap = engine.names
    entry = NameEntry(CODE_V1, {CODE_V1: replace(record("code", CODE_V1), num_prefix_tokens=NUM_PREFIX_TOKENS)})
    engine.names = replace(names, adapters={**names.adapters, "default": {**names.adapters["default"], "code": entry}})


def test_chat_leaves_the_prefix_its_room(http: TestClient, engine: FakeEngine) -> None:
    for model, taken in (("tone", 0), ("code", NUM_PREFIX_TOKENS), ("tiny", 0)):
        answer = http.post("/v1/chat/completions", json={"model": model, "messages": HELLO})
        assert answer.status_code == 200
        request = engine.requests[-1]
        assert request.binding.num_prefix_tokens == taken
        assert len(request.prompt_ids) + request.sampling.max_tokens + taken == engine.max_model_len
        assert answer.json()["usage"]["prompt_tokens"] == len(request.prompt_ids)


def test_a_prompt_that_only_the_prefix_makes_too_long(http: TestClient, engine: FakeEngine) -> None:
    prompt = [5] * (engine.max_model_len - 20)
    body = {"prompt": prompt, "max_tokens": 4}
    assert http.post("/v1/completions", json={"model": "tone", **body}).status_code == 200
    answer = http.post("/v1/completions", json={"model": "code", **body})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "prefix takes 37" in error["message"]
    messages = [{"role": "user", "content": "x" * (engine.max_model_len - 40)}]
    assert http.post("/v1/chat/completions", json={"model": "code", "messages": messages}).status_code == 400


def test_listings_tell(http: TestClient, engine: FakeEngine) -> None:
    models = {model["id"]: model["max_model_len"] for model in http.get("/v1/models").json()["data"]}
    assert models["tone"] - models["code"] == NUM_PREFIX_TOKENS
    assert models["tiny"] == models["tone"] == engine.max_model_len
    assert http.get("/v1/adapters/code").json()["prefix_tokens"] == NUM_PREFIX_TOKENS
    assert http.get("/v1/adapters/tone").json()["prefix_tokens"] == 0
