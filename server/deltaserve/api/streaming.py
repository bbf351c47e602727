"""Server-sent events, written byte by byte, and the watch for clients that leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deltaserve.api.errors import ClientGone, internal_error
from deltaserve.api.wire_json import encode
from deltaserve.errors import DeltaserveError
from deltaserve_store.errors import StoreError

log = logging.getLogger("deltaserve.api")
Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"
DIRECT_WRITER = "deltaserve.direct_writer"
"""ASGI extension of our own server: a ``DirectWriter`` for the body of this response."""
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class DirectWriter(Protocol):
    """Writes a part of a response's body without ASGI's messages, which cost more than the part itself."""

    def is_ready(self) -> bool:
        """False when parts must be sent as ASGI messages: the client reads slowly, or has left."""

    def write(self, data: bytes) -> None:
        """Only where ``is_ready``; nothing comes between the two."""


class Events(Protocol):
    """What an ``EventStream`` sends. Each method's bytes are whole events, possibly none."""

    async def wait_for_first(self) -> None:
        """Until there is something to send or it takes too long. What it raises gets an HTTP status of its own."""

    def opening(self) -> bytes: ...
    def write_to(self, writer: DirectWriter) -> None:
        """Steps that come while the iteration waits may be written at once."""

    def __aiter__(self) -> AsyncIterator[Any]: ...
    def tell(self, step: Any) -> bytes: ...
    @property
    def is_over(self) -> bool:
        """Whether all steps were told, so that the last one's bytes may go with the closing ones."""

    def closing(self) -> bytes: ...
    async def aclose(self) -> None: ...


def event(data: Mapping[str, Any]) -> bytes:
    """One event. JSON escapes line breaks, so the data is one line."""
    return f"data: {encode(data)}\n\n".encode()


class EventStream(Response):
    """Sends events as they come. A failure becomes an error event, never a silent end; only success says ``[DONE]``.

    However it ends, also by the client's leaving, ``events`` is closed, which aborts the generation.
    """

    media_type = "text/event-stream"

    def __init__(self, events: Events, headers: Mapping[str, str]) -> None:
        super().__init__(headers={**_HEADERS, **headers})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer: DirectWriter | None = scope.get("extensions", {}).get(DIRECT_WRITER)
        try:
            outcome = await run_while_connected(self._send_all(send, writer), receive)
        finally:
            await self._events.aclose()  # again, for ends before the first event
        if outcome is not None:
            scope.setdefault("state", {})["outcome"] = outcome

    async def _send_all(self, send: Send, writer: DirectWriter | None) -> str | None:
        await self._events.wait_for_first()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        outcome: str | None = None
        try:
            last = await self._send_events(send, writer) + DONE
        except (DeltaserveError, StoreError) as error:
            last, outcome = event({"error": error.body()}), "error"
        except Exception:
            log.exception("unexpected error in a stream")
            last, outcome = event({"error": internal_error().body()}), "error"
        await send({"type": "http.response.body", "body": last, "more_body": False})
        return outcome

    async def _send_events(self, send: Send, writer: DirectWriter | None) -> bytes:
        """Returns what is to be sent last."""
        events = self._events
        try:
            if opening := events.opening():
                await send({"type": "http.response.body", "body": opening, "more_body": True})
            if writer is not None:
                events.write_to(writer)
            async for step in events:
                data = events.tell(step)
                if events.is_over:
                    return data + events.closing()
                if writer is not None and writer.is_ready():
                    writer.write(data)
                elif data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            return events.closing()
        finally:
            await events.aclose()


async def run_while_connected(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """``work``'s result. Cancels it and raises ClientGone when the client leaves first. The body was read before."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def finish_unless_gone(work: Coroutine[Any, Any, Result], request: Request) -> Result:
    return await run_while_connected(work, request.receive)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
