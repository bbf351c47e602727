"""The client of the adapter routes, against a raw HTTP server that records what it got and answers as told."""

from __future__ import annotations

import email
import email.policy
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from deltaserve.errors import (
    AdapterRefused,
    AuthenticationFailed,
    BodyTooLarge,
    Conflict,
    DeltaserveError,
    InvalidRequest,
    QueueFull,
    Reason,
    StorageFull,
    Unavailable,
)
from deltaserve.remote import RemoteServer, upload_files


@dataclass
class Recorder:
    """``answers``: (status, body) by order of call; the last one repeats."""

    answers: list[tuple[int, Any]] = field(default_factory=lambda: [(200, {})])
    calls: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    reads_body: bool = True
    url: str = ""


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if recorder.reads_body else b""
            recorder.calls.append((self.command, self.path, dict(self.headers.items()), body))
            status, answer = recorder.answers[0] if len(recorder.answers) == 1 else recorder.answers.pop(0)
            raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)
            self.close_connection = True

        do_GET = do_POST = do_PUT = do_DELETE = handle_any

        def log_message(self, format: str, *args: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    recorder.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield recorder
    server.shutdown()
    server.server_close()
    thread.join()


def parts_of(headers: dict[str, str], body: bytes) -> list[tuple[str, str | None, bytes]]:
    """(field, file name, content) of a multipart body, read by the standard library's own parser."""
    head = f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode()
    message = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    found = []
    for part in message.iter_parts():  # type: ignore[attr-defined]
        content = part.get_payload(decode=True)
        found.append((part.get_param("name", header="content-disposition"), part.get_filename(), content))
    return found


def test_upload_of_a_folder(recorder: Recorder, tmp_path: Path) -> None:
    big = bytes(range(256)) * 8192  # more than one chunk
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(big)
    (tmp_path / ".hidden").write_text("stays")
    recorder.answers = [(201, {"id": "a", "version": "f" * 64})]
    answer = RemoteServer(recorder.url, api_key="key-1").upload(
        tmp_path, "a", expected_version="e" * 64, accept_base=True, accept_no_effect=True
    )
    assert answer == {"id": "a", "version": "f" * 64, "created": True}
    method, path, headers, body = recorder.calls[0]
    assert (method, path, headers["Authorization"]) == ("POST", "/v1/adapters", "Bearer key-1")
    assert parts_of(headers, body) == [
        ("name", None, b"a"),
        ("expected_version", None, b"e" * 64),
        ("accept_base", None, b"true"),
        ("accept_no_effect", None, b"true"),
        ("files", "adapter_config.json", b"{}"),
        ("files", "adapter_model.safetensors", big),
    ]


def test_upload_of_an_archive_and_of_known_bytes(recorder: Recorder, tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"archive")
    recorder.answers = [(200, {"id": "a"})]
    answer = RemoteServer(recorder.url).upload(tmp_path / "a.tar.gz", "a")
    assert answer["created"] is False
    _, _, headers, body = recorder.calls[0]
    assert parts_of(headers, body)[1] == ("archive", "a.tar.gz", b"archive")
    assert "Authorization" not in headers


def test_an_upload_whose_proof_takes_long_is_waited_for(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaserve.remote.POLL_SECONDS", 0.01)
    (tmp_path / "a.zip").write_bytes(b"archive")
    checking = {"id": "upload-1", "state": "checking", "status_url": "/v1/uploads/upload-1"}
    recorder.answers = [(202, checking), (202, checking), (201, {"id": "a", "version": "f" * 64})]
    answer = RemoteServer(recorder.url, api_key="key-1").upload(tmp_path / "a.zip", "a")
    assert answer == {"id": "a", "version": "f" * 64, "created": True}
    assert [call[:2] for call in recorder.calls[1:]] == [("GET", "/v1/uploads/upload-1")] * 2
    assert recorder.calls[2][2]["Authorization"] == "Bearer key-1"
    refusal = {"error": {"message": "no", "code": "adapter_refused", "reasons": [{"code": "no_effect"}]}}
    recorder.answers = [(202, checking), (422, refusal)]
    with pytest.raises(AdapterRefused):
        RemoteServer(recorder.url).upload(tmp_path / "a.zip", "a")


def test_routes(recorder: Recorder) -> None:
    server = RemoteServer(recorder.url + "/")
    recorder.answers = [
        (200, {"data": [{"id": "a"}, {"id": "b"}], "has_more": True}),
        (200, {"data": [{"id": "c"}], "has_more": False}),
        (200, {"id": "a"}),
        (200, {"data": [{"version": "1"}]}),
        (200, {"deleted": True}),
        (200, {"id": "a"}),
        (200, {}),
    ]
    assert [row["id"] for row in server.list(limit=2)] == ["a", "b", "c"]
    assert server.show("a/../b")["id"] == "a"
    assert server.versions("a") == [{"version": "1"}]
    assert server.delete("a")["deleted"] is True
    server.rollback("a", "abcdef12")
    server.alias("chat", "a@abcdef12")
    assert [(method, path) for method, path, _, _ in recorder.calls] == [
        ("GET", "/v1/adapters?limit=2"),
        ("GET", "/v1/adapters?limit=2&after=b"),
        ("GET", "/v1/adapters/a%2F..%2Fb"),
        ("GET", "/v1/adapters/a/versions"),
        ("DELETE", "/v1/adapters/a"),
        ("POST", "/v1/adapters/a/rollback"),
        ("PUT", "/v1/aliases/chat"),
    ]
    assert [json.loads(body) for _, _, _, body in recorder.calls[-2:]] == [
        {"version": "abcdef12"},
        {"target": "a@abcdef12"},
    ]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, InvalidRequest),
        (401, AuthenticationFailed),
        (409, Conflict),
        (413, BodyTooLarge),
        (422, AdapterRefused),
        (429, QueueFull),
        (500, DeltaserveError),
        (503, Unavailable),
        (507, StorageFull),
    ],
)
def test_errors_come_back_typed(recorder: Recorder, status: int, expected: type[DeltaserveError]) -> None:
    reasons = [{"code": "non_finite", "where": "x", "found": "NaN", "allowed": "finite"}]
    recorder.answers = [(status, {"error": {"message": "told so", "code": "c", "param": "p", "reasons": reasons}})]
    with pytest.raises(DeltaserveError) as caught:
        RemoteServer(recorder.url).show("a")
    error = caught.value
    assert type(error) is expected
    assert (error.message, error.error_code, error.param) == ("told so", "c", "p")
    assert error.reasons == (Reason("non_finite", "x", "NaN", "finite"),)


def test_an_answer_before_the_body_was_sent_is_heard(recorder: Recorder, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(30_000_000))
    recorder.reads_body = False
    recorder.answers = [(413, {"error": {"message": "too large", "code": "request_too_large"}})]
    # The server closes while the client still sends: the answer is heard, or a lost connection is told as such.
    with pytest.raises((BodyTooLarge, Unavailable)):
        RemoteServer(recorder.url).upload(tmp_path, "a")


@pytest.mark.parametrize("raw", [b"<html>", b"[1]", b'{"error": 3}'])
def test_foreign_answers_are_errors(recorder: Recorder, raw: bytes) -> None:
    recorder.answers = [(502, raw)]
    with pytest.raises(DeltaserveError, match="502"):
        RemoteServer(recorder.url).show("a")


def test_nobody_listens() -> None:
    with pytest.raises(Unavailable, match="is it running"):
        RemoteServer("http://127.0.0.1:9", timeout_seconds=5).show("a")


@pytest.mark.parametrize(
    "url", ["127.0.0.1:80", "ftp://x", "http://", "http://h/?q=1", "http://h:abc", "http://h:99999", "http://[::1"]
)
def test_bad_addresses_are_refused(url: str) -> None:
    with pytest.raises(InvalidRequest):
        RemoteServer(url)


def test_what_cannot_be_an_upload_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no files"):
        upload_files(tmp_path)
    with pytest.raises(InvalidRequest, match="neither"):
        upload_files(tmp_path / "missing.bin")
    with pytest.raises(InvalidRequest, match="API key"):
        RemoteServer("http://localhost", api_key="a\nb")
