"""Runs the event loop's hook for preparing a version, and waits for it, on the thread that prepares."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable

from deltaserve.errors import Unavailable

Hook = Callable[[str], Awaitable[object] | None]


class PrepareBridge:
    """``hook(version)`` folds and proves; an awaitable it returns runs on ``loop``. ``close`` lets go of waiters."""

    def __init__(self, loop: asyncio.AbstractEventLoop, find_hook: Callable[[], Hook | None]) -> None:
        self._loop = loop
        self._find_hook = find_hook
        self._is_closed = False

    def close(self) -> None:
        self._is_closed = True

    def prepare(self, version: str) -> None:
        """Raises what the hook raises; ``Unavailable`` without a hook or when the engine ends meanwhile."""
        hook = self._find_hook()
        if hook is None:
            raise Unavailable("its folded form for this base and dtype is missing and nothing here can make it")
        pending = hook(version)
        if not inspect.isawaitable(pending):
            return None

        async def run() -> None:
            await pending

        future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        while not self._is_closed:
            try:
                return future.result(timeout=0.5)
            except TimeoutError:
                if future.done():
                    raise
        future.cancel()
        raise Unavailable("the server is shutting down")
