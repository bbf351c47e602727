"""What HTTP says and does about an adapter that puts virtual tokens before a prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM

from deltaserve.config import MIB, EngineConfig, ServeConfig
from deltaserve.model.base import load_base
from deltaserve.remote import RemoteServer
from deltaserve_store.names import NameEntry, NameMap
from deltatest.composed_judge import ComposedJudge
from deltatest.fake_engine import CODE_V1, FakeEngine, record
from deltatest.live_runtime import serve_runtime
from deltatest.peft_adapters import make_peft_lora
from deltatest.prefix_adapters import Oracle, make_prefix
from deltatest.tiny_models import save_random, tiny_config
from deltatest.tokenizers import byte_level

NUM_PREFIX_TOKENS = 37
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def code_is_a_prefix(engine: FakeEngine) -> None:
    """The adapter ``code`` has 37 virtual tokens."""
    names: NameMap = engine.names
    entry = NameEntry(CODE_V1, {CODE_V1: replace(record("code", CODE_V1), num_prefix_tokens=NUM_PREFIX_TOKENS)})
    engine.names = replace(names, adapters={**names.adapters, "default": {**names.adapters["default"], "code": entry}})


@pytest.mark.usefixtures("code_is_a_prefix")
def test_chat_leaves_the_prefix_its_room(http: TestClient, engine: FakeEngine) -> None:
    for model, taken in (("tone", 0), ("code", NUM_PREFIX_TOKENS), ("tiny", 0)):
        answer = http.post("/v1/chat/completions", json={"model": model, "messages": HELLO})
        assert answer.status_code == 200
        request = engine.requests[-1]
        assert request.binding.num_prefix_tokens == taken
        assert len(request.prompt_ids) + request.sampling.max_tokens + taken == engine.max_model_len
        assert answer.json()["usage"]["prompt_tokens"] == len(request.prompt_ids)


@pytest.mark.usefixtures("code_is_a_prefix")
def test_a_prompt_that_only_the_prefix_makes_too_long(http: TestClient, engine: FakeEngine) -> None:
    prompt = [5] * (engine.max_model_len - 20)
    body = {"prompt": prompt, "max_tokens": 4}
    assert http.post("/v1/completions", json={"model": "tone", **body}).status_code == 200
    answer = http.post("/v1/completions", json={"model": "code", **body})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "virtual tokens take 37" in error["message"]
    messages = [{"role": "user", "content": "x" * (engine.max_model_len - 40)}]
    assert http.post("/v1/chat/completions", json={"model": "code", "messages": messages}).status_code == 400


@pytest.mark.usefixtures("code_is_a_prefix")
def test_listings_tell(http: TestClient, engine: FakeEngine) -> None:
    models = {model["id"]: model["max_model_len"] for model in http.get("/v1/models").json()["data"]}
    assert models["tone"] - models["code"] == NUM_PREFIX_TOKENS
    assert models["tiny"] == models["tone"] == engine.max_model_len
    assert http.get("/v1/adapters/code").json()["prefix_tokens"] == NUM_PREFIX_TOKENS
    assert http.get("/v1/adapters/tone").json()["prefix_tokens"] == 0


def test_from_upload_to_answer(tmp_path: Path) -> None:
    """The whole server: files in over HTTP, PEFT's tokens out, virtual ones in no count; the limit is what is left."""
    torch.set_num_threads(1)
    tokenizer = byte_level()
    base = save_random(tiny_config("llama", vocab_size=tokenizer.vocab_size), tmp_path / "base")
    tokenizer._hf.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    folder = make_prefix(model, tmp_path / "adapter", "prompt")
    limits = EngineConfig(max_model_len=96, max_num_seqs=4, max_num_batched_tokens=32, kv_cache_bytes=2 * MIB)
    config = ServeConfig(
        model=str(base),
        store=tmp_path / "store",
        port=0,
        dtype="float32",
        base_names=("tests/tiny-base",),
        drain_seconds=5,
        engine=limits,
    )
    prompt = tokenizer.encode("hello")
    body: dict[str, Any] = {"model": "soft", "prompt": prompt, "temperature": 0, "return_token_ids": True}
    with serve_runtime(config) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        told = RemoteServer(server.url).upload(folder, "soft")
        assert (told["kinds"], told["format"], told["prefix_tokens"]) == (["prefix"], "peft-prompt-tuning", 20)
        for max_tokens, status in ((76 - len(prompt), 200), (77 - len(prompt), 400)):
            answer = http.post("/v1/completions", json={**body, "max_tokens": max_tokens, "ignore_eos": True})
            assert answer.status_code == status
            if status == 200:
                found = answer.json()
                wanted = Oracle(model, folder).generate(prompt, max_tokens)
                assert found["choices"][0]["token_ids"] == wanted
                assert found["usage"]["prompt_tokens"] == len(prompt)
                assert found["usage"]["completion_tokens"] == max_tokens
        # The same virtual tokens under another adapter, and behind those of a third.
        others = {"lora": make_peft_lora(model, tmp_path / "lora", std=0.2), "given": tmp_path / "given"}
        make_prefix(model, others["given"], "prefix")
        for name, path in others.items():
            RemoteServer(server.url).upload(path, name)
        named = {"soft": folder, **others}
        parts = ("given", "lora", "soft")
        composed = {"model": config.base_names[0], "adapters": [{"id": name} for name in parts], "max_tokens": 8}
        answer = http.post("/v1/completions", json={**body, **composed, "ignore_eos": True})
        assert answer.status_code == 200, answer.text
        spec = load_base(base, dtype=torch.float32, cache_dir=tmp_path / "digests")
        judge = ComposedJudge(model, spec, named, tuple((name, 1.0) for name in parts))
        said = answer.json()["choices"][0]["token_ids"]
        assert said == judge.choices(prompt, said)
        assert answer.json()["usage"]["prompt_tokens"] == len(prompt)
        for max_tokens, status in ((71 - len(prompt), 200), (72 - len(prompt), 400)):
            answer = http.post("/v1/completions", json={**body, **composed, "max_tokens": max_tokens})
            assert answer.status_code == status
        assert "of which virtual tokens take 25" in answer.json()["error"]["message"]
        composed["adapters"] = [{"id": "soft", "scale": 0.5}, {"id": "lora"}]
        error = http.post("/v1/completions", json={**body, **composed}).json()["error"]
        assert (error["param"], error["code"]) == ("adapters[0].scale", "composition_refused")
        assert "allowed: strength 0 or 1" in error["message"]
