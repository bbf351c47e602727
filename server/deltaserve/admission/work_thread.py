"""One thread for all blocking work of admission, at a lower priority than the step loop where the system allows it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

NICE = 10


class WorkThread:
    """Runs functions one after another. Abandoned work (its caller was cancelled) still ends before the next begins."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="deltaserve-admission", initializer=_yield_to_others)

    async def run(self, function: Callable[[], Result]) -> Result:
        """Cancelling the caller does not stop the function; its result is then dropped."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    async def run_to_end(self, function: Callable[[], Result]) -> tuple[Result, bool]:
        """For work that must not be left half known: a cancelled caller waits for the end all the same.

        Returns the result and whether a cancellation arrived meanwhile: the caller has to raise it when it is done.
        """
        future = asyncio.get_running_loop().run_in_executor(self._pool, function)
        cancelled = False
        while not future.done():
            try:
                await asyncio.shield(future)
            except asyncio.CancelledError:
                if future.cancelled():
                    raise
                cancelled = True
        return future.result(), cancelled

    async def finish(self, function: Callable[[], Result]) -> Result:
        """``run_to_end``, then the cancellation if there was one."""
        result, cancelled = await self.run_to_end(function)
        if cancelled:
            raise asyncio.CancelledError
        return result

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _yield_to_others() -> None:
    """Linux keeps a priority per thread, and threads that torch starts from here inherit it."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
