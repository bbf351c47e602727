"""The field ``adapters``: what it may hold, what reaches the engine, and what the answer tells of it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from deltaserve.api.target import NEVER
from deltaserve.core import Binding, BindingPart
from deltaserve.errors import CompositionRefused, Reason
from deltaserve_store.manifest import AdapterRecord
from deltaserve_store.names import NameEntry, NameMap
from deltatest.fake_engine import BASE, CODE_V1, TONE_V1, TONE_V2, FakeEngine, record

ROUTES = ("/v1/completions", "/v1/chat/completions")


def ask(http: TestClient, adapters: Any, route: str = ROUTES[0], **fields: Any) -> Any:
    prompt = {"prompt": "user"} if route == ROUTES[0] else {"messages": [{"role": "user", "content": "user"}]}
    return http.post(route, json={"model": BASE, "adapters": adapters, "max_tokens": 8, **prompt, **fields})


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.parametrize("route", ROUTES)
def test_parts_reach_the_engine_in_order_pinned_to_versions(http: TestClient, engine: FakeEngine, route: str) -> None:
    adapters = [{"id": "code", "scale": 0.8}, {"id": "prod", "scale": [0.3, 1]}, {"id": f"tone@{TONE_V1[:8]}"}]
    response = ask(http, adapters, route)
    body = response.json()
    assert response.status_code == 200, body
    parts = (BindingPart(CODE_V1, 0.8, 0.8), BindingPart(TONE_V2, 0.3, 1.0), BindingPart(TONE_V1))
    assert engine.requests[-1].binding == Binding(parts)
    assert body["model"] == BASE
    assert body["adapters"] == [
        {"id": "code", "version": CODE_V1, "scale": 0.8},
        {"id": "prod", "version": TONE_V2, "scale": [0.3, 1.0]},
        {"id": f"tone@{TONE_V1[:8]}", "version": TONE_V1, "scale": 1.0},
    ]
    assert response.headers["x-adapter-version"] == f"{CODE_V1},{TONE_V2},{TONE_V1}"


def test_the_fingerprint_names_versions_scales_and_order(http: TestClient) -> None:
    def fingerprint(*adapters: dict[str, Any]) -> str:
        text: str = ask(http, list(adapters)).json()["system_fingerprint"]
        return text

    one, two = {"id": "code"}, {"id": "tone", "scale": 0.5}
    assert fingerprint(one) == CODE_V1  # as when it is named in ``model``
    seen = [
        fingerprint(one, two),
        fingerprint(two, one),
        fingerprint(one, {**two, "scale": [0.5, 0.6]}),
        fingerprint({"id": f"tone@{TONE_V1[:8]}", "scale": 0.5}, one),
        fingerprint(two),
    ]
    assert len(set(seen)) == len(seen)
    assert all(len(text) == 64 for text in seen)
    assert fingerprint({"id": "code", "scale": None}, {"id": "prod", "scale": [0.5, 0.5]}) == seen[0]


def test_streams_tell_the_same(http: TestClient) -> None:
    adapters = [{"id": "code"}, {"id": "tone", "scale": -1}]
    whole = ask(http, adapters).json()
    response = ask(http, adapters, stream=True)
    assert response.headers["x-adapter-version"] == f"{CODE_V1},{TONE_V2}"
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    for key in ("adapters", "system_fingerprint", "model"):
        assert {json.dumps(chunk[key]) for chunk in chunks} == {json.dumps(whole[key])}


@pytest.mark.parametrize("neutral", [[], None])
def test_none_listed_is_as_if_the_field_were_not_there(http: TestClient, engine: FakeEngine, neutral: Any) -> None:
    response = ask(http, neutral, model="tone")
    assert response.status_code == 200
    assert engine.requests[-1].binding == Binding((BindingPart(TONE_V2),))
    assert "adapters" not in response.json()
    assert ask(http, neutral).json()["system_fingerprint"] == engine.base_fingerprint


def test_an_unknown_adapter_is_named(http: TestClient, engine: FakeEngine) -> None:
    for index, adapters in ((1, ["code", "nobody", "nothing"]), (0, ["secret", "code"]), (2, ["code", "tone", "a:b"])):
        error = error_of(ask(http, [{"id": name} for name in adapters]), 404)
        assert error["code"] == "model_not_found"
        assert error["param"] == f"adapters[{index}].id"
        assert adapters[index] in error["message"]
    assert not engine.requests


def test_model_is_the_base_and_adapters_are_adapters(http: TestClient) -> None:
    error = error_of(ask(http, [{"id": "code"}], model="tone"), 400)
    assert error["param"] == "model"
    assert "names the base" in error["message"]
    error = error_of(ask(http, [{"id": "code"}, {"id": BASE}]), 400)
    assert error["param"] == "adapters[1].id"
    assert error_of(ask(http, [{"id": "code"}], model="nobody"), 404)["param"] == "model"


def test_one_version_twice_is_refused_under_whatever_names(http: TestClient) -> None:
    error = error_of(ask(http, [{"id": "tone"}, {"id": "code"}, {"id": "prod", "scale": 0.5}]), 400)
    assert error["code"] == "composition_refused"
    assert error["param"] == "adapters[2].id"
    assert "adapters[0] and adapters[2] (tone and prod)" in error["message"]


@pytest.mark.parametrize(
    ("adapters", "param"),
    [
        ("code", "adapters"),
        ({"id": "code"}, "adapters"),
        (["code"], "adapters[0]"),
        ([{}], "adapters[0].id"),
        ([{"id": ""}], "adapters[0].id"),
        ([{"id": 7}], "adapters[0].id"),
        ([{"id": "code", "weight": 1}], "adapters[0].weight"),
        *[
            ([{"id": "code"}, {"id": "tone", "scale": scale}], "adapters[1].scale")
            for scale in ("1", True, [], [1], [1, 2, 3], [1, "2"], [True, 1], {"first": 1}, [[1, 1], [1, 1]])
        ],
        ([{"id": "code"}, {"id": "tone", "scale": 1e39}], "adapters[1].scale"),
        ([{"id": "code", "scale": [0, -1.1e38]}], "adapters[0].scale"),
        ([None], "adapters[0]"),
        ([{"id": f"a{i}"} for i in range(257)], "adapters"),
    ],
)
def test_malformed_lists_name_the_field(http: TestClient, engine: FakeEngine, adapters: Any, param: str) -> None:
    assert error_of(ask(http, adapters), 400)["param"] == param
    assert not engine.requests


def test_an_entry_that_is_no_object_is_told_so_in_words_of_json(http: TestClient) -> None:
    assert error_of(ask(http, ["code"]), 400)["message"] == "adapters[0]: Input should be an object"


def test_minus_zero_is_zero(http: TestClient) -> None:
    answers = [ask(http, [{"id": "code", "scale": scale}]).json() for scale in (0, -0.0, [0.0, -0.0])]
    assert len({answer["system_fingerprint"] for answer in answers}) == 1
    assert {json.dumps(answer["adapters"]) for answer in answers} == {json.dumps(answers[0]["adapters"])}
    assert "-" not in json.dumps(answers[1]["adapters"])


def test_numbers_beyond_a_double_are_refused(http: TestClient) -> None:
    for number in ("1e400", "1" + "0" * 400, "NaN"):
        body = f'{{"model": "{BASE}", "prompt": "a", "adapters": [{{"id": "code", "scale": {number}}}]}}'
        response = http.post(ROUTES[0], content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400


def test_the_limit_is_stated(http: TestClient, engine: FakeEngine) -> None:
    records = {f"{i:064x}": record(f"a{i}", f"{i:064x}") for i in range(9)}
    names = {each.name: NameEntry(version, {version: each}) for version, each in records.items()}
    engine.names = NameMap(base_names=(BASE,), adapters={"default": names})
    assert ask(http, [{"id": f"a{i}"} for i in range(8)]).status_code == 200
    error = error_of(ask(http, [{"id": f"a{i}"} for i in range(9)]), 400)
    assert error["param"] == "adapters"
    assert "composes 9 adapters; at most 8 are allowed" in error["message"]
    error = error_of(ask(http, [{"id": "nobody"}] * 9), 400)
    assert "composes 9 adapters; at most 8 are allowed" in error["message"], "before names that there are not"


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_the_engine_keeps_its_status_and_reasons(
    http: TestClient, engine: FakeEngine, stream: bool
) -> None:
    reason = Reason("mixed_sides", "adapters[0]", "scales of inputs", "scales of one side")
    engine.fail_after, engine.failure = 0, CompositionRefused("no sum", param="adapters", reasons=[reason])
    error = error_of(ask(http, [{"id": "code"}, {"id": "tone"}], stream=stream), 400)
    assert error["code"] == "composition_refused"
    assert error["reasons"] == [dataclasses.asdict(reason)]


@pytest.fixture
def change(engine: FakeEngine) -> Callable[..., None]:
    """Gives the current versions of adapters other fields."""

    def apply(**fields: dict[str, Any]) -> None:
        own = dict(engine.names.adapters["default"])
        for name, values in fields.items():
            entry = own[name]
            changed: AdapterRecord = dataclasses.replace(entry.records[entry.current], **values)
            own[name] = NameEntry(entry.current, {**entry.records, entry.current: changed})
        engine.names = dataclasses.replace(engine.names, adapters={"default": own})

    return apply


def test_stop_tokens_of_all_parts_end_the_answer(
    http: TestClient, engine: FakeEngine, change: Callable[..., None]
) -> None:
    change(tone={"stop_token_ids": (7, 9)}, code={"stop_token_ids": (9, 11)})
    ask(http, [{"id": "code"}, {"id": "tone"}])
    assert engine.requests[-1].eos_token_ids == (*engine.tokenizer.eos_token_ids, 9, 11, 7)


def test_an_activated_part_begins_at_its_invocation_in_each_prompt(
    http: TestClient, engine: FakeEngine, change: Callable[..., None]
) -> None:
    """The last one counts; where there is none the base answers, or the other parts do."""
    change(tone={"invocation_token_ids": (7, 9)})
    ids = [[1, 7, 9, 2, 7, 9, 3], [1, 2, 3], [7, 9]]
    assert ask(http, [], prompt=ids, model="tone").headers["x-adapter-version"] == TONE_V2
    alone = [[(part.version, part.start_position) for part in each.binding.parts] for each in engine.requests]
    assert alone == [[(TONE_V2, 4)], [], [(TONE_V2, 0)]]
    engine.requests.clear()
    assert ask(http, [{"id": "tone", "scale": 0.5}, {"id": "code"}], prompt=ids).status_code == 200
    assert [each.binding.parts for each in engine.requests] == [
        (BindingPart(TONE_V2, 0.5, 0.5, start), BindingPart(CODE_V1)) for start in (4, NEVER, 0)
    ]


def test_virtual_tokens_move_the_place_where_a_part_begins(
    http: TestClient, engine: FakeEngine, change: Callable[..., None]
) -> None:
    """Token i stands at position p + i, and a part begins at a position; at strength 0 there are no virtual tokens."""
    change(tone={"invocation_token_ids": (7, 9)}, code={"num_prefix_tokens": 20})
    ids = [[1, 7, 9, 2], [1, 2, 3], [7, 9]]
    for scale, skipped in ((1, 20), (0, 0)):
        engine.requests.clear()
        adapters = [{"id": "code", "scale": scale}, {"id": "tone"}]
        assert ask(http, adapters, prompt=ids).status_code == 200
        assert [[part.start_position for part in each.binding.parts] for each in engine.requests] == [
            [0, start] for start in (skipped + 1, NEVER, skipped)
        ]
        assert {each.binding.num_prefix_tokens for each in engine.requests} == {skipped}


def test_chat_templates_must_agree(http: TestClient, change: Callable[..., None]) -> None:
    change(tone={"chat_template": "a"}, code={"chat_template": "b"})
    both = [{"id": "code"}, {"id": "tone"}]
    error = error_of(ask(http, both, ROUTES[1]), 400)
    assert error["code"] == "composition_refused"
    assert "different chat templates (b, a)" in error["message"]
    assert ask(http, both).status_code == 200  # a prompt is rendered by whoever sends it


def test_the_log_names_every_part(http: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        ask(http, [{"id": "code"}, {"id": "prod"}])
    (fields,) = [each.fields for each in caplog.records if "version" in getattr(each, "fields", {})]
    assert fields["model"] == "code+tone"
    assert fields["version"] == f"{CODE_V1},{TONE_V2}"


def test_the_openai_client_sends_them(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=4,
        extra_body={"adapters": [{"id": "code", "scale": 0.8}, {"id": "tone"}]},
    )
    assert answer.adapters[0] == {"id": "code", "version": CODE_V1, "scale": 0.8}  # type: ignore[attr-defined]
    assert engine.requests[-1].binding.versions == (CODE_V1, TONE_V2)
