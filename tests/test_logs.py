"""Log lines: JSON, with the request id, without what a user sent."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from deltaserve import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    written = io.StringIO()
    logs.configure_logging("INFO", written)
    yield written
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line(stream: io.StringIO) -> None:
    token = logs.request_id.set("req-1")
    try:
        logging.getLogger("deltaserve.x").info("request", extra={"fields": {"status": 200, "model": "a\nb"}})
    finally:
        logs.request_id.reset(token)
    logging.getLogger("deltaserve.x").debug("unseen")
    logging.getLogger("uvicorn.error").warning("from the server")
    first, second = lines(stream)
    assert first["request_id"] == "req-1"
    assert first["status"] == 200
    assert first["model"] == "a\nb"
    assert (first["level"], first["logger"], first["message"]) == ("info", "deltaserve.x", "request")
    assert str(first["time"]).endswith("Z")
    assert "request_id" not in second


def test_an_exception_shows_frames_and_no_message(stream: io.StringIO) -> None:
    def fail() -> None:
        raise ValueError("secret prompt")

    try:
        fail()
    except ValueError:
        logging.getLogger("deltaserve.x").exception("unexpected error")
    (line,) = lines(stream)
    assert line["error_type"] == "ValueError"
    assert "secret" not in stream.getvalue()
    assert any("fail" in str(frame) for frame in line["frames"])  # type: ignore[attr-defined]
