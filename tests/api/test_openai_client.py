"""The unmodified OpenAI client, sync and async, against a real server on a socket."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import openai
import pytest

from deltaserve.errors import EngineFailed, QueueFull
from deltatest.fake_engine import BASE, DEFAULT_TEXT, LONG_BASE, TONE_V1, TONE_V2, FakeEngine
from deltatest.live_server import LiveServer

HELLO: Any = [{"role": "user", "content": "hello"}]


def test_models(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert list(models) == [BASE, "code", "tone", "prod"]
    assert models[BASE].parent is None  # type: ignore[attr-defined]
    assert models["tone"].parent == BASE  # type: ignore[attr-defined]
    assert models["prod"].root == "tone"  # type: ignore[attr-defined]
    assert client.models.retrieve(BASE).id == BASE
    for name in (LONG_BASE, f"tone@{TONE_V1[:8]}", f"{LONG_BASE}:tone"):
        assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nothing")
    assert caught.value.code == "model_not_found"


def test_delete(client: openai.OpenAI) -> None:
    assert client.models.delete("tone").deleted
    with pytest.raises(openai.NotFoundError):
        client.models.delete("tone")
    with pytest.raises(openai.BadRequestError):
        client.models.delete(BASE)
    assert "tone" not in [model.id for model in client.models.list()]


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=BASE, prompt="user", max_tokens=100)
    assert answer.choices[0].text == DEFAULT_TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer._request_id


def test_completion_logprobs_and_echo(client: openai.OpenAI) -> None:
    choice = client.completions.create(model=BASE, prompt="user: ", max_tokens=5, logprobs=1, echo=True).choices[0]
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == choice.text


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tone",
        messages=HELLO,
        user="u",
        metadata={"a": "b"},
        store=False,
        logprobs=True,
        top_logprobs=1,
        extra_body={"top_k": 5, "return_token_ids": True},
    )
    assert answer.model == "tone"
    assert answer.system_fingerprint == TONE_V2
    assert answer.choices[0].message.content == DEFAULT_TEXT
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert b"".join(bytes(entry.bytes or []) for entry in content).decode() == DEFAULT_TEXT


def test_an_answer_goes_back_as_history(client: openai.OpenAI) -> None:
    message = client.chat.completions.create(model=BASE, messages=HELLO).choices[0].message
    history = [*HELLO, message.model_dump(), *HELLO]
    assert client.chat.completions.create(model=BASE, messages=history).choices[0].message.content == DEFAULT_TEXT


def test_raw_response_headers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tone", messages=HELLO, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.headers["content-type"] == "application/json"
    assert raw.headers["x-adapter-version"] == TONE_V2


def test_streamed_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=BASE, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == DEFAULT_TEXT
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None


def test_streamed_chat_helper(client: openai.OpenAI) -> None:
    """The client's own accumulator accepts our chunks."""
    with client.chat.completions.stream(model=BASE, messages=HELLO) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == DEFAULT_TEXT
    assert final.choices[0].finish_reason == "stop"


def test_streamed_completion_with_two_choices(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request, index: engine.tokenizer.encode(f"choice {index}")
    texts = ["", ""]
    for chunk in client.completions.create(model=BASE, prompt="user", max_tokens=50, n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["choice 0", "choice 1"]


def test_a_failure_in_mid_stream_raises(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.fail_after, engine.failure = 2, EngineFailed("the step loop died")
    with pytest.raises(openai.APIError) as caught:
        list(client.chat.completions.create(model=BASE, messages=HELLO, stream=True))
    assert caught.value.code == "engine_failed"
    assert "died" in caught.value.message


def test_error_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=BASE, messages=HELLO, temperature=9)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=BASE, prompt="user", max_tokens=100_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model=BASE, messages=HELLO, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]
        )
    assert tools.value.param == "tools"
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model=BASE, prompt="x" * (3 << 20))
    assert large.value.status_code == 413
    assert large.value.code == "request_too_large"


def test_retries_after_429_succeed(live: LiveServer, engine: FakeEngine) -> None:
    submit, refusals = engine.submit, iter([QueueFull("full", retry_after_seconds=0.1)])

    def once_full(request: Any) -> Any:
        refusal = next(refusals, None)
        if refusal is not None:
            raise refusal
        return submit(request)

    engine.submit = once_full  # type: ignore[method-assign]
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=1) as client:
        assert client.completions.create(model=BASE, prompt="user", max_tokens=2).choices


def test_deterministic_failures_are_not_retried(live: LiveServer, engine: FakeEngine) -> None:
    calls = []

    def fail(request: Any) -> Any:
        calls.append(request)
        raise EngineFailed("dead")

    engine.submit = fail  # type: ignore[method-assign]
    with (
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=3) as client,
        pytest.raises(openai.InternalServerError),
    ):
        client.completions.create(model=BASE, prompt="user")
    assert len(calls) == 1


def test_leaving_a_stream_frees_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request, index: [40] * 400
    engine.step_seconds = 0.01
    with client.completions.create(model=BASE, prompt="user", max_tokens=400, stream=True) as stream:
        next(iter(stream))
        assert engine.num_open == 1
    wait_until(lambda: engine.num_open == 0, seconds=1)
    assert len(engine.aborted) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_gives_up_frees_the_engine(live: LiveServer, engine: FakeEngine, stream: bool) -> None:
    """Before any answer: the request waits for its first token, or is collected whole."""
    engine.step_seconds = 30
    with (
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0, timeout=0.3) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        client.completions.create(model=BASE, prompt="user", max_tokens=5, stream=stream)
    wait_until(lambda: engine.num_open == 0, seconds=1)


def test_async_client_in_parallel(live: LiveServer, engine: FakeEngine) -> None:
    engine.script = lambda request, index: engine.tokenizer.encode(
        "-".join(version[:2] for version in request.binding.versions) or "base"
    )

    async def ask(client: openai.AsyncOpenAI, model: str, stream: bool) -> str:
        if not stream:
            answer = await client.chat.completions.create(model=model, messages=HELLO)
            return answer.choices[0].message.content or ""
        chunks = await client.chat.completions.create(model=model, messages=HELLO, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as client:
            models = [BASE, "tone", "code", f"tone@{TONE_V1}"] * 5
            return await asyncio.gather(*(ask(client, model, i % 2 == 0) for i, model in enumerate(models)))

    assert asyncio.run(main()) == ["base", "a2", "c0", "a1"] * 5


def wait_until(condition: Any, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)
