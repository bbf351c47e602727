"""Health, metrics, version, tokenising, and draining."""

from __future__ import annotations

import json
import threading
import time

from starlette.testclient import TestClient

import deltaserve
from deltatest.fake_engine import BASE, DEFAULT_TEXT, TONE_V2, FakeEngine
from deltatest.live_server import LiveServer


def test_health(http: TestClient, engine: FakeEngine) -> None:
    assert http.get("/health").json() == http.get("/health/live").json() == {"status": "live"}
    assert http.get("/health/ready").status_code == 200
    engine.is_draining = True
    assert (http.get("/health/ready").status_code, http.get("/health/ready").json()) == (503, {"status": "draining"})
    engine.is_alive = False
    assert http.get("/health/ready").json() == {"status": "engine_failed"}
    assert http.get("/health/live").status_code == 200


def test_version(http: TestClient) -> None:
    told = {"version": deltaserve.__version__, "base": BASE, "base_fingerprint": "f" * 64}
    assert http.get("/version").json() == told


def test_metrics_count_requests_by_route_pattern(http: TestClient) -> None:
    http.post("/v1/completions", json={"model": BASE, "prompt": "user"}, headers={"x-stainless-retry-count": "1"})
    http.get("/v1/models/tone")
    http.get("/v1/models/no/such/model")
    http.get("/no/such/route/canary")
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    text = response.text
    assert 'requests_total{outcome="ok",route="/v1/completions",status_class="2xx"} 1.0' in text
    assert 'requests_total{outcome="ok",route="/v1/models/{model:path}",status_class="2xx"} 1.0' in text
    assert 'requests_total{outcome="refused",route="/v1/models/{model:path}",status_class="4xx"} 1.0' in text
    assert 'route="unmatched",status_class="4xx"' in text
    assert "canary" not in text
    assert "deltaserve_client_retries_total 1.0" in text
    assert f'adapter_info{{adapter="tone",bytes="1234",rank="8",type="lora",version="{TONE_V2[:12]}"}} 1.0' in text
    assert "deltaserve_kv_blocks_capacity 64.0" in text


def test_a_flood_of_unknown_names_makes_no_series(http: TestClient) -> None:
    for path in ("/v1/models/unknown", "/unknown", "/metrics"):
        http.get(path)
    size = len(http.get("/metrics").content)
    for i in range(50):
        http.get(f"/v1/models/unknown-{i}")
        http.get(f"/unknown-{i}")
    assert len(http.get("/metrics").content) < size + 100


def test_deleted_adapters_leave_the_metrics(http: TestClient) -> None:
    assert 'adapter="tone"' in http.get("/metrics").text
    http.delete("/v1/adapters/tone")
    assert 'adapter="tone"' not in http.get("/metrics").text


def test_tokenize_and_detokenize(http: TestClient, engine: FakeEngine) -> None:
    ids = engine.tokenizer.encode("user hi")
    body = http.post("/tokenize", json={"prompt": "user hi", "return_token_strs": True}).json()
    assert (body["tokens"], body["count"], body["max_model_len"]) == (ids, len(ids), 512)
    assert "".join(body["token_strs"]) == "user hi"
    messages = [{"role": "user", "content": "hi"}]
    chat = http.post("/tokenize", json={"messages": messages, "model": "tone"}).json()
    assert chat["tokens"] == engine.tokenizer.render_chat(messages)
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "user hi"}
    assert http.post("/detokenize", json={"tokens": [1, *ids]}).json() == {"prompt": "<|start|>user hi"}
    for route, wrong in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": messages}),
        ("/tokenize", {"prompt": 5}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [engine.tokenizer.vocab_size]}),
        ("/detokenize", {"tokens": "x"}),
        ("/detokenize", {"tokens": [1], "x": 1}),
        ("/tokenize", {"messages": messages, "add_special_tokens": True}),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": False}),
    ):
        assert http.post(route, json=wrong).status_code == 400, wrong
    for route, known in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": ids})):
        assert http.post(route, json=known | {"model": "tone"}).status_code == 200
        assert http.post(route, json=known | {"model": "secret"}).status_code == 404, "a model is never ignored"


def ask(live: LiveServer, answers: list[bytes], *, stream: bool) -> threading.Thread:
    body = json.dumps({"model": BASE, "prompt": "user", "max_tokens": 100, "stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    data = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    thread = threading.Thread(target=lambda: answers.append(live.exchange(data)))
    thread.start()
    return thread


def test_stopping_lets_answers_finish(live: LiveServer, engine: FakeEngine) -> None:
    engine.step_seconds = 0.03
    answers: list[bytes] = []
    thread = ask(live, answers, stream=True)
    while not engine.num_open:
        time.sleep(0.005)
    live.server.should_exit = True
    thread.join(10)
    assert b"[DONE]" in answers[0]
    assert "café".encode() in answers[0], DEFAULT_TEXT


def test_stopping_ends_what_does_not_finish_with_an_error(live: LiveServer, engine: FakeEngine) -> None:
    """``drain_seconds`` is 1; the answers would take 10."""
    engine.step_seconds = 0.1
    engine.script = lambda request, index: [40] * 100
    answers: list[bytes] = []
    threads = [ask(live, answers, stream=stream) for stream in (True, False)]
    while engine.num_open < 2:
        time.sleep(0.005)
    live.server.should_exit = True
    for thread in threads:
        thread.join(10)
    streamed = next(answer for answer in answers if b"text/event-stream" in answer)
    whole = next(answer for answer in answers if b"text/event-stream" not in answer)
    assert b"503" in whole.split(b"\r\n", 1)[0]
    assert b'"code":"unavailable"' in streamed
    assert b"[DONE]" not in streamed
