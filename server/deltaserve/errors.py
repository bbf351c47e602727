"""Typed errors with stable codes. Each knows its HTTP status and OpenAI error type; ``api/`` only renders them.

Messages say what was found, what is allowed and what to do. They never carry a server path or prompt text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Reason:
    """One finding against an adapter: ``code`` is stable, ``where`` names the tensor, field or file."""

    code: str
    where: str
    found: str
    allowed: str


class DeltaserveError(Exception):
    """Base of every error a client may see."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
        reasons: Sequence[Any] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code or self.code
        self.retry_after_seconds = retry_after_seconds
        self.reasons = tuple(reasons)

    def body(self) -> dict[str, Any]:
        """The OpenAI error object, plus ``reasons`` where there are some."""
        error: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.error_code,
        }
        if self.reasons:
            error["reasons"] = [asdict(reason) for reason in self.reasons]
        return error


def inside(error: DeltaserveError, where: str) -> None:
    """Let an error about ``adapters`` of a part of the request name the part: ``where`` is its path."""

    def told(text: str) -> str:
        return re.sub(r"(?<![\w.'])adapters\[(?=\d+\])", f"{where}.adapters[", text)

    error.message = told(error.message)
    error.args = (error.message,)
    error.reasons = tuple(
        replace(each, where=told(each.where), found=told(each.found)) if isinstance(each, Reason) else each
        for each in error.reasons
    )


class InvalidRequest(DeltaserveError):
    """A field is malformed, out of range or unsupported; ``param`` names it."""

    status, type, code = 400, "invalid_request_error", "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    """Prompt plus requested tokens do not fit; the message carries both numbers."""

    code = "context_length_exceeded"


class CompositionRefused(InvalidRequest):
    """The adapters of a request have no exact sum; ``reasons`` lists the rules that they break."""

    code = "composition_refused"


class EnsembleRefused(InvalidRequest):
    """The members of a request cannot be decoded together: too many, or too much for slots or blocks."""

    code = "ensemble_refused"


class AuthenticationFailed(DeltaserveError):
    status, type, code = 401, "authentication_error", "invalid_api_key"


class PermissionDenied(DeltaserveError):
    status, type, code = 403, "permission_error", "insufficient_scope"


class NotFound(DeltaserveError):
    status, type, code = 404, "invalid_request_error", "not_found"


class ModelNotFound(NotFound):
    """No base, adapter, version or alias of that name (for this tenant)."""

    code = "model_not_found"


class RequestTimeout(DeltaserveError):
    """The client sent its request too slowly, or the request outlived its deadline."""

    status, type, code = 408, "invalid_request_error", "request_timeout"


class Conflict(DeltaserveError):
    """The name is taken by something else, or ``expected_version`` is not the current one."""

    status, type, code = 409, "conflict_error", "version_conflict"


class BodyTooLarge(DeltaserveError):
    status, type, code = 413, "invalid_request_error", "request_too_large"


class AdapterRefused(DeltaserveError):
    """The door said no; ``reasons`` lists everything found."""

    status, type, code = 422, "adapter_refused", "adapter_refused"


class QueueFull(DeltaserveError):
    status, type, code = 429, "rate_limit_error", "queue_full"


class EngineFailed(DeltaserveError):
    """The step loop died; every open request gets this, and readiness turns red."""

    status, type, code = 500, "server_error", "engine_failed"


class Unavailable(DeltaserveError):
    """Not ready yet, or draining."""

    status, type, code = 503, "overloaded_error", "unavailable"


class AdapterUnavailable(DeltaserveError):
    """The adapter is in the store but cannot be served now (failed to load, or belongs to another base)."""

    status, type, code = 503, "server_error", "adapter_unavailable"


class StorageFull(DeltaserveError):
    status, type, code = 507, "server_error", "insufficient_storage"


class UnsupportedBase(DeltaserveError):
    """The base model cannot be served: the message names the component and what is supported. Raised at start."""

    code = "unsupported_base"


class ConfigError(DeltaserveError):
    """A setting is wrong or two settings contradict each other. Raised at start."""

    code = "invalid_config"


_BY_STATUS: dict[int, type[DeltaserveError]] = {
    400: InvalidRequest,
    401: AuthenticationFailed,
    403: PermissionDenied,
    404: NotFound,
    408: RequestTimeout,
    409: Conflict,
    413: BodyTooLarge,
    422: AdapterRefused,
    429: QueueFull,
    503: Unavailable,
    507: StorageFull,
}


def error_class(status: int) -> type[DeltaserveError]:
    """The error class for an HTTP status: how errors of the store and of a remote server become ours."""
    return _BY_STATUS.get(status, DeltaserveError)
