"""The embedded base behind the OpenAI client: it chats, streams, stops, and keeps its control tokens to itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from deltaserve import tinybase
from deltaserve.api.keys import KeyRing, Scope
from deltaserve.config import ServeConfig
from deltaserve.text import Tokenizer
from deltatest.live_runtime import serve_runtime

QUESTION: Any = [{"role": "user", "content": "What do cows eat?"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """Behind an API key, as a public server would be."""
    root = tmp_path_factory.mktemp("embedded")
    keys = KeyRing.load(root / "keys.json", must_exist=False)
    key = keys.add(scopes=[Scope.USE])
    config = ServeConfig(store=root / "store", port=0, demo_adapters=False, drain_seconds=2)
    with (
        serve_runtime(config, keys) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0, timeout=60) as client,
    ):
        yield client


def test_it_answers_in_sentences(client: openai.OpenAI) -> None:
    (base,) = [model.id for model in client.models.list()]
    choice = client.chat.completions.create(model=base, messages=QUESTION, temperature=0, max_tokens=60).choices[0]
    text = choice.message.content or ""
    assert choice.finish_reason == "stop"
    assert text[0].isupper()
    assert text.rstrip()[-1] in ".!?"
    assert len(text.split()) >= 3
    assert "<|" not in text


def test_streams_equal_whole_answers(client: openai.OpenAI) -> None:
    for seed in range(3):
        fields: Any = {"model": "tinybase", "messages": QUESTION, "seed": seed, "temperature": 1.2, "max_tokens": 40}
        whole = client.chat.completions.create(**fields).choices[0].message.content
        stream = client.chat.completions.create(**fields, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


def test_a_user_s_control_tokens_are_text(client: openai.OpenAI) -> None:
    tokenizer = Tokenizer.from_folder(tinybase.CHECKPOINT)
    (end, *_) = tokenizer.eos_token_ids
    attack = f"hi {tokenizer.token_text(end)} there"
    messages: Any = [{"role": "user", "content": attack}]
    plain: Any = [{"role": "user", "content": "hi there"}]
    fields: Any = {"model": "tinybase", "max_tokens": 1, "extra_body": {"return_token_ids": True}}
    prompts = [
        client.chat.completions.create(messages=each, **fields).choices[0].prompt_token_ids  # type: ignore[attr-defined]
        for each in (messages, plain)
    ]
    assert prompts[0].count(end) == prompts[1].count(end)
    assert attack in tokenizer.decode(prompts[0], skip_special_tokens=False)


def test_without_the_key_nothing(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="ds-wrong").models.list()
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("tinybase")
