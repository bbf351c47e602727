"""Typed errors of the store. Each carries what an HTTP layer needs (status, type, code, reasons) and knows no HTTP.

Messages say what was found, what is allowed and what to do, and never carry a path of this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

MAX_TEXT = 240
"""Longest ``found`` text kept, in characters: reasons quote uploaded bytes."""


@dataclass(frozen=True, slots=True)
class Reason:
    """One finding against an adapter: ``code`` is stable, ``where`` names the tensor, field or file."""

    code: str
    where: str
    found: str
    allowed: str


def quote(value: object) -> str:
    """An uploaded value as printable ASCII text of at most ``MAX_TEXT`` characters."""
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("ascii", "backslashreplace").decode("ascii")
    text = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."


class StoreError(Exception):
    """Base of every error of the store."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "store_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
        reasons: Sequence[Reason] = (),
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


class AdapterInvalid(StoreError):
    """The adapter is refused; ``reasons`` lists everything found, not only the first thing."""

    status, type, code = 422, "adapter_refused", "adapter_refused"

    def __init__(self, reasons: Sequence[Reason], message: str | None = None) -> None:
        reasons = tuple(reasons)
        if message is None:
            first = f"{reasons[0].code} at {reasons[0].where}: found {reasons[0].found}, allowed {reasons[0].allowed}"
            more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            message = f"adapter refused: {first}{more}"
        super().__init__(message, reasons=reasons)


class BaseMismatch(AdapterInvalid):
    """The adapter was made for another base model."""

    code = "base_mismatch"


class UploadTooLarge(StoreError):
    """A file or the whole upload exceeds its cap; the message carries the cap in bytes."""

    status, type, code = 413, "invalid_request_error", "request_too_large"


class InvalidName(StoreError):
    """A name, version or page bound is malformed."""

    status, type, code = 400, "invalid_request_error", "invalid_value"


class NotFound(StoreError):
    """No such name, version or alias for this tenant."""

    status, type, code = 404, "invalid_request_error", "model_not_found"


class NameTaken(StoreError):
    """The name belongs to something else: an alias, an adapter or the base."""

    status, type, code = 409, "conflict_error", "name_taken"


class VersionConflict(StoreError):
    """``expected_version`` is not the current version of the name."""

    status, type, code = 409, "conflict_error", "version_conflict"


class StoreFull(StoreError):
    """The quota or the disk is full. Nothing was changed."""

    status, type, code = 507, "server_error", "insufficient_storage"


class StoreLocked(StoreError):
    """Another process serves this store; ``url`` says where it listens, if it has told yet."""

    status, type, code = 503, "server_error", "store_locked"

    def __init__(self, message: str, *, url: str | None = None, pid: int | None = None) -> None:
        super().__init__(message)
        self.url = url
        self.pid = pid


class StoreReadOnly(StoreError):
    """The store was opened without its lock, for reading only."""

    code = "store_read_only"


class StoreCorrupt(StoreError):
    """The database of the store cannot be read, or was written by a newer program."""

    code = "store_corrupt"
