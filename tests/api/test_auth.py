"""Keys, scopes, tenants, and the loopback rule of a server without keys."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from deltaserve.api.app import create_app
from deltaserve.api.auth import PUBLIC_PATHS, Scope
from deltaserve.api.keys import KeyRing
from deltaserve.config import ServeConfig
from deltaserve.errors import ConfigError, InvalidRequest, NotFound
from deltaserve.metrics import Metrics
from deltatest.fake_engine import BASE, SECRET, FakeAdmission, FakeEngine, FakeStore

ONE_OF_EACH = {"name": "tone", "model": "tone", "alias": "prod", "id": "upload-1"}


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing.load(tmp_path / "keys.json", must_exist=False)


@pytest.fixture
def guarded(engine: FakeEngine, config: ServeConfig, tmp_path: Path, ring: KeyRing) -> FastAPI:
    store = FakeStore(tmp_path / "scratch")
    return create_app(engine, FakeAdmission(engine), store, engine.tokenizer, Metrics(), config, ring)


@pytest.fixture
def outside(guarded: FastAPI) -> TestClient:
    return TestClient(guarded, base_url="http://models.example.org")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    found = []
    pending: list[Any] = list(app.router.routes)
    while pending:
        route = pending.pop()
        if isinstance(route, APIRoute):
            found += [(method, route.path.replace(":path", "")) for method in sorted(route.methods)]
        else:
            inner = getattr(route, "original_router", None) or getattr(route, "app", None)
            pending += getattr(inner, "routes", [])
    return found


def test_every_route_without_a_key_is_401_except_the_public_ones(guarded: FastAPI, outside: TestClient) -> None:
    routes = routes_of(guarded)
    assert len(routes) >= 20, routes
    for method, path in routes:
        response = outside.request(method, path.format(**ONE_OF_EACH))
        expected = 200 if path in PUBLIC_PATHS else 401
        assert response.status_code == expected, (method, path)
        if expected == 401:
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.headers["x-request-id"]
    assert outside.get("/no/such/route").status_code == 401


def test_every_route_names_a_scope(guarded: FastAPI, outside: TestClient, ring: KeyRing) -> None:
    """A key without any matching scope gets 403 everywhere, before the handler looks at anything."""
    upload_only = ring.add(scopes=[Scope.UPLOAD])
    use_only = ring.add(scopes=[Scope.USE])
    seen = {}
    for method, path in routes_of(guarded):
        if path in PUBLIC_PATHS:
            continue
        statuses = [
            outside.request(method, path.format(**ONE_OF_EACH), headers=bearer(key)).status_code
            for key in (upload_only, use_only)
        ]
        assert 403 in statuses, (method, path)
        seen[method, path] = (
            "use" if statuses[0] == 403 != statuses[1] else "upload" if statuses[1] == 403 != statuses[0] else "admin"
        )
    assert seen["POST", "/v1/completions"] == "use"
    assert seen["POST", "/v1/adapters"] == "upload"
    assert seen["PUT", "/v1/aliases/{alias}"] == "upload"
    assert seen["DELETE", "/v1/adapters/{name}"] == "admin"
    assert seen["DELETE", "/v1/models/{model}"] == "admin"
    assert seen["GET", "/metrics"] == "admin"


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Bearer wrong", "Basic {key}", "{key}", "Bearer {key}x"])
def test_wrong_keys(outside: TestClient, ring: KeyRing, header: str) -> None:
    key = ring.add()
    response = outside.get("/v1/models", headers={"authorization": header.format(key=key)})
    assert response.status_code == 401


def test_a_key_opens_and_revoking_closes(outside: TestClient, ring: KeyRing) -> None:
    key = ring.add(label="laptop")
    assert outside.get("/v1/models", headers=bearer(key)).status_code == 200
    ring.revoke(ring.records[0].id)
    assert outside.get("/v1/models", headers=bearer(key)).status_code == 401


def test_tricks_with_host_and_path(outside: TestClient) -> None:
    for host in ("models.example.org/health", "models.example.org/health/live?", "127.0.0.1"):
        assert outside.get("/v1/models", headers={"host": host}).status_code == 401
    for path in (
        "/health/../v1/models",
        "/health/live/../../v1/models",
        "//health/live",
        "/health/live/",
        "/HEALTH/live",
    ):
        assert outside.get(path).status_code == 401, path


def test_other_tenants_are_invisible(outside: TestClient, ring: KeyRing, engine: FakeEngine) -> None:
    mine = bearer(ring.add(tenant="default", scopes=list(Scope)))
    theirs = bearer(ring.add(tenant="other", scopes=list(Scope)))
    for path in ("/v1/models", "/v1/adapters", "/v1/aliases"):
        assert "secret" not in outside.get(path, headers=mine).text
        assert "tone" not in outside.get(path, headers=theirs).text
    for method, path in (
        ("GET", "/v1/models/secret"),
        ("GET", "/v1/adapters/secret"),
        ("GET", "/v1/adapters/secret/versions"),
        ("DELETE", "/v1/adapters/secret"),
        ("DELETE", "/v1/models/secret"),
        ("POST", "/v1/adapters/secret/rollback"),
    ):
        found = outside.request(method, path, headers=mine)
        missing = outside.request(method, path.replace("secret", "absent"), headers=mine)
        assert found.status_code == missing.status_code == 404
        assert found.text.replace("secret", "absent") == missing.text
    body = {"model": "secret", "prompt": "user"}
    assert outside.post("/v1/completions", json=body, headers=mine).status_code == 404
    assert outside.post("/v1/completions", json=body, headers=theirs).status_code == 200
    assert engine.requests[0].tenant == "other"
    assert engine.requests[0].binding.versions == (SECRET,)
    # Of a composition every part: who may not see one, learns no more than that it is not there.
    for name in ("secret", "absent"):
        composed = {"model": BASE, "prompt": "user", "adapters": [{"id": "tone"}, {"id": name}]}
        error = outside.post("/v1/completions", json=composed, headers=mine).json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "adapters[1].id")
        assert error["message"].replace(name, "") == (
            "adapters[1].id: the model '' does not exist; see GET /v1/models for what is served"
        )
    assert len(engine.requests) == 1
    alias = outside.put("/v1/aliases/x", json={"target": "secret"}, headers=mine)
    assert alias.status_code == 404


def test_keys_and_prompts_are_never_logged(
    outside: TestClient, ring: KeyRing, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    from deltaserve.logs import JsonFormatter

    key = ring.add(scopes=list(Scope))
    canary = "canary-prompt-text"
    with caplog.at_level(logging.DEBUG):
        chat = {"model": BASE, "messages": [{"role": "user", "content": canary}]}
        outside.post("/v1/chat/completions", json=chat, headers=bearer(key))
        outside.post("/v1/completions", json={"model": BASE, "prompt": canary}, headers=bearer(key))
        outside.post("/v1/completions", json={"model": BASE, "prompt": canary, "stream": True}, headers=bearer(key))
        outside.post("/v1/completions", json={"model": canary, "prompt": [canary, 1]}, headers=bearer(key))
        outside.post("/v1/completions", json={canary: canary}, headers=bearer(key))
        outside.post("/v1/completions", content=canary, headers=bearer(key))
        outside.post("/tokenize", json={"prompt": canary}, headers=bearer(key))
        outside.get(f"/v1/models/{canary}?{canary}={canary}", headers=bearer(key))
        outside.get("/v1/models", headers=bearer("ds-" + canary))
    ours = [record for record in caplog.records if record.name.startswith("deltaserve")]
    assert len(ours) >= 9
    lines = [JsonFormatter().format(record) for record in ours]
    for line in lines:
        assert key not in line
        assert canary not in line
        assert json.loads(line)["fields" if "fields" in line else "message"]


def test_each_request_has_one_log_line_with_its_id(http: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    from deltaserve import logs

    lines = []

    class Catch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(logs.JsonFormatter().format(record)))

    logger, handler = logging.getLogger("deltaserve.api"), Catch()
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        response = http.post(
            "/v1/completions", json={"model": "tone", "prompt": "user"}, headers={"x-request-id": "abc-1.2"}
        )
        bad = http.get("/v1/models/none", headers={"x-request-id": "bad id\r\nx: y".replace("\r\n", " ")})
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert response.headers["x-request-id"] == "abc-1.2"
    assert bad.headers["x-request-id"].startswith("req-")
    assert [line["request_id"] for line in lines] == ["abc-1.2", bad.headers["x-request-id"]]
    assert lines[0]["route"] == "/v1/completions"
    assert lines[0]["model"] == "tone"
    assert lines[0]["usage"]["completion_tokens"] > 0
    assert lines[1]["status"] == 404


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:9", "LOCALHOST:1", "127.9.9.9"])
def test_without_keys_local_names_are_served(http: TestClient, host: str) -> None:
    assert http.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "10.0.0.1", "", "[::", "127.0.0.1.nip.io"])
def test_without_keys_other_hosts_are_refused(http: TestClient, host: str) -> None:
    response = http.get("/v1/models", headers={"host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"


def test_without_keys_other_origins_are_refused(http: TestClient) -> None:
    assert http.get("/v1/models", headers={"origin": "http://localhost:3000"}).status_code == 200
    for origin in ("https://evil.example", "null", "file://"):
        response = http.get("/v1/models", headers={"origin": origin})
        assert response.json()["error"]["code"] == "origin_not_allowed"


def test_the_key_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ring = KeyRing.load(path, must_exist=False)
    key = ring.add(label="ci", tenant="acme", scopes=["use", "upload"])
    assert key.startswith("ds-")
    assert len(key) == 46
    text = path.read_text()
    assert key not in text
    assert key[3:] not in text
    assert os.stat(path).st_mode & 0o777 == 0o600
    caller = KeyRing.load(path).authenticate(key)
    assert caller is not None
    assert (caller.tenant, caller.scopes) == ("acme", {Scope.USE, Scope.UPLOAD})
    assert not caller.may(Scope.ADMIN)
    other = KeyRing.load(path)
    other.revoke(other.records[0].id)
    assert ring.authenticate(key) is None  # a running server sees the file change
    with pytest.raises(NotFound):
        ring.revoke("none")
    with pytest.raises(InvalidRequest, match="root"):
        ring.add(scopes=["root"])
    with pytest.raises(InvalidRequest):
        ring.add(tenant="../x")


def test_two_commands_at_once_lose_no_change(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    old = KeyRing(path).add(label="old")
    one, other = KeyRing.load(path), KeyRing.load(path)
    one.revoke(one.records[0].id)
    new = other.add(label="new")
    ring = KeyRing.load(path)
    assert [record.label for record in ring.records] == ["new"], "a revoked key stays revoked"
    assert ring.authenticate(old) is None
    assert ring.authenticate(new) is not None


def test_a_broken_key_file_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ring = KeyRing.load(path, must_exist=False)
    key = ring.add()
    path.write_text('{"version": 1, "keys": [{}]}')
    assert ring.authenticate(key) is None
    with pytest.raises(ConfigError, match=r"keys\.json"):
        KeyRing.load(path)
    path.unlink()
    assert ring.authenticate(key) is None
    with pytest.raises(ConfigError, match="does not exist"):
        KeyRing.load(path)
