"""Reading a request body within bounds, and JSON from it strictly."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect, Request

from deltaserve.api.errors import ClientGone, UnsupportedMediaType
from deltaserve.errors import BodyTooLarge, InvalidRequest

MAX_DEPTH = 32
"""Nesting of objects and arrays."""
_DRAIN_FACTOR = 4
_DRAIN_SECONDS = 1.0
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
# Possessive, and an unterminated string runs to the end: linear in the body whatever it holds.
_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[{\]}]', re.DOTALL)


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The request's JSON object. Raises InvalidRequest, BodyTooLarge, UnsupportedMediaType, ClientGone."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType("send the body as Content-Type: application/json")
    body = await read_body(request, max_bytes)
    data = parse_json(body)
    if not isinstance(data, dict):
        raise InvalidRequest("the body must be a JSON object", code="invalid_type")
    return data


async def read_body(request: Request, max_bytes: int) -> bytes:
    """At most ``max_bytes``; more is drained for a moment, so that the client reads the answer and not a reset."""
    chunks: list[bytes] = []
    size = 0
    stream = receive_chunks(request)
    async for chunk in stream:
        size += len(chunk)
        if size > max_bytes:
            await drain(stream, _DRAIN_FACTOR * max_bytes)
            raise BodyTooLarge(f"the body has more than {max_bytes} bytes, which is the most this server reads")
        chunks.append(chunk)
    return b"".join(chunks)


async def receive_chunks(request: Request) -> AsyncIterator[bytes]:
    """Non-empty pieces of the body as they arrive. Raises ClientGone."""
    try:
        async for chunk in request.stream():
            if chunk:
                yield chunk
    except ClientDisconnect as error:
        raise ClientGone from error


async def drain(stream: AsyncIterator[bytes], max_bytes: int) -> None:
    """Reads and forgets what is still coming, for at most a second."""
    left = max_bytes

    async def forget() -> None:
        nonlocal left
        async for chunk in stream:
            left -= len(chunk)
            if left < 0:
                return

    try:
        await asyncio.wait_for(forget(), _DRAIN_SECONDS)
    except (TimeoutError, ClientGone):
        return


def parse_json(body: bytes) -> Any:
    """RFC 8259 to the letter: UTF-8 without a byte order mark, no NaN or Infinity, no lone surrogate, unique keys."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8 (at byte {error.start})", code="invalid_json") from error
    if _depth_exceeds(body, MAX_DEPTH):
        raise InvalidRequest(f"the body nests deeper than {MAX_DEPTH} levels", code="invalid_json")
    try:
        data = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}", code="invalid_json"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("the body holds a number that is too long", code="invalid_json") from error
    if _SURROGATE_ESCAPE.search(body) and _has_lone_surrogate(data):
        raise InvalidRequest("a string holds half of a surrogate pair, which is not text", code="invalid_json")
    return data


def _depth_exceeds(body: bytes, limit: int) -> bool:
    """Brackets inside strings are not counted; malformed text may give any answer, the parser sees it next."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return False
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(body):
        token = match[0]
        if token in b"[{":
            depth += 1
            if depth > limit:
                return True
        elif token in b"]}":
            depth -= 1
    return False


def _refuse_constant(name: str) -> float:
    raise InvalidRequest(f"the body holds {name}, which JSON does not know", code="invalid_json")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidRequest("the body holds a number beyond the range of a double", code="invalid_json")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        shown = twice[:100].encode("ascii", "backslashreplace").decode()
        raise InvalidRequest(f"the key {shown} appears twice in one object", param=shown, code="invalid_json")
    return result


def _has_lone_surrogate(data: Any) -> bool:
    if isinstance(data, str):
        return any("\ud800" <= character <= "\udfff" for character in data)
    if isinstance(data, list):
        return any(map(_has_lone_surrogate, data))
    if isinstance(data, dict):
        return any(_has_lone_surrogate(part) for pair in data.items() for part in pair)
    return False
