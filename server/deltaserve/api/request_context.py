"""Around every request: an id, one log line, one count in the metrics, and an answer even to a bug."""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Any, Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltaserve import logs
from deltaserve.api.errors import ClientGone, error_response, internal_error

log = logging.getLogger("deltaserve.api")

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
CLIENT_GONE = 499
"""Status logged and counted when the client left before its answer; never sent."""


class HttpMetrics(Protocol):
    def on_http(self, route: str, status: int, outcome: str, seconds: float, is_retry: bool) -> None: ...


class RequestContext:
    """ASGI middleware. Takes the client's ``x-request-id`` when it is sane, else makes one; always sends it back."""

    def __init__(self, app: ASGIApp, *, metrics: HttpMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        token = logs.request_id.set(request_id)
        started = time.monotonic()
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            state["outcome"] = "client_gone"
        except Exception:
            log.exception("unexpected error")
            state["outcome"] = "error"
            if status is None:
                await error_response(internal_error())(scope, receive, send_with_id)
        finally:
            is_retry = headers.get("x-stainless-retry-count", "0") not in ("", "0")
            self._record(scope, status if status is not None else CLIENT_GONE, time.monotonic() - started, is_retry)
            logs.request_id.reset(token)

    def _record(self, scope: Scope, status: int, seconds: float, is_retry: bool) -> None:
        state = scope["state"]
        route = getattr(scope.get("route"), "path", "unmatched")
        outcome = state.get("outcome") or ("ok" if status < 400 else "refused" if status < 500 else "error")
        self._metrics.on_http(route, status, outcome, seconds, is_retry)
        caller = state.get("caller")
        fields = {
            "method": scope["method"] if len(scope["method"]) <= 16 else "?",
            "route": route,
            "status": status,
            "outcome": outcome,
            "seconds": round(seconds, 6),
            "key_id": getattr(caller, "key_id", None),
            **state.get("log_fields", {}),
        }
        level = logging.WARNING if status >= 500 else logging.INFO
        log.log(level, "request", extra={"fields": fields})
