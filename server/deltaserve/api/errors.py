"""Every error a client can see, in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from deltaserve.errors import AdapterUnavailable, DeltaserveError, InvalidRequest
from deltaserve_store.errors import StoreError

log = logging.getLogger("deltaserve.api")

ClientError = DeltaserveError | StoreError
"""What has a status, a body and perhaps a time to wait."""

_RETRY_AFTER_SECONDS = {429: 1.0, 503: 2.0}
_DETERMINISTIC = frozenset({409, 500, 507})
"""Statuses that the OpenAI client would retry although the same request must fail the same way again."""


class MethodNotAllowed(DeltaserveError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class UnsupportedMediaType(DeltaserveError):
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class ClientGone(Exception):
    """The client closed its connection before it had its answer; nobody hears of this but the log and the metrics."""


def error_headers(error: ClientError) -> dict[str, str]:
    headers: dict[str, str] = {}
    seconds = error.retry_after_seconds
    is_final = error.status in _DETERMINISTIC or (isinstance(error, AdapterUnavailable) and seconds is None)
    if is_final:
        headers["x-should-retry"] = "false"
    elif error.status in _RETRY_AFTER_SECONDS:
        headers["retry-after"] = str(max(1, round(seconds or _RETRY_AFTER_SECONDS[error.status])))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def error_response(error: ClientError) -> JSONResponse:
    return JSONResponse({"error": error.body()}, status_code=error.status, headers=error_headers(error))


def internal_error() -> DeltaserveError:
    """What a client hears of a bug: no path, no stack; the log has them under the request id."""
    return DeltaserveError("the server met an internal error; the log has details under this x-request-id")


def invalid_field(error: ValidationError) -> InvalidRequest:
    """The first problem of a schema as an error naming its parameter. Never quotes the value."""
    first = error.errors(include_url=False, include_input=False)[0]
    param = field_path(first)
    kind = first["type"]
    if kind == "extra_forbidden":
        return InvalidRequest(
            f"{param} is not a parameter of this server; docs/api.md lists them", param=param, code="unknown_parameter"
        )
    if kind == "missing":
        return InvalidRequest(f"{param} is required", param=param, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    if kind == "model_type":  # would name a class of ours
        message = "Input should be an object"
    elif kind in ("too_short", "too_long"):
        message = _told_length(first)
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return InvalidRequest(f"{param}: {message}" if param else message, param=param, code=code)


def _told_length(details: ErrorDetails) -> str:
    """Of a list or an object; the library's words speak of a validation, which is none of the client's."""
    context = details["ctx"]
    found = context["actual_length"]  # None: not counted to the end
    bound = f"at most {context['max_length']}" if details["type"] == "too_long" else f"at least {context['min_length']}"
    entries = "entry is" if bound.endswith(" 1") else "entries are"
    wanted = "needed" if details["type"] == "too_short" else "allowed"
    return f"{bound} {entries} {wanted}" + ("" if found is None else f", found {found}")


def field_path(details: ErrorDetails) -> str | None:
    """``("messages", 0, "content")`` -> ``messages[0].content``; tags of unions are left out."""
    path = ""
    for part in details["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() or not path:
            path += f".{part}" if path else part[:100]
    return path.encode("ascii", "backslashreplace").decode() or None


def install_error_handlers(app: FastAPI) -> None:
    """Renders typed errors, the framework's own errors and bugs alike."""

    async def typed(_: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, DeltaserveError | StoreError):
            raise error
        return error_response(error)

    async def framework(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, HTTPException):
            raise error
        response = error_response(_from_http(request, error))
        if "Allow" in (error.headers or {}):
            response.headers["allow"] = (error.headers or {})["Allow"]
        return response

    async def schema(_: Request, error: Exception) -> JSONResponse:
        if isinstance(error, ValidationError):
            return error_response(invalid_field(error))
        return error_response(InvalidRequest("the request is malformed"))

    app.add_exception_handler(DeltaserveError, typed)
    app.add_exception_handler(StoreError, typed)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(ValidationError, schema)
    app.add_exception_handler(RequestValidationError, schema)


def _from_http(request: Request, error: HTTPException) -> DeltaserveError:
    if error.status_code == 404:
        from deltaserve.errors import NotFound

        return NotFound("there is no such route; docs/api.md lists them", code="unknown_route")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return MethodNotAllowed(f"{request.method} is not possible here; use {allowed}")
    return InvalidRequest("the request is malformed")
