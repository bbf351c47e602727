"""Server-sent events, written byte by byte, and the watch for clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deltaserve.api.errors import ClientGone, internal_error
from deltaserve.errors import DeltaserveError
from deltaserve_store.errors import StoreError

log = logging.getLogger("deltaserve.api")
Result = TypeVar("Result")

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def event(data: Mapping[str, Any]) -> bytes:
    """One event. JSON escapes line breaks, so the data is one line."""
    return b"data: " + _ENCODER.encode(data).encode() + b"\n\n"


class EventStream(Response):
    """Sends events as they come. A failure becomes an error event, never a silent end; only success says ``[DONE]``.

    The client's leaving closes ``events``, whose ``finally`` aborts the generation.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[Mapping[str, Any]], headers: Mapping[str, str]) -> None:
        super().__init__(headers={**_HEADERS, **headers})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = await run_while_connected(self._send_all(send), receive)
        if outcome is not None:
            scope.setdefault("state", {})["outcome"] = outcome

    async def _send_all(self, send: Send) -> str | None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        outcome: str | None = None
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": event(data), "more_body": True})
            last = DONE
        except (DeltaserveError, StoreError) as error:
            last, outcome = event({"error": error.body()}), "error"
        except Exception:
            log.exception("unexpected error in a stream")
            last, outcome = event({"error": internal_error().body()}), "error"
        await send({"type": "http.response.body", "body": last, "more_body": False})
        return outcome


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
