"""Bad input: always a typed refusal that names the parameter, never a server error, never accepted and ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from deltaserve.api.schemas.open_fields import REFUSED
from deltaserve.errors import AdapterUnavailable, EngineFailed, QueueFull, Unavailable
from deltatest.fake_engine import BASE, FakeEngine

COMPLETION = {"model": BASE, "prompt": "user"}
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]}
ROUTES = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


def error_of(response: Any, status: int) -> Any:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    assert {"message", "type", "param", "code"} <= set(body["error"])
    return body["error"]


BOTH: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 1 << 64}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": "2"}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias[1]"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"logit_bias": []}, "logit_bias"),
    ({"logit_bias": {"1": 5, "01": -5}}, "logit_bias"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 257}, "stop[0]"),
    ({"stop": 5}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": ["1"]}, "stop_token_ids[0]"),
    ({"stream": "yes"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
    ({"ignore_eos": "no"}, "ignore_eos"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "x" * 1025}, "cache_salt"),
    ({"model": ""}, "model"),
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
    ({"made_up": 1}, "made_up"),
    ({"made_up": None}, "made_up"),
    ({"mäde\nup": 1}, "m\\xe4de\nup"),
]
COMPLETION_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [1.0]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": ["x"] * 129}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": 1}, "echo"),
    ({"messages": []}, "messages"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": True}, "best_of"),
]
CHAT_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [5]}, "messages[0]"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "name": "a b"}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0].weight"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
    ({"messages": CHAT["messages"] * 2049}, "messages"),
    ({"logprobs": 2}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"prompt": "x"}, "prompt"),
    ({"echo": True}, "echo"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"chat_template": "{{ x }}"}, "chat_template"),
    ({"chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs[x]"),
]
CASES = [
    *((route, fields, param) for route in ROUTES for fields, param in BOTH),
    *(("/v1/completions", fields, param) for fields, param in COMPLETION_ONLY),
    *(("/v1/chat/completions", fields, param) for fields, param in CHAT_ONLY),
]


@pytest.mark.parametrize(("route", "fields", "param"), CASES, ids=lambda value: ascii(value)[:60])
def test_wrong_values_are_named(
    http: TestClient, engine: FakeEngine, route: str, fields: dict[str, Any], param: str
) -> None:
    error = error_of(http.post(route, json=ROUTES[route] | fields), 400)
    found = error["param"].replace(".", "[").split("[")[0], param.replace(".", "[").split("[")[0]
    assert found[0] == found[1]
    assert error["type"] == "invalid_request_error"
    assert not engine.requests


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("field", sorted(REFUSED))
def test_neutral_values_are_accepted_and_the_feature_refused(http: TestClient, route: str, field: str) -> None:
    for neutral in (None, *REFUSED[field]):
        assert http.post(route, json=ROUTES[route] | {field: neutral}).status_code == 200, neutral
    error = error_of(http.post(route, json=ROUTES[route] | {field: {"some": "value"}}), 400)
    assert error["param"] == field
    assert error["code"] == "unsupported_parameter"


def test_null_means_default(http: TestClient) -> None:
    nulls = dict.fromkeys(
        ("temperature", "top_p", "n", "stop", "seed", "max_tokens", "stream", "logit_bias", "logprobs")
    )
    for route, body in ROUTES.items():
        assert http.post(route, json=body | nulls).status_code == 200


BODIES: list[tuple[bytes, str]] = [
    (b"", "empty"),
    (b"{", "cut"),
    (b"[]", "list"),
    (b"null", "null"),
    (b'"x"', "string"),
    (b"{'model': 1}", "single quotes"),
    (b'{"model": "tiny", "prompt": "x",}', "comma"),
    (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', "NaN"),
    (b'{"model": "tiny", "prompt": "x", "temperature": Infinity}', "Infinity"),
    (b'{"model": "tiny", "prompt": "x", "temperature": 1e999}', "1e999"),
    (b'{"model": "tiny", "prompt": "x", "logit_bias": {"1": -1e999}}', "nested 1e999"),
    (b'{"model": "tiny", "prompt": "\\ud800"}', "lone surrogate"),
    (b'{"model": "tiny", "prompt": "\\udc00 x"}', "lone low surrogate"),
    (b'{"model": "tiny", "prompt": "x", "\\ud800": 1}', "lone surrogate key"),
    (b'{"model": "tiny", "prompt": "\xff"}', "not UTF-8"),
    (b'\xef\xbb\xbf{"model": "tiny", "prompt": "x"}', "byte order mark"),
    ('{"model": "tiny", "prompt": "x"}'.encode("utf-16"), "UTF-16"),
    (b'{"model": "tiny", "model": "tone", "prompt": "x"}', "duplicate key"),
    (b'{"model": "tiny", "prompt": "x", "metadata": {"a": 1, "a": 2}}', "nested duplicate key"),
    (b"[" * 100_000, "deep list"),
    (b'{"a":' * 100_000, "deep object"),
    (b'{"model": "tiny", "prompt": ' + b"[" * 40 + b"]" * 40 + b"}", "too deep"),
    (b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", "long number"),
    (b'{"model": "tiny", "prompt": "x\n"}', "raw line break"),
]


@pytest.mark.parametrize("body", [body for body, _ in BODIES], ids=[name for _, name in BODIES])
def test_malformed_bodies(http: TestClient, body: bytes) -> None:
    response = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    error = error_of(response, 400)
    assert error["code"] == ("invalid_type" if body in (b"[]", b"null", b'"x"') else "invalid_json")


def test_a_surrogate_pair_and_deep_text_are_fine(http: TestClient) -> None:
    body = b'{"model": "tiny", "prompt": "\\ud83d\\ude42 ' + b"[" * 100 + b'", "metadata": {"a\\u0000": "\\u0000"}}'
    assert http.post("/v1/completions", content=body, headers={"content-type": "application/json"}).status_code == 200


def test_an_unterminated_string_costs_its_length_not_its_square() -> None:
    """A megabyte of escaped quotes would otherwise hold the event loop for hours."""
    import time

    from deltaserve.api.body import parse_json
    from deltaserve.errors import InvalidRequest

    body = b'{"prompt": [' + b"[]," * 40 + b'"' + b'\\"' * 500_000
    started = time.monotonic()
    with pytest.raises(InvalidRequest):
        parse_json(body)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("content_type", ["text/plain", "", "application/x-www-form-urlencoded"])
def test_only_json_is_read(http: TestClient, content_type: str) -> None:
    headers = {"content-type": content_type}
    error_of(http.post("/v1/completions", content=json.dumps(COMPLETION), headers=headers), 415)


def test_too_large(http: TestClient) -> None:
    error = error_of(http.post("/v1/completions", json=COMPLETION | {"prompt": "x" * (3 << 20)}), 413)
    assert str(2 << 20) in error["message"]


def test_unknown_routes_and_methods(http: TestClient) -> None:
    assert error_of(http.get("/v1/nothing"), 404)["code"] == "unknown_route"
    assert error_of(http.post("/v1/responses", json={}), 404)["code"] == "unknown_route"
    assert error_of(http.post("/v1/completions/", json=COMPLETION), 404)["code"] == "unknown_route"
    assert error_of(http.get("/v1/completions"), 405)["code"] == "method_not_allowed"
    assert "POST" in error_of(http.get("/v1/completions"), 405)["message"]
    assert http.get("/v1/completions").headers["allow"] == "POST"


@pytest.mark.parametrize(
    "model", ["nothing", "secret", "tiny:secret", "tone@", "tone@ffffffff", "x" * 500, "../etc", "prod@1"]
)
def test_unknown_models(http: TestClient, model: str) -> None:
    for route, body in ROUTES.items():
        error = error_of(http.post(route, json=body | {"model": model}), 404)
        assert error["code"] == "model_not_found"
        assert error["param"] == "model"


def test_a_full_queue_says_when_to_come_back(http: TestClient, engine: FakeEngine) -> None:
    engine.refuse = QueueFull("the queue is full", retry_after_seconds=7.2)
    response = http.post("/v1/completions", json=COMPLETION)
    assert error_of(response, 429)["code"] == "queue_full"
    assert response.headers["retry-after"] == "7"
    assert "x-should-retry" not in response.headers


@pytest.mark.parametrize(
    ("failure", "status", "retry"),
    [
        (EngineFailed("x"), 500, "false"),
        (Unavailable("draining"), 503, None),
        (AdapterUnavailable("of another base"), 503, "false"),
        (AdapterUnavailable("failed to load", retry_after_seconds=3), 503, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_before_the_first_token_have_a_status(
    http: TestClient, engine: FakeEngine, failure: Any, status: int, retry: str | None, stream: bool
) -> None:
    engine.fail_after, engine.failure = 0, failure
    response = http.post("/v1/completions", json=COMPLETION | {"stream": stream})
    error_of(response, status)
    assert response.headers.get("x-should-retry") == retry
    assert ("retry-after" in response.headers) == (retry is None)
    assert engine.num_open == 0


def test_one_prompt_refused_frees_the_others(http: TestClient, engine: FakeEngine) -> None:
    body = COMPLETION | {"prompt": ["user", "user " * 600], "max_tokens": 5}
    assert error_of(http.post("/v1/completions", json=body), 400)["code"] == "context_length_exceeded"
    assert len(engine.aborted) == 1
    assert engine.num_open == 0


def test_a_bug_shows_neither_path_nor_message(http: TestClient, engine: FakeEngine, caplog: Any) -> None:
    def explode(request: Any, index: int) -> list[int]:
        raise RuntimeError("secret prompt text at /srv/private")

    engine.script = explode
    response = http.post("/v1/completions", json=COMPLETION)
    error = error_of(response, 500)
    assert error["type"] == "server_error"
    assert "secret" not in response.text
    assert "/srv" not in response.text
    assert "Traceback" not in response.text
    assert response.headers["x-should-retry"] == "false"
    assert engine.num_open == 0


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)
)
json_values: st.SearchStrategy[Any] = st.deferred(
    lambda: scalars | st.lists(json_values, max_size=3) | st.dictionaries(st.text(max_size=10), json_values, max_size=3)
)
FIELD_NAMES = sorted(
    {*REFUSED, "temperature", "prompt", "messages", "stop", "logit_bias", "stream_options", "n", "model"}
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    route=st.sampled_from(sorted(ROUTES)),
    fields=st.dictionaries(st.sampled_from(FIELD_NAMES) | st.text(max_size=8), json_values, max_size=4),
)
def test_no_json_makes_a_server_error(http: TestClient, route: str, fields: dict[str, Any]) -> None:
    response = http.post(route, json=ROUTES[route] | fields)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error_of(response, response.status_code)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200))
def test_no_bytes_make_a_server_error(http: TestClient, body: bytes) -> None:
    response = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    error_of(response, 400)
