"""Who may call what: API keys where the server has them, else loopback only.

Deny by default: ``Guard`` stands before routing and lets nothing through without a caller, except the paths listed in
``PUBLIC_PATHS``; each route then names the scope it needs (``requires``). Decisions read ``scope["path"]`` only.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from urllib.parse import urlsplit

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from deltaserve.api.errors import error_response
from deltaserve.api.keys import ANONYMOUS, Caller, KeyRing, Scope
from deltaserve.errors import AuthenticationFailed, DeltaserveError, PermissionDenied

PUBLIC_PATHS = frozenset({"/health", "/health/live", "/health/ready"})

__all__ = ["PUBLIC_PATHS", "Caller", "Guard", "KeyRing", "Scope", "caller_of", "requires"]


class Guard:
    """ASGI middleware: authenticates, or checks Host and Origin on a server without keys."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing | None) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["caller"] = self._admit(scope)
        except DeltaserveError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _admit(self, scope: AsgiScope) -> Caller | None:
        headers = Headers(scope=scope)
        if self._keys is None:
            check_local(headers)
            return ANONYMOUS
        caller = self._keys.authenticate(_bearer(headers))
        if caller is None and scope["path"] not in PUBLIC_PATHS:
            raise AuthenticationFailed(
                "this server needs an API key: send Authorization: Bearer KEY; `deltaserve keys add` makes one"
            )
        return caller


def _bearer(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def check_local(headers: Headers) -> None:
    """A server without keys answers only requests addressed to this machine by name, from pages of this machine.

    A web page elsewhere could otherwise reach it through the user's browser (by rebinding DNS, or by a plain form).
    """
    if not _is_local_address("//" + headers.get("host", "")):
        raise PermissionDenied(
            "this server has no API keys and answers only to localhost, 127.0.0.1 or [::1] in the Host header",
            code="host_not_allowed",
        )
    origin = headers.get("origin")
    if origin is not None and not _is_local_address(origin):
        raise PermissionDenied(
            "this server has no API keys and answers web pages of this machine only", code="origin_not_allowed"
        )


def is_local_name(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@lru_cache(maxsize=64)
def _is_local_address(url: str) -> bool:
    """Remembered: nearly every request comes with the same words, and reading an address costs more than a token."""
    try:
        host = urlsplit(url).hostname
    except ValueError:
        return False
    return is_local_name((host or "").lower())


def caller_of(request: Request) -> Caller:
    """The caller that ``Guard`` found; a public path without a key has none and must not ask."""
    caller = request.scope.get("state", {}).get("caller")
    if not isinstance(caller, Caller):
        raise AuthenticationFailed("this route needs an API key")
    return caller


class requires:  # reads as a word where routes are declared
    """Dependency: the caller's key must carry ``scope``; gives the caller."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    async def __call__(self, request: Request) -> Caller:
        """Async though it awaits nothing: FastAPI would call it in a worker thread otherwise."""
        caller = caller_of(request)
        if not caller.may(self.scope):
            raise PermissionDenied(
                f"this key lacks the scope '{self.scope}'; it has {', '.join(sorted(caller.scopes)) or 'none'}"
            )
        return caller


MAY_USE = Depends(requires(Scope.USE))
MAY_UPLOAD = Depends(requires(Scope.UPLOAD))
MAY_ADMINISTER = Depends(requires(Scope.ADMIN))
