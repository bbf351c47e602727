"""Structured logs: one JSON object a line, with the request id, never with prompt or completion text.

Only fields passed as ``extra={"fields": {...}}`` enter a line; the message is a constant chosen by a programmer. Of an
exception a line carries the type and the frames, not the message, which may quote what a user sent.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from contextvars import ContextVar
from typing import IO, Any

request_id: ContextVar[str | None] = ContextVar("deltaserve_request_id", default=None)
"""Id of the HTTP request being handled; each log line inside it carries it."""


class JsonFormatter(logging.Formatter):
    """``time`` is UTC, ISO 8601 with milliseconds."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        current = request_id.get()
        if current is not None:
            line["request_id"] = current
        line.update(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[0] is not None:
            line["error_type"] = record.exc_info[0].__name__
            line["frames"] = [
                f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}"
                for frame in traceback.extract_tb(record.exc_info[2])
            ]
        return json.dumps(line, ensure_ascii=True, default=str)


def configure_logging(level: str = "INFO", stream: IO[str] | None = None) -> None:
    """Sends every logger's lines to ``stream`` (stderr by default) as JSON; replaces earlier handlers of the root."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
