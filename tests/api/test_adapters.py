"""``/v1/adapters``: uploads streamed into staging, listings, versions, names."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from deltaserve.api import upload_form, uploads
from deltaserve.api.app import create_app
from deltaserve.config import ServeConfig
from deltaserve.core import AdapterState
from deltaserve.errors import QueueFull, StorageFull
from deltaserve.metrics import Metrics
from deltatest.fake_engine import CODE_V1, TONE_V1, TONE_V2, FakeAdmission, FakeEngine, FakeStore
from deltatest.live_server import LiveServer

CONFIG = ("files", ("adapter_config.json", b"{}"))
WEIGHTS = ("files", ("adapter_model.safetensors", b"weights"))


@pytest.fixture(autouse=True)
def nothing_is_left_in_staging(tmp_path: Path, app: FastAPI) -> Any:
    yield
    assert list((tmp_path / "scratch").iterdir()) == []


def upload(http: TestClient, name: str = "new", files: Any = (CONFIG, WEIGHTS), **fields: str) -> Any:
    return http.post("/v1/adapters", data={"name": name, **fields}, files=list(files))


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name.replace("__", "."), data)
    return buffer.getvalue()


def tarred(mode: str, **files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def error_of(response: Any, status: int) -> Any:
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_files_become_an_adapter(http: TestClient, admission: FakeAdmission, engine: FakeEngine) -> None:
    response = upload(http)
    assert response.status_code == 201, response.text
    body = response.json()
    assert body["version"] == hashlib.sha256(b"weights").hexdigest()
    assert {"id", "version", "kinds", "rank", "bytes", "state", "effect", "base", "waivers", "warnings"} <= set(body)
    assert (body["id"], body["kinds"], body["rank"], body["base"]) == ("new", ["lora"], 8, "tiny")
    assert admission.admitted == [{"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}]
    answer = http.post("/v1/completions", json={"model": "new", "prompt": "user"})
    assert answer.headers["x-adapter-version"] == body["version"]
    assert upload(http).status_code == 200  # the same bytes again


@pytest.mark.parametrize(
    "archive",
    [
        zipped(adapter_config__json=b"{}", adapter_model__safetensors=b"weights"),
        tarred("w", adapter_config__json=b"{}", adapter_model__safetensors=b"weights"),
        tarred("w:gz", adapter_config__json=b"{}", adapter_model__safetensors=b"weights"),
    ],
    ids=["zip", "tar", "tar.gz"],
)
def test_an_archive_becomes_an_adapter(http: TestClient, admission: FakeAdmission, archive: bytes) -> None:
    response = upload(http, files=[("archive", ("a.bin", archive))])
    assert response.status_code == 201, response.text
    assert admission.admitted == [{"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}]


def test_a_refusal_carries_every_reason(http: TestClient, metrics: Metrics) -> None:
    error = error_of(upload(http, files=[CONFIG, ("files", ("adapter_model.safetensors", b"bad"))]), 422)
    assert error["type"] == "adapter_refused"
    assert [reason["where"] for reason in error["reasons"]] == ["layer.0", "layer.1"]
    assert set(error["reasons"][0]) == {"code", "where", "found", "allowed"}
    text = metrics.render().decode()
    assert 'deltaserve_upload_rejects_total{reason="missing_tensor"} 1.0' in text
    assert 'deltaserve_adapter_uploads_total{outcome="refused"} 1.0' in text


def test_expected_version_and_waivers_reach_the_door(http: TestClient) -> None:
    assert error_of(upload(http, "tone", expected_version=TONE_V1), 409)["param"] == "expected_version"
    assert upload(http, "tone", expected_version=TONE_V2, accept_base="true").json()["waivers"] == ["base"]


@pytest.mark.parametrize(
    ("data", "files", "param"),
    [
        ({}, [CONFIG], "name"),
        ({"name": ""}, [CONFIG], "name"),
        ({"name": "../x"}, [CONFIG], "name"),
        ({"name": "a\nb"}, [CONFIG], "name"),
        ({"name": "x" * 65}, [CONFIG], "name"),
        ({"name": "n" * 5000}, [CONFIG], "name"),
        ({"name": ["a", "b"]}, [CONFIG], "name"),
        ({"name": "a", "expected_version": "12"}, [CONFIG], "expected_version"),
        ({"name": "a", "accept_base": "yes"}, [CONFIG], "accept_base"),
        ({"name": "a", "path": "/etc"}, [CONFIG], "path"),
        ({"name": "a"}, [("weights", ("adapter_model.safetensors", b""))], "weights"),
        ({"name": "a"}, [CONFIG, ("archive", ("a.zip", b""))], "archive"),
        ({"name": "a"}, [("archive", ("a.zip", b"")), CONFIG], "files"),
        ({"name": "a"}, [("archive", ("a.zip", b"")), ("archive", ("a.zip", b""))], "archive"),
        ({"name": "a"}, [("files", (None, b"x"))], "files"),
    ],
    ids=lambda value: ascii(value)[:50],
)
def test_wrong_forms_are_named(
    http: TestClient, admission: FakeAdmission, data: dict[str, Any], files: Any, param: str
) -> None:
    response = http.post("/v1/adapters", data=data, files=files)
    assert response.status_code in (400, 422), response.text
    error = response.json()["error"]
    assert error["param"] == param or param in error["message"]
    assert not admission.admitted


def test_parts_are_bounded(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_form, "MAX_PARTS", 2)
    assert error_of(upload(http), 400)["param"] == "files"


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/passwd", "a/b.json", "training_args.bin", "x.py", "adapter_model.bin", "A\x00B"]
)
def test_hostile_file_names_are_refused(http: TestClient, name: str, tmp_path: Path, admission: FakeAdmission) -> None:
    before = sorted(tmp_path.rglob("*"))
    body = (
        b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\na\r\n'
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="'
        + name.encode()
        + b'"\r\n\r\ndata\r\n--x--\r\n'
    )
    response = http.post("/v1/adapters", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    if response.status_code == 201:  # a name that is taken along but dropped unread
        assert admission.admitted == [{}]
    else:
        assert response.status_code in (400, 422), response.text
    assert sorted(tmp_path.rglob("*")) == before


FORM = b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\na\r\n'
FILE = b'--x\r\nContent-Disposition: form-data; name="files"; filename="adapter_config.json"\r\n\r\n{}\r\n'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nothing",
        FORM,
        FORM + FILE,
        FORM + FILE[:-4],
        FORM + b"--x\r\nContent-Disposition: form-data\r\n\r\n\r\n--x--\r\n",
        FORM + b"--x\r\nX: " + b"a" * 10_000 + b"\r\n\r\n\r\n--x--\r\n",
        FORM + b"--x\r\n" + b"A: b\r\n" * 5000 + b"\r\n\r\n--x--\r\n",
        FORM + b"--x\r\nbroken header\r\n\r\n\r\n--x--\r\n",
        b"--x--\r\n",
        b"--x\r\n\r\n\r\n--x--\r\n",
    ],
    ids=lambda value: ascii(value[-40:]),
)
def test_broken_forms(http: TestClient, admission: FakeAdmission, body: bytes) -> None:
    response = http.post("/v1/adapters", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert response.status_code == 400, response.text
    assert not admission.admitted


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data", "multipart/mixed; boundary=x", ""])
def test_only_multipart_is_taken(http: TestClient, content_type: str) -> None:
    response = http.post("/v1/adapters", content=b"x", headers={"content-type": content_type})
    assert error_of(response, 415)["code"] == "unsupported_media_type"


def test_too_large(engine: FakeEngine, tmp_path: Path) -> None:
    config = ServeConfig(store=tmp_path / "store", port=0, max_upload_bytes=10_000)
    admission = FakeAdmission(engine)
    store = FakeStore(tmp_path / "scratch")
    app = create_app(engine, admission, store, engine.tokenizer, Metrics(), config)
    http = TestClient(app, base_url="http://127.0.0.1")
    error = error_of(upload(http, files=[("files", ("adapter_model.safetensors", b"x" * 20_000))]), 413)
    assert "10000" in error["message"]
    assert not admission.admitted


def test_a_full_disk_is_507(http: TestClient, admission: FakeAdmission, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*args: Any, **kwargs: Any) -> Any:
        raise StorageFull("the disk is full")

    monkeypatch.setattr(admission, "admit", full)
    response = upload(http)
    assert error_of(response, 507)["code"] == "insufficient_storage"
    assert response.headers["x-should-retry"] == "false"


def test_uploads_at_once_are_bounded(http: TestClient, app: FastAPI) -> None:
    app.state.uploads = uploads.Uploads(0)
    response = upload(http)
    assert error_of(response, 429)["code"] == QueueFull.code
    assert response.headers["retry-after"] == "5"
    app.state.uploads = uploads.Uploads(1)
    for _ in range(3):  # each gives its place back, whatever its end
        assert upload(http).status_code in (200, 201)
        assert upload(http, files=[("files", ("adapter_model.safetensors", b"bad"))]).status_code == 422
        assert upload(http, "../x").status_code == 400


def test_a_long_proof_is_answered_later(
    live: LiveServer, admission: FakeAdmission, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx

    monkeypatch.setattr(admission, "seconds", 0.3)
    with httpx.Client(base_url=live.url) as http:
        files = [CONFIG, WEIGHTS]
        taken = http.post("/v1/adapters", data={"name": "slow"}, files=files, headers={"prefer": "respond-async"})
        assert taken.status_code == 202
        assert taken.json()["state"] == "checking"
        address = taken.json()["status_url"]
        assert taken.headers["location"] == address
        assert http.get(address).status_code == 202
        done = wait_for_verdict(http, address)
        assert (done.status_code, done.json()["id"]) == (201, "slow")
        assert http.get("/v1/adapters/slow").json()["version"] == done.json()["version"]
        bad = [CONFIG, ("files", ("adapter_model.safetensors", b"bad"))]
        taken = http.post("/v1/adapters", data={"name": "b"}, files=bad, headers={"prefer": "respond-async"})
        refused = wait_for_verdict(http, taken.json()["status_url"])
        assert len(error_of(refused, 422)["reasons"]) == 2
        assert http.get("/v1/uploads/upload-none").status_code == 404
    assert b'uploads_total{outcome="created"} 1.0' in metrics.render()


def wait_for_verdict(http: Any, address: str) -> Any:
    import time

    deadline = time.monotonic() + 5
    while (response := http.get(address)).status_code == 202:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return response


def test_a_client_that_leaves_in_mid_upload_leaves_nothing(live: LiveServer, tmp_path: Path, metrics: Metrics) -> None:
    import time

    head = b"POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    with live.connect() as connection:
        connection.sendall(head + b"Content-Length: 1000000\r\n\r\n" + FORM + FILE[:-4] + b"x" * 50_000)
        time.sleep(0.1)
    deadline = time.monotonic() + 2
    while list((tmp_path / "scratch").iterdir()) or b'outcome="failed"' not in metrics.render():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_command_line_s_client_understands_the_routes(live: LiveServer, tmp_path: Path, engine: FakeEngine) -> None:
    from deltaserve.errors import AdapterRefused, ModelNotFound, NotFound
    from deltaserve.remote import RemoteServer

    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(b"{}")
    (folder / "adapter_model.safetensors").write_bytes(b"w" * 300_000)
    server = RemoteServer(live.url)
    made = server.upload(folder, "mine")
    assert made["created"]
    assert made["state"] == "stored"
    assert not server.upload(folder, "mine")["created"]
    assert server.show("mine")["version"] == made["version"]
    assert [entry["id"] for entry in server.list(limit=1)] == ["code", "mine", "tone"]
    assert len(server.versions("tone")) == 2
    assert server.rollback("tone")["version"] == TONE_V1
    assert server.alias("canary", "mine")["version"] == made["version"]
    assert server.delete("mine")["deleted"]
    with pytest.raises((NotFound, ModelNotFound)):
        server.show("mine")
    (folder / "adapter_model.safetensors").write_bytes(b"bad" * 1000)
    with pytest.raises(AdapterRefused) as caught:
        server.upload(folder, "mine")
    assert len(caught.value.reasons) == 2


def test_slow_archives_do_not_hold_up_long_prompts(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch, admission: FakeAdmission
) -> None:
    import threading
    import time

    import httpx

    from deltaserve_store.staging import StagedUpload

    go_on = threading.Event()
    monkeypatch.setattr(StagedUpload, "unpack", lambda self: go_on.wait(20))
    files = [("archive", ("a.zip", b"PK"))]
    statuses: list[int] = []

    def send(number: int) -> None:
        answer = httpx.post(f"{live.url}/v1/adapters", data={"name": f"a{number}"}, files=files, timeout=30)
        statuses.append(answer.status_code)

    senders = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for sender in senders:
        sender.start()
    try:
        time.sleep(0.5)
        prompt = {"model": "tiny", "prompt": "user " * 1500, "max_tokens": 1}
        answer = httpx.post(f"{live.url}/v1/completions", json=prompt, timeout=10)
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    finally:
        go_on.set()
        for sender in senders:
            sender.join()
    assert len(statuses) == 8
    assert max(statuses) < 500


def test_listing_is_paged(http: TestClient) -> None:
    first = http.get("/v1/adapters?limit=1").json()
    assert [entry["id"] for entry in first["data"]] == ["code"]
    assert (first["has_more"], first["last_id"]) == (True, "code")
    second = http.get("/v1/adapters?limit=1&after=code").json()
    assert [entry["id"] for entry in second["data"]] == ["tone"]
    assert not second["has_more"]
    assert http.get("/v1/adapters?after=zzz").json()["data"] == []
    for query in (
        "limit=0",
        "limit=1001",
        "limit=-1",
        "limit=x",
        "limit=1e3",
        "limit=",
        "after=../x",
        "limit=" + "9" * 50,
        "limit=000100000",
        "limit=000100" + "0" * 5000,
    ):
        assert http.get(f"/v1/adapters?{query}").status_code == 400, query


def test_show_and_versions(http: TestClient) -> None:
    shown = http.get("/v1/adapters/tone").json()
    assert (shown["version"], shown["state"], shown["effect"]) == (TONE_V2, "ready", 1.5)
    assert http.get("/v1/adapters/prod").json()["id"] == "tone"
    assert http.get(f"/v1/adapters/tone@{TONE_V1[:8]}").json()["version"] == TONE_V1
    versions = http.get("/v1/adapters/tone/versions").json()["data"]
    assert [(entry["version"], entry["is_current"]) for entry in versions] == [(TONE_V2, True), (TONE_V1, False)]
    assert error_of(http.get("/v1/adapters/nothing"), 404)["code"] == "model_not_found"
    assert error_of(http.get("/v1/adapters/tiny"), 404)
    assert error_of(http.get("/v1/adapters/nothing/versions"), 404)


def test_adapters_of_another_base_are_no_models(http: TestClient, engine: FakeEngine) -> None:
    engine.tone_state = AdapterState.INCOMPATIBLE
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["tiny", "code"]
    assert http.get("/v1/adapters/tone").json()["state"] == "incompatible"


def test_rollback(http: TestClient) -> None:
    assert http.post("/v1/adapters/tone/rollback").json()["version"] == TONE_V1
    answer = http.post("/v1/completions", json={"model": "tone", "prompt": "user"})
    assert answer.headers["x-adapter-version"] == TONE_V1
    assert http.post("/v1/adapters/tone/rollback", json={"version": TONE_V2[:10]}).json()["version"] == TONE_V2
    assert error_of(http.post("/v1/adapters/tone/rollback", json={"version": "xyz"}), 400)["param"] == "version"
    assert error_of(http.post("/v1/adapters/tone/rollback", json={"to": "x"}), 400)["param"] == "to"
    assert error_of(http.post("/v1/adapters/nothing/rollback"), 404)


def test_aliases(http: TestClient) -> None:
    assert http.put("/v1/aliases/prod", json={"target": "code"}).json()["version"] == CODE_V1
    pinned = http.put("/v1/aliases/old", json={"target": f"tone@{TONE_V1}"}).json()
    assert (pinned["target"], pinned["pinned"]) == ("tone", TONE_V1)
    assert [alias["id"] for alias in http.get("/v1/aliases").json()["data"]] == ["old", "prod"]
    assert error_of(http.put("/v1/aliases/x", json={"target": "nothing"}), 404)
    assert error_of(http.put("/v1/aliases/x", json={}), 400)["param"] == "target"
    assert error_of(http.put("/v1/aliases/..", json={"target": "tone"}), 404)
    assert error_of(http.put("/v1/aliases/a%20b", json={"target": "tone"}), 400)["param"] == "alias"


def test_delete(http: TestClient) -> None:
    assert http.delete("/v1/adapters/tone").json() == {"id": "tone", "object": "adapter", "deleted": True}
    assert error_of(http.delete("/v1/adapters/tone"), 404)
    body = {"model": "tone", "prompt": "user"}
    assert error_of(http.post("/v1/completions", json=body), 404)["code"] == "model_not_found"
