"""``/v1/completions`` in process: every parameter reaches the engine or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from deltaserve.core import GenerationRequest
from deltatest.fake_engine import BASE, DEFAULT_TEXT, TONE_V1, TONE_V2, FakeEngine


def complete(http: TestClient, **fields: Any) -> Any:
    body = {"model": BASE, "prompt": "user", "max_tokens": 200} | fields
    return http.post("/v1/completions", json=body)


def test_an_answer(http: TestClient, engine: FakeEngine) -> None:
    response = complete(http)
    body = response.json()
    assert response.status_code == 200, body
    assert body["choices"] == [{"index": 0, "text": DEFAULT_TEXT, "logprobs": None, "finish_reason": "stop"}]
    assert body["object"] == "text_completion"
    assert body["model"] == BASE
    num_prompt = len(engine.tokenizer.encode("user"))
    num_completion = len(engine.tokenizer.encode(DEFAULT_TEXT)) + 1  # the end token was computed too
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert engine.num_open == 0


def test_every_sampling_parameter_reaches_the_engine(http: TestClient, engine: FakeEngine) -> None:
    fields = {
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.25,
        "repetition_penalty": 1.5,
        "logit_bias": {"5": -100, "3": 1.5},
        "seed": -3,
        "stop_token_ids": [9],
        "ignore_eos": True,
        "logprobs": 3,
        "n": 2,
        "cache_salt": "s",
    }
    assert complete(http, **fields).status_code == 200
    request = engine.requests[0]
    sampling = request.sampling
    assert request.n == 2
    assert request.cache_salt == "s"
    assert sampling.logit_bias == ((3, 1.5), (5, -100.0))
    assert sampling.stop_token_ids == (9,)
    for name in set(fields) - {"logit_bias", "stop_token_ids", "n", "cache_salt"}:
        assert getattr(sampling, name) == fields[name], name


def test_top_k_minus_one_is_off(http: TestClient, engine: FakeEngine) -> None:
    assert complete(http, top_k=-1).status_code == 200
    assert engine.requests[0].sampling.top_k == 0


def test_defaults_are_openai_s(http: TestClient, engine: FakeEngine) -> None:
    http.post("/v1/completions", json={"model": BASE, "prompt": "x"})
    sampling = engine.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.logprobs) == (16, 1.0, 1.0, None)
    assert engine.requests[0].eos_token_ids == engine.tokenizer.eos_token_ids


@pytest.mark.parametrize("model", ["tone", "prod", f"{BASE}:tone", f"tone@{TONE_V2[:8]}", f"tone@{TONE_V1}"])
def test_models_resolve_to_versions(http: TestClient, engine: FakeEngine, model: str) -> None:
    version = TONE_V1 if TONE_V1 in model else TONE_V2
    response = complete(http, model=model)
    assert response.status_code == 200
    assert response.headers["x-adapter-version"] == version
    assert response.json()["system_fingerprint"] == version
    assert response.json()["model"] == model
    assert engine.requests[0].binding.versions == (version,)


def test_the_base_has_no_adapter_version(http: TestClient, engine: FakeEngine) -> None:
    response = complete(http, model=BASE)
    assert "x-adapter-version" not in response.headers
    assert response.json()["system_fingerprint"] == engine.base_fingerprint
    assert engine.requests[0].binding.is_base


def test_prompt_forms(http: TestClient, engine: FakeEngine) -> None:
    ids = engine.tokenizer.encode("user")
    for prompt, expected in (
        ("user", [ids]),
        (["user", "assistant"], [ids, engine.tokenizer.encode("assistant")]),
        (ids, [ids]),
        ([ids, [4, 5]], [ids, [4, 5]]),
    ):
        engine.requests.clear()
        body = complete(http, prompt=prompt, n=2).json()
        assert [list(request.prompt_ids) for request in engine.requests] == expected
        assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(expected)))


def test_choices_keep_the_order_of_prompts(http: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request, index: [*request.prompt_ids, *engine.tokenizer.encode(f" {index}")]
    body = complete(http, prompt=["one", "two"], n=2).json()
    assert [choice["text"] for choice in body["choices"]] == ["one 0", "one 1", "two 0", "two 1"]
    per_prompt = [len(engine.tokenizer.encode(text)) for text in ("one", "two")]
    assert body["usage"]["prompt_tokens"] == sum(per_prompt)


@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_stop_strings(http: TestClient, engine: FakeEngine, tokens_per_step: int) -> None:
    engine.tokens_per_step = tokens_per_step
    body = complete(http, stop=["nowhere", "you t"]).json()
    assert body["choices"][0]["text"] == "hello world, how are "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert engine.stopped == [(engine.requests[0].request_id, 0)]
    body = complete(http, stop="you t", include_stop_str_in_output=True).json()
    assert body["choices"][0]["text"] == "hello world, how are you t"
    assert engine.num_open == 0


def test_a_stop_string_ends_one_of_several(http: TestClient, engine: FakeEngine) -> None:
    texts = ["one stop two", "three four five six seven"]
    engine.script = lambda request, index: engine.tokenizer.encode(texts[index])
    body = complete(http, stop="stop", n=2).json()
    assert [choice["text"] for choice in body["choices"]] == ["one ", "three four five six seven"]
    assert engine.stopped == [(engine.requests[0].request_id, 0)]
    expected = len(engine.tokenizer.encode("one stop")) + len(engine.tokenizer.encode(texts[1])) + 1
    assert body["usage"]["completion_tokens"] == expected


def test_a_stop_string_counts_only_after_min_tokens(http: TestClient) -> None:
    assert complete(http, stop="o", min_tokens=30).json()["choices"][0]["text"].startswith("hello world")


def test_stop_token_text_is_hidden_unless_asked_for(http: TestClient, engine: FakeEngine) -> None:
    ids = engine.tokenizer.encode("hello world", add_special_tokens=False)
    engine.script = lambda request, index: ids
    assert complete(http, stop_token_ids=[ids[-1]]).json()["choices"][0]["text"] == "hello world"[: -len(" world")]
    shown = complete(http, stop_token_ids=[ids[-1]], include_stop_str_in_output=True).json()
    assert shown["choices"][0]["text"] == "hello world"


def test_special_tokens_are_skipped_unless_asked_for(http: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request, index: engine.tokenizer.encode("a<|start|>b")
    assert complete(http).json()["choices"][0]["text"] == "ab"
    assert complete(http, skip_special_tokens=False).json()["choices"][0]["text"] == "a<|start|>b"


def test_max_tokens_is_exact(http: TestClient, engine: FakeEngine) -> None:
    body = complete(http, max_tokens=5).json()
    assert body["usage"]["completion_tokens"] == 5
    assert body["choices"][0]["finish_reason"] == "length"
    ids = engine.tokenizer.encode(DEFAULT_TEXT)[:5]
    assert body["choices"][0]["text"] == engine.tokenizer.decode(ids)


def test_echo(http: TestClient) -> None:
    choice = complete(http, prompt="say: ", echo=True).json()["choices"][0]
    assert choice["text"] == "say: " + DEFAULT_TEXT


@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_agree_with_the_text(http: TestClient, engine: FakeEngine, echo: bool) -> None:
    choice = complete(http, prompt="user: ", logprobs=2, echo=echo, max_tokens=9).json()["choices"][0]
    logprobs = choice["logprobs"]
    num_prompt = len(engine.tokenizer.encode("user: ")) if echo else 0
    assert {len(values) for values in logprobs.values()} == {9 + num_prompt}
    assert "".join(logprobs["tokens"]) == choice["text"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset : offset + len(token)] == token
    assert logprobs["token_logprobs"][-1] == -0.5
    assert (logprobs["token_logprobs"][0] is None) == echo
    assert len(logprobs["top_logprobs"][-1]) == 2


def test_logprobs_zero_has_no_alternatives(http: TestClient) -> None:
    logprobs = complete(http, logprobs=0, max_tokens=3).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] is None
    assert len(logprobs["token_logprobs"]) == 3


def test_a_prompt_can_be_scored_alone(http: TestClient, engine: FakeEngine) -> None:
    body = complete(http, prompt="user: hi", max_tokens=0, echo=True, logprobs=1).json()
    assert body["choices"][0]["text"] == "user: hi"
    assert body["usage"]["completion_tokens"] == 0
    assert len(body["choices"][0]["logprobs"]["tokens"]) == len(engine.tokenizer.encode("user: hi"))


def test_infinite_logprobs_become_numbers(http: TestClient, engine: FakeEngine, monkeypatch: Any) -> None:
    from deltaserve.core import TokenLogprob
    from deltatest.fake_engine import FakeStream

    bad = TokenLogprob(5, float("-inf"), ((5, float("-inf")), (6, float("nan"))))
    monkeypatch.setattr(FakeStream, "_logprob", lambda self, token, top: bad)
    logprobs = complete(http, logprobs=2, max_tokens=1).json()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-9999.0]


def test_half_characters_are_named_by_their_bytes(http: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request, index: engine.tokenizer.encode("🙈")
    choice = complete(http, logprobs=1).json()["choices"][0]
    assert choice["text"] == "🙈"
    assert all(token.startswith("bytes:\\x") for token in choice["logprobs"]["tokens"])
    assert set(choice["logprobs"]["text_offset"]) == {0}


def test_token_ids_come_back_when_asked_for(http: TestClient, engine: FakeEngine) -> None:
    choice = complete(http, return_token_ids=True, max_tokens=4).json()["choices"][0]
    assert choice["token_ids"] == engine.tokenizer.encode(DEFAULT_TEXT)[:4]
    assert choice["prompt_token_ids"] == engine.tokenizer.encode("user")


def test_control_tokens_count_in_a_prompt(http: TestClient, engine: FakeEngine) -> None:
    complete(http, prompt="<|start|>user")
    assert engine.requests[0].prompt_ids[0] == 1


def test_the_deadline_is_the_operator_s(http: TestClient, engine: FakeEngine) -> None:
    complete(http)
    request: GenerationRequest = engine.requests[0]
    assert request.deadline_seconds == 600.0
