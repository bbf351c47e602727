"""The field ``ensemble``: what it may hold, what reaches the engine, and what the answer tells of it."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from deltaserve.core import BASE_BINDING, Binding, BindingPart, Ensemble, Member, Mix
from deltaserve.errors import AdapterUnavailable, EnsembleRefused
from deltaserve_store.names import NameEntry
from deltatest.fake_engine import BASE, CODE_V1, LONG_BASE, TONE_V1, TONE_V2, FakeEngine

ROUTES = ("/v1/completions", "/v1/chat/completions")
TONE, CODE = Binding((BindingPart(TONE_V2),)), Binding((BindingPart(CODE_V1),))


def ask(http: TestClient, ensemble: Any, route: str = ROUTES[0], **fields: Any) -> Any:
    prompt = {"prompt": "user"} if route == ROUTES[0] else {"messages": [{"role": "user", "content": "user"}]}
    return http.post(route, json={"model": BASE, "ensemble": ensemble, "max_tokens": 8, **prompt, **fields})


def of(*members: Any, **fields: Any) -> dict[str, Any]:
    return {"members": list(members), **fields}


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def change(engine: FakeEngine, **fields: dict[str, Any]) -> None:
    """Give the current versions of adapters other fields."""
    own = dict(engine.names.adapters["default"])
    for name, values in fields.items():
        entry = own[name]
        changed: Any = dataclasses.replace(entry.records[entry.current], **values)
        own[name] = NameEntry(entry.current, {**entry.records, entry.current: changed})
    engine.names = dataclasses.replace(engine.names, adapters={"default": own})


@pytest.mark.parametrize("route", ROUTES)
def test_members_reach_the_engine_in_order_pinned_to_versions(http: TestClient, engine: FakeEngine, route: str) -> None:
    members = [
        {"model": "prod"},
        {"adapters": [{"id": "code", "scale": 0.8}, {"id": f"tone@{TONE_V1[:8]}", "scale": [0.5, 1]}], "weight": 0.5},
        {"model": BASE, "weight": -0.25},
        {"model": LONG_BASE, "adapters": [{"id": "code"}], "weight": 1},
    ]
    response = ask(http, of(*members), route)
    body = response.json()
    assert response.status_code == 200, body
    both = Binding((BindingPart(CODE_V1, 0.8, 0.8), BindingPart(TONE_V1, 0.5, 1.0)))
    sent = engine.requests[-1]
    assert sent.binding == BASE_BINDING
    assert sent.ensemble == Ensemble(
        (Member(TONE, 0.25), Member(both, 0.5), Member(BASE_BINDING, -0.25), Member(CODE, 1.0))
    )
    assert sent.versions == (TONE_V2, CODE_V1, TONE_V1)
    assert body["model"] == BASE
    assert body["ensemble"] == {
        "mix": "logits",
        "members": [
            {"model": "prod", "version": TONE_V2, "weight": 0.25},
            {
                "adapters": [
                    {"id": "code", "version": CODE_V1, "scale": 0.8},
                    {"id": f"tone@{TONE_V1[:8]}", "version": TONE_V1, "scale": [0.5, 1.0]},
                ],
                "weight": 0.5,
            },
            {"model": BASE, "version": None, "weight": -0.25},
            {"adapters": [{"id": "code", "version": CODE_V1, "scale": 1.0}], "weight": 1.0},
        ],
    }
    assert "adapters" not in body
    assert response.headers["x-adapter-version"] == f"{TONE_V2},{CODE_V1},{TONE_V1}"
    assert body["usage"]["prompt_tokens"] == len(sent.prompt_ids)
    assert body["usage"]["completion_tokens"] == 8


def test_the_mean_of_probabilities_and_equal_weights(http: TestClient, engine: FakeEngine) -> None:
    assert ask(http, of({"model": "tone"}, {"model": "tone"}, {"model": BASE}, mix="probabilities")).status_code == 200
    sent = engine.requests[-1].ensemble
    assert sent is not None
    assert sent.mix is Mix.PROBABILITIES
    assert [member.weight for member in sent.members] == [1 / 3] * 3


def test_the_fingerprint_names_members_weights_order_and_mix(http: TestClient) -> None:
    def fingerprint(*members: dict[str, Any], **fields: Any) -> str:
        text: str = ask(http, of(*members, **fields)).json()["system_fingerprint"]
        return text

    one, two = {"model": "code"}, {"model": "tone"}
    assert fingerprint(one) == CODE_V1  # as when it is named in ``model``
    seen = [
        fingerprint(one, two),
        fingerprint(two, one),
        fingerprint(one, two, mix="probabilities"),
        fingerprint(one, {**two, "weight": 0.6}),
        fingerprint(one, {"adapters": [{"id": "tone", "scale": 0.5}]}),
        fingerprint({**one, "weight": 2}),
        fingerprint({"adapters": [{"id": "code"}, {"id": "tone"}]}),
    ]
    assert len(set(seen)) == len(seen)
    assert all(len(text) == 64 for text in seen)
    assert fingerprint({"adapters": [{"id": "code"}]}, {"model": "prod", "weight": None}) == seen[0]


def test_streams_tell_the_same(http: TestClient) -> None:
    ensemble = of({"model": "code"}, {"model": BASE})
    whole = ask(http, ensemble).json()
    response = ask(http, ensemble, stream=True)
    assert response.headers["x-adapter-version"] == CODE_V1
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    for key in ("ensemble", "system_fingerprint", "model"):
        assert {json.dumps(chunk[key]) for chunk in chunks} == {json.dumps(whole[key])}


def test_null_is_as_if_the_field_were_not_there(http: TestClient, engine: FakeEngine) -> None:
    response = ask(http, None, model="tone")
    assert response.status_code == 200
    assert engine.requests[-1].ensemble is None
    assert engine.requests[-1].binding == TONE
    assert "ensemble" not in response.json()
    assert "x-adapter-version" not in ask(http, of({"model": BASE})).headers


@pytest.mark.parametrize("member", [{"model": "nobody"}, {"model": "secret"}, {"model": "tone@0123456789"}])
def test_a_model_that_the_key_does_not_see_is_named(http: TestClient, engine: FakeEngine, member: Any) -> None:
    error = error_of(ask(http, of({"model": "code"}, member)), 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "ensemble.members[1].model"
    composed = {"adapters": [{"id": "code"}, {"id": member["model"]}]}
    error = error_of(ask(http, of(composed)), 404)
    assert error["param"] == "ensemble.members[0].adapters[1].id"
    assert error["message"].startswith("ensemble.members[0].adapters[1].id: ")
    assert not engine.requests


def test_rules_of_compositions_are_those_of_each_member(http: TestClient) -> None:
    twice = {"adapters": [{"id": "tone"}, {"id": "prod"}]}
    error = error_of(ask(http, of({"model": "code"}, twice)), 400)
    assert (error["code"], error["param"]) == ("composition_refused", "ensemble.members[1].adapters[1].id")
    assert "ensemble.members[1].adapters[0] and ensemble.members[1].adapters[1] (" in error["message"]
    error = error_of(ask(http, of({"adapters": [{"id": BASE}]})), 400)
    assert error["param"] == "ensemble.members[0].adapters[0].id"
    error = error_of(ask(http, of({"model": "tone", "adapters": [{"id": "code"}]})), 400)
    assert error["param"] == "ensemble.members[0].model"


def test_model_is_the_base_and_adapters_belong_to_members(http: TestClient, engine: FakeEngine) -> None:
    members = of({"model": "code"})
    assert error_of(ask(http, members, model="tone"), 400)["param"] == "model"
    assert error_of(ask(http, members, model="nobody"), 404)["param"] == "model"
    error = error_of(ask(http, members, adapters=[{"id": "tone"}]), 400)
    assert error["param"] == "adapters"
    assert "each member lists its own" in error["message"]
    assert not engine.requests
    assert ask(http, members, adapters=[]).status_code == 200


@pytest.mark.parametrize(
    ("ensemble", "param"),
    [
        ("code", "ensemble"),
        (["code"], "ensemble"),
        ({}, "ensemble.members"),
        ({"members": None}, "ensemble.members"),
        (of(), "ensemble.members"),
        (of("code"), "ensemble.members[0]"),
        (of({}), "ensemble.members[0]"),
        (of({"model": None, "adapters": []}), "ensemble.members[0]"),
        (of({"model": "code"}, {"weight": 1}), "ensemble.members[1]"),
        (of({"model": ""}), "ensemble.members[0].model"),
        (of({"model": 7}), "ensemble.members[0].model"),
        (of({"model": "code", "scale": 1}), "ensemble.members[0].scale"),
        (of({"adapters": ["code"]}), "ensemble.members[0].adapters[0]"),
        (of({"adapters": [{"id": "code", "scale": "1"}]}), "ensemble.members[0].adapters[0].scale"),
        (of({"model": "code"}, mix="mean"), "ensemble.mix"),
        (of({"model": "code"}, mix=1), "ensemble.mix"),
        (of({"model": "code"}, n=2), "ensemble.n"),
        *[(of({"model": "code", "weight": weight}), "ensemble.members[0].weight") for weight in ("1", True, [1], 0)],
        (of({"model": "code", "weight": 1001}), "ensemble.members[0].weight"),
        (of({"model": "code"}, {"model": BASE, "weight": -1}, mix="probabilities"), "ensemble.members[1].weight"),
        (of({"adapters": [{"id": "code", "scale": 1e39}]}), "ensemble.members[0].adapters[0].scale"),
        (of(*[{"model": BASE}] * 257), "ensemble.members"),
    ],
)
def test_malformed_ensembles_name_the_field(http: TestClient, engine: FakeEngine, ensemble: Any, param: str) -> None:
    assert error_of(ask(http, ensemble), 400)["param"] == param
    assert not engine.requests


def test_numbers_beyond_a_double_are_refused(http: TestClient) -> None:
    for number in ("1e400", "1" + "0" * 400, "NaN", "-Infinity"):
        member = f'{{"model": "code", "weight": {number}}}'
        body = f'{{"model": "{BASE}", "prompt": "a", "ensemble": {{"members": [{member}]}}}}'
        response = http.post(ROUTES[0], content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400


def test_the_limit_is_stated(http: TestClient) -> None:
    assert ask(http, of(*[{"model": "code"}] * 8)).status_code == 200  # as many as there are seats
    error = error_of(ask(http, of(*[{"model": "code"}] * 9)), 400)
    assert (error["code"], error["param"]) == ("ensemble_refused", "ensemble.members")
    assert "9 members; 1 to 8 are allowed" in error["message"]
    error = error_of(ask(http, of(*[{"model": "nobody"}] * 9)), 400)
    assert "9 members; 1 to 8 are allowed" in error["message"], "before names that there are not"
    error = error_of(ask(http, of({"model": "code"}, {"adapters": [{"id": "nobody"}] * 9})), 400)
    assert error["param"] == "ensemble.members[1].adapters"
    assert "composes 9 adapters; at most 8 are allowed" in error["message"]


@pytest.mark.parametrize(
    ("count", "told"), [(0, "at least 1 entry is needed, found 0"), (257, "at most 256 entries are allowed, found 257")]
)
def test_lengths_are_told_in_our_words(http: TestClient, count: int, told: str) -> None:
    error = error_of(ask(http, of(*[{"model": "code"}] * count)), 400)
    assert error["message"] == f"ensemble.members: {told}"


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_the_engine_keeps_its_status_and_field(http: TestClient, engine: FakeEngine, stream: bool) -> None:
    engine.fail_after, engine.failure = 0, AdapterUnavailable("gone", param="ensemble.members[1]")
    error = error_of(ask(http, of({"model": "code"}, {"model": "tone"}), stream=stream), 503)
    assert (error["code"], error["param"]) == ("adapter_unavailable", "ensemble.members[1]")
    engine.refuse = EnsembleRefused("too much", param="ensemble.members")
    assert error_of(ask(http, of({"model": "code"}), stream=stream), 400)["code"] == "ensemble_refused"


def test_stop_tokens_of_all_members_end_the_answer(http: TestClient, engine: FakeEngine) -> None:
    change(engine, tone={"stop_token_ids": (7, 9)}, code={"stop_token_ids": (9, 11)})
    ask(http, of({"model": "code"}, {"model": BASE}, {"adapters": [{"id": "tone"}]}))
    assert engine.requests[-1].eos_token_ids == (*engine.tokenizer.eos_token_ids, 9, 11, 7)


def test_an_activated_member_begins_at_its_invocation_in_each_prompt(http: TestClient, engine: FakeEngine) -> None:
    change(engine, tone={"invocation_token_ids": (7, 9)})
    ids = [[1, 7, 9, 2, 7, 9, 3], [1, 2, 3]]
    assert ask(http, of({"model": "tone"}, {"model": "code"}), prompt=ids).status_code == 200
    sent = [each.ensemble.members[0].binding.parts for each in engine.requests if each.ensemble is not None]
    assert [[part.start_position for part in parts] for parts in sent] == [[4], []]


def test_virtual_tokens_of_the_longest_member_count(http: TestClient, engine: FakeEngine) -> None:
    change(engine, tone={"num_prefix_tokens": 100}, code={"num_prefix_tokens": 400})
    both = of({"model": "tone"}, {"model": "code"})
    assert ask(http, both, ROUTES[1], max_tokens=None).status_code == 200
    sent = engine.requests[-1]
    assert len(sent.prompt_ids) + sent.sampling.max_tokens == 512 - 400
    assert error_of(ask(http, both, prompt="a" * 110), 400)["code"] == "context_length_exceeded"


def test_an_open_end_leaves_room_for_all_members(http: TestClient, engine: FakeEngine) -> None:
    """The fake's KV cache holds two rows of the longest length."""
    for count, room in ((1, 512), (2, 512), (4, 256)):
        assert ask(http, of(*[{"model": "code"}] * count), ROUTES[1], max_tokens=None).status_code == 200
        sent = engine.requests[-1]
        assert len(sent.prompt_ids) + sent.sampling.max_tokens == room


def test_chat_templates_must_agree(http: TestClient, engine: FakeEngine) -> None:
    change(engine, tone={"chat_template": "a"}, code={"chat_template": "b"})
    both = of({"model": "code"}, {"model": "tone"})
    error = error_of(ask(http, both, ROUTES[1]), 400)
    assert (error["code"], error["param"]) == ("ensemble_refused", "ensemble.members")
    assert "different chat templates (b, a)" in error["message"]
    assert ask(http, both).status_code == 200  # a prompt is rendered by whoever sends it


def test_the_log_names_every_member(http: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        ask(http, of({"adapters": [{"id": "code"}, {"id": "prod"}]}, {"model": BASE}, {"model": "code"}))
    (fields,) = [each.fields for each in caplog.records if "version" in getattr(each, "fields", {})]
    assert fields["model"] == f"code+tone|{BASE}|code"
    assert fields["version"] == f"{CODE_V1},{TONE_V2}"


def test_the_openai_client_sends_them(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=4,
        extra_body={"ensemble": {"members": [{"model": "code", "weight": 1.5}, {"model": BASE, "weight": -0.5}]}},
    )
    assert answer.ensemble["members"][0] == {"model": "code", "version": CODE_V1, "weight": 1.5}  # type: ignore[attr-defined]
    assert engine.requests[-1].versions == (CODE_V1,)
