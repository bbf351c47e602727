"""The caller's end of a submitted request. Lives on the event loop; nothing here is touched by the engine thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType

from deltaserve.core import RequestOutput
from deltaserve.errors import DeltaserveError

Sink = Callable[[RequestOutput], bool]
"""Takes an output within the engine's delivery; False leaves it to whoever iterates."""


class RequestStream:
    """``async for output in stream``: ends after the finished output, or raises the ``DeltaserveError`` of a failure.

    Leaving early must end in ``abort`` or ``aclose`` (or use ``async with``): it frees blocks and adapter pins.
    """

    def __init__(self, request_id: str, abort: Callable[[], None], stop: Callable[[int], None]) -> None:
        self.request_id = request_id
        self._abort = abort
        self._stop = stop
        self._items: deque[RequestOutput | Exception] = deque()
        self._sink: Sink | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_complete = False  # the engine has nothing more to say
        self._is_aborted = False

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._items:
            if self._is_complete or self._is_aborted:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        item = self._items.popleft()
        if isinstance(item, Exception):
            raise item
        return item

    def divert(self, sink: Sink) -> None:
        """From now on ``sink`` is offered each output that comes while the reader waits for one: it costs no task's
        waking. What the sink leaves, the finished output and failures come by iterating, so order is kept. What the
        sink raises is raised to the reader."""
        self._sink = sink

    def abort(self) -> None:
        """Stop the request and drop what it produced. Idempotent; fine on a finished stream."""
        if self._is_aborted:
            return
        self._is_aborted = True
        self._items.clear()
        self._wake()
        if not self._is_complete:
            self._abort()

    async def aclose(self) -> None:
        self.abort()

    def stop(self, index: int) -> None:
        """End sequence ``index`` as if by a stop token (a stop string was found in its text); the others go on."""
        if not self._is_complete and not self._is_aborted:
            self._stop(index)

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def push(self, item: RequestOutput | DeltaserveError) -> None:
        """What a step produced; called on the event loop."""
        if self._is_aborted or self._is_complete:
            return
        if isinstance(item, DeltaserveError) or item.is_finished:
            self._is_complete = True
        elif self._sink is not None and self._waiter is not None and not self._waiter.done():
            # The reader has dealt with everything before and waits: only then may an output go past it.
            try:
                if self._sink(item):
                    return
            except Exception as error:  # one stream's bug; the other streams of this delivery go on
                self._items.append(error)
                self._wake()
                return
        self._items.append(item)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
