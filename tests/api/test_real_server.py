"""The whole server on a tiny random base: HTTP, door, engine and adapters together, driven by the OpenAI client."""

from __future__ import annotations

import concurrent.futures
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM

from deltaserve.config import MIB, EngineConfig, ServeConfig
from deltaserve.remote import RemoteServer
from deltatest.live_runtime import serve_runtime
from deltatest.live_server import LiveServer
from deltatest.peft_adapters import make_peft_lora, peft_greedy
from deltatest.tiny_models import save_random, tiny_config
from deltatest.tokenizers import byte_level

BASE = "tiny-base"
GREEDY: Any = {"temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True, "return_token_ids": True}}
PROMPT = "The quick brown fox"
CALL = " jumps"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base with a tokenizer, and four PEFT adapters: two of other content, a second version of the first, and one
    that acts from ``CALL`` on."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("real")
    tokenizer = byte_level()
    config = tiny_config("llama", vocab_size=tokenizer.vocab_size, tie_word_embeddings=True)
    base = save_random(config, root / BASE)
    tokenizer._hf.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = {"base": base}
    for name, rank, seed in (("tone", 8, 1), ("code", 3, 2), ("tone2", 4, 3)):
        found[name] = make_peft_lora(model, root / name, rank=rank, seed=seed, std=0.3, base_name=BASE)
    called: Any = {"alora_invocation_tokens": tokenizer.encode(CALL)}
    found["called"] = make_peft_lora(model, root / "called", rank=4, seed=4, std=0.3, base_name=BASE, **called)
    return found


@pytest.fixture(scope="module")
def live(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    config = ServeConfig(
        model=str(folders["base"]),
        store=tmp_path_factory.mktemp("store") / "store",
        port=0,
        dtype="float32",
        drain_seconds=5,
        engine=EngineConfig(
            max_model_len=256, max_num_seqs=16, max_num_batched_tokens=128, kv_cache_bytes=8 * MIB, adapter_slots=8
        ),
    )

    with serve_runtime(config) as server:
        door = RemoteServer(server.url)
        for name in ("tone", "code", "called"):
            assert door.upload(folders[name], name)["state"] in ("stored", "host", "ready", "loading")
        yield server


@pytest.fixture
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def greedy_ids(client: openai.OpenAI, model: str, prompt: Any = PROMPT) -> list[int]:
    return client.completions.create(model=model, prompt=prompt, **GREEDY).choices[0].token_ids  # type: ignore[attr-defined]


def expected_ids(folders: dict[str, Path], name: str | None) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    model.generation_config.eos_token_id = None
    prompt = byte_level().encode(PROMPT)
    return peft_greedy(model, folders[name] if name else None, prompt, GREEDY["max_tokens"])


@pytest.mark.parametrize("name", [None, "tone", "code"])
def test_answers_are_peft_s(client: openai.OpenAI, folders: dict[str, Path], name: str | None) -> None:
    assert greedy_ids(client, name or BASE) == expected_ids(folders, name)


def test_a_mixed_batch_answers_as_each_alone(client: openai.OpenAI) -> None:
    models = [BASE, "tone", "code"]
    alone = {model: greedy_ids(client, model) for model in models}
    assert len({tuple(ids) for ids in alone.values()}) == 3
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        mixed = list(pool.map(lambda i: (models[i % 3], greedy_ids(client, models[i % 3])), range(24)))
    assert all(ids == alone[model] for model, ids in mixed)


def test_a_composition_is_peft_s_weighted_sum(client: openai.OpenAI, folders: dict[str, Path]) -> None:
    adapters = [{"id": "tone", "scale": 0.4}, {"id": "code", "scale": 0.7}]
    fields: Any = {**GREEDY, "extra_body": {**GREEDY["extra_body"], "adapters": adapters}}
    answer: Any = client.completions.create(model=BASE, prompt=PROMPT, **fields)
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32), str(folders["tone"]), "tone"
    )
    model.load_adapter(str(folders["code"]), "code")
    model.add_weighted_adapter(["tone", "code"], [0.4, 0.7], "sum", combination_type="cat")
    model.set_adapter("sum")
    ids = byte_level().encode(PROMPT)
    said = answer.choices[0].token_ids
    with torch.no_grad():
        wanted = model(torch.tensor([[*ids, *said]])).logits[0, len(ids) - 1 : -1].argmax(-1).tolist()
    assert said == wanted
    assert said not in [greedy_ids(client, name) for name in (BASE, "tone", "code")]
    assert [part["id"] for part in answer.adapters] == ["tone", "code"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model=BASE, prompt=PROMPT, extra_body={"adapters": [{"id": "tone"}, {"id": "none"}]})
    assert caught.value.param == "adapters[1].id"


def test_an_ensemble_is_the_mean_of_peft_s_logits(client: openai.OpenAI, folders: dict[str, Path]) -> None:
    members = [{"model": "tone", "weight": 0.7}, {"adapters": [{"id": "code"}], "weight": 0.5}, {"model": BASE}]
    ensemble = {"members": [*members[:2], {**members[2], "weight": -0.2}]}
    fields: Any = {**GREEDY, "extra_body": {**GREEDY["extra_body"], "ensemble": ensemble}}
    answer: Any = client.completions.create(model=BASE, prompt=PROMPT, **fields)
    ids, said = byte_level().encode(PROMPT), answer.choices[0].token_ids
    mean: Any = 0.0
    for name, weight in (("tone", 0.7), ("code", 0.5), (None, -0.2)):
        model: Any = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
        model = model if name is None else PeftModel.from_pretrained(model, str(folders[name]))
        with torch.no_grad():
            mean = mean + weight * model(torch.tensor([[*ids, *said]])).logits[0, len(ids) - 1 : -1]
    assert said == mean.argmax(-1).tolist()
    assert said not in [greedy_ids(client, name) for name in (BASE, "tone", "code")]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), GREEDY["max_tokens"])
    stream = client.completions.create(model=BASE, prompt=PROMPT, stream=True, **fields)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text
    assert [member["weight"] for member in answer.ensemble["members"]] == [0.7, 0.5, -0.2]
    alone: Any = {**fields, "extra_body": {**GREEDY["extra_body"], "ensemble": {"members": [{"model": "tone"}]}}}
    one: Any = client.completions.create(model=BASE, prompt=PROMPT, **alone)
    assert one.choices[0].token_ids == greedy_ids(client, "tone")
    many: Any = {**fields, "extra_body": {"ensemble": {"members": [{"model": "tone"}] * 17}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=BASE, prompt=PROMPT, **many)
    assert (caught.value.code, caught.value.param) == ("ensemble_refused", "ensemble.members")


def test_an_activated_lora_acts_from_its_invocation_on(client: openai.OpenAI, folders: dict[str, Path]) -> None:
    assert greedy_ids(client, "called") == greedy_ids(client, BASE)
    prompt = f"{8 * PROMPT}{CALL} over"
    model = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    wanted = peft_greedy(model, folders["called"], byte_level().encode(prompt), GREEDY["max_tokens"])
    assert greedy_ids(client, BASE, prompt) != wanted
    answer: Any = client.completions.create(model="called", prompt=prompt, **GREEDY)
    assert answer.choices[0].token_ids == wanted
    assert answer.usage.prompt_tokens_details.cached_tokens >= 16  # computed for the base just now


def test_streams_equal_whole_answers(client: openai.OpenAI) -> None:
    for model in (BASE, "tone"):
        fields: Any = {"model": model, "messages": [{"role": "user", "content": "hello"}], "seed": 7, "max_tokens": 30}
        whole = client.chat.completions.create(**fields).choices[0].message.content
        chunks = client.chat.completions.create(**fields, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
        assert client.chat.completions.create(**fields).choices[0].message.content == whole


def test_choices_of_one_request_differ_and_repeat_with_the_seed(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tone", "prompt": PROMPT, "n": 3, "seed": 5, "max_tokens": 12}
    first, second = ([choice.text for choice in client.completions.create(**fields).choices] for _ in range(2))
    assert first == second
    assert len(set(first)) == 3


def test_stop_strings_and_limits(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tone", prompt=PROMPT, **GREEDY).choices[0].text
    stop = whole[8:11]
    answer = client.completions.create(model="tone", prompt=PROMPT, stop=stop, **GREEDY)
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=BASE, prompt=PROMPT, max_tokens=1000)
    assert caught.value.code == "context_length_exceeded"
    assert "256" in caught.value.message
    with pytest.raises(openai.BadRequestError) as outside:
        client.completions.create(model=BASE, prompt=[1, 99_999])
    assert outside.value.param == "prompt"


def test_a_prompt_is_scored_as_by_transformers(client: openai.OpenAI, folders: dict[str, Path]) -> None:
    ids = byte_level().encode(PROMPT)
    choice = client.completions.create(model=BASE, prompt=PROMPT, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert choice.text == PROMPT
    model = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    expected = [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)


def test_greedy_logprobs_name_the_chosen_token_first(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="code",
        messages=[{"role": "user", "content": "hi"}],
        temperature=0,
        max_tokens=10,
        logprobs=True,
        top_logprobs=3,
    )
    assert answer.choices[0].logprobs is not None
    for entry in answer.choices[0].logprobs.content or []:
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)


def test_versions_pin_and_names_move(client: openai.OpenAI, live: LiveServer, folders: dict[str, Path]) -> None:
    door = RemoteServer(live.url)
    old = door.show("tone")["version"]
    before = greedy_ids(client, "tone")
    door.alias("prod", "tone")
    raw = client.completions.with_raw_response.create(model="tone", prompt=PROMPT, max_tokens=200, stream=True)
    stream = raw.parse()
    assert raw.headers["x-adapter-version"] == old
    new = door.upload(folders["tone2"], "tone", expected_version=old)["version"]
    assert {chunk.system_fingerprint for chunk in stream} == {old}  # what runs keeps its version
    after = greedy_ids(client, "tone")
    assert after != before
    assert greedy_ids(client, "prod") == after
    assert greedy_ids(client, f"tone@{old[:8]}") == before
    assert client.completions.create(model="tone", prompt=PROMPT, max_tokens=1).system_fingerprint == new
    assert door.rollback("tone")["version"] == old
    assert greedy_ids(client, "tone") == before


def test_a_damaged_upload_is_refused_with_reasons(live: LiveServer, folders: dict[str, Path], tmp_path: Path) -> None:
    from deltaserve.errors import AdapterRefused

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((folders["code"] / "adapter_config.json").read_bytes())
    (broken / "adapter_model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(AdapterRefused) as caught:
        RemoteServer(live.url).upload(broken, "broken")
    assert caught.value.reasons
    assert all(reason.code and reason.where and reason.allowed for reason in caught.value.reasons)


def test_leaving_frees_everything(client: openai.OpenAI, live: LiveServer) -> None:
    with client.completions.create(
        model="code", prompt=PROMPT, max_tokens=230, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    deadline = time.monotonic() + 1
    while gauges(live)["deltaserve_requests_running"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert gauges(live)["deltaserve_adapter_pins"] == 0


def test_metrics_of_a_working_server_move(client: openai.OpenAI, live: LiveServer) -> None:
    client.completions.create(model="tone", prompt=PROMPT, max_tokens=4)
    values = gauges(live)
    for name in (
        "deltaserve_engine_up",
        "deltaserve_tokens_total",
        "deltaserve_step_seconds_count",
        "deltaserve_batch_tokens_count",
        "deltaserve_time_to_first_token_seconds_count",
        "deltaserve_inter_token_latency_seconds_count",
        "deltaserve_queue_seconds_count",
        "deltaserve_adapter_requests_total",
        "deltaserve_adapter_loads_total",
        "deltaserve_adapter_slots_used",
        "deltaserve_adapter_info",
        "deltaserve_adapter_uploads_total",
        "deltaserve_upload_bytes_total",
        "deltaserve_kv_blocks_capacity",
    ):
        assert values.get(name, 0) > 0, name


def test_deleted_adapters_are_gone(client: openai.OpenAI, live: LiveServer, folders: dict[str, Path]) -> None:
    door = RemoteServer(live.url)
    door.upload(folders["tone2"], "brief")
    stream = client.completions.create(
        model="brief", prompt=PROMPT, max_tokens=100, stream=True, extra_body={"ignore_eos": True}
    )
    first = next(iter(stream))
    assert client.models.delete("brief").deleted
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="brief", prompt=PROMPT)
    assert list(stream)[-1].choices[0].finish_reason == "length"  # what ran goes on to its end
    assert first.model == "brief"


def gauges(live: LiveServer) -> dict[str, float]:
    with urllib.request.urlopen(f"{live.url}/metrics") as response:
        families = text_string_to_metric_families(response.read().decode())
        values: dict[str, float] = {}
        for family in families:
            for sample in family.samples:
                values[sample.name] = values.get(sample.name, 0) + sample.value
        return values


def test_hostile_json_does_not_reach_the_engine(live: LiveServer) -> None:
    for body in (b'{"model": "tone", "prompt": "\\ud800"}', b'{"model": "tone", "prompt": [1e999]}', b"[" * 10_000):
        request = urllib.request.Request(
            f"{live.url}/v1/completions", data=body, headers={"content-type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == 400
        assert json.loads(caught.value.read())["error"]["code"]
