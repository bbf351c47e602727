"""The whole server, as ``deltaserve serve`` builds it, on a free loopback port of this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from fastapi import FastAPI

from deltaserve.api.app import create_app
from deltaserve.api.keys import KeyRing
from deltaserve.config import ServeConfig
from deltaserve.runtime import Runtime
from deltatest.live_server import LiveServer, serve_within


@contextmanager
def serve_runtime(config: ServeConfig, keys: KeyRing | None = None) -> Iterator[LiveServer]:
    @asynccontextmanager
    async def open_app() -> AsyncIterator[FastAPI]:
        runtime = await asyncio.to_thread(Runtime.open, config)
        try:
            await runtime.start()
            parts = (runtime.engine, runtime.admission, runtime.store, runtime.tokenizer, runtime.metrics)
            yield create_app(*parts, config, keys)
        finally:
            await runtime.close()

    with serve_within(open_app, config, start_seconds=200) as live:
        yield live
