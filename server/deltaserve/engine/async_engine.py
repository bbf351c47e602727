"""The engine as the event loop sees it: submit, probe, publish, preload, status.

The engine's thread is the only one that changes tables. Everything crosses as messages (``messages.py``): one queue in,
one ``call_soon_threadsafe`` per step out.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltaserve.adapters.loader import CANDIDATE_PREFIX, FoldedLoader
from deltaserve.core import Binding, EngineStatus, GenerationRequest, Logits, RequestOutput
from deltaserve.engine.backlog import Backlog
from deltaserve.engine.block_manager import BLOCK_SIZE
from deltaserve.engine.engine import Engine
from deltaserve.engine.engine_thread import EngineThread
from deltaserve.engine.limits import EngineLimits
from deltaserve.engine.messages import (
    Abort,
    AddCandidate,
    Delivery,
    DropCandidate,
    Preload,
    Probe,
    Retire,
    Shutdown,
    StopSequence,
    Submit,
    Unload,
)
from deltaserve.engine.observer import EngineMetrics, SilentMetrics
from deltaserve.engine.prepare_bridge import Hook, PrepareBridge
from deltaserve.engine.publication import publication
from deltaserve.engine.stream import RequestStream
from deltaserve.errors import Conflict, DeltaserveError, EngineFailed, QueueFull, Unavailable
from deltaserve_store.names import NameMap, Resolved

__all__ = ["AsyncEngine", "EngineMetrics", "RequestStream"]


class AsyncEngine:
    """Call everything on one event loop, the one that ran ``start``.

    ``loader`` reads folded adapters and knows candidates. ``on_prepare(version)`` folds and proves a published version
    whose folded file is missing; it is called on a thread of its own and may return an awaitable, which runs on the
    event loop.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        loader: FoldedLoader | None = None,
        metrics: EngineMetrics | None = None,
        check_each_step: bool = False,
    ) -> None:
        self._engine = engine
        self._loader = loader
        self._metrics: EngineMetrics = metrics or SilentMetrics()
        engine.residency.observer = self._metrics
        self._thread = EngineThread(engine, self._metrics, self._from_engine, check_each_step=check_each_step)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bridge: PrepareBridge | None = None
        self._names = NameMap()
        self._streams: dict[str, RequestStream] = {}
        self._probes: dict[str, asyncio.Future[Logits]] = {}
        self._preloads: dict[str, list[asyncio.Future[None]]] = {}
        self._probe_ids = itertools.count()
        self._backlog = Backlog()
        self._num_submitted = 0
        self._is_draining = False
        self._has_ended = False
        self._drained: asyncio.Event = asyncio.Event()
        self.on_prepare: Hook | None = None

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Start the engine thread."""
        self._loop = asyncio.get_running_loop()
        self._bridge = PrepareBridge(self._loop, lambda: self.on_prepare)
        self._engine.residency.workers.prepare = self._bridge.prepare
        self._thread.start()

    def drain(self) -> None:
        """Take no new requests; the open ones go on."""
        self._is_draining = True

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Drain for at most that long, end what is still open with ``Unavailable``, and end the thread."""
        self.drain()
        if self._loop is None:
            return
        if self._streams and not self._has_ended:
            self._drained.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), drain_seconds)
        self._thread.send(Shutdown("The server is shutting down; try another one."))
        await asyncio.to_thread(self._thread.join)
        self._end(self._thread.error or Unavailable("The server is shutting down."))

    def status(self) -> EngineStatus:
        """A snapshot; callable from any thread."""
        engine, error = self._engine, self._thread.error
        return EngineStatus(
            is_alive=self._thread.is_alive,
            is_draining=self._is_draining,
            num_running=engine.num_running,
            num_waiting=engine.num_waiting + self._num_submitted - self._thread.num_received,
            num_blocks_used=engine.num_blocks_used,
            num_blocks_total=engine.num_blocks_total,
            adapters=tuple(
                adapter for adapter in engine.residency.status() if not adapter.version.startswith(CANDIDATE_PREFIX)
            ),
            error=error.message if isinstance(error, EngineFailed) else None,
        )

    @property
    def limits(self) -> EngineLimits:
        return self._engine.limits

    def max_row_len(self, num_rows: int) -> int:
        """Positions of a sequence for which so many of them fit the KV cache beside each other."""
        return min(self.limits.max_model_len, self._engine.num_blocks_total // num_rows * BLOCK_SIZE)

    @property
    def base_fingerprint(self) -> str:
        return self._engine.base_fingerprint

    # ------------------------------------------------------------ requests

    def submit(self, request: GenerationRequest) -> RequestStream:
        """Queue a request. Raises ``Unavailable``, ``EngineFailed``, ``ContextLengthExceeded``, ``InvalidRequest`` (as
        ``EnsembleRefused`` too) or ``QueueFull``; what goes wrong later is raised by the stream."""
        self._check_alive()
        if self._is_draining:
            raise Unavailable("The server is shutting down and takes no new requests.", retry_after_seconds=1.0)
        self._engine.check(request)
        request_id = request.request_id
        if request_id in self._streams:
            raise Conflict(f"The request id {request_id!r} is in use.", code="duplicate_request_id")
        num_queued = self._engine.num_unstarted + self._num_submitted - self._thread.num_received
        now = self._engine.clock()
        if num_queued >= self.limits.max_queue:
            raise QueueFull(
                f"{num_queued} requests are waiting and at most {self.limits.max_queue} may; try again later.",
                retry_after_seconds=self._backlog.retry_after(num_queued, now),
            )
        stream = RequestStream(
            request_id,
            abort=lambda: self._abort(request_id),
            stop=lambda index: self._thread.send(StopSequence(request_id, index)),
        )
        self._streams[request_id] = stream
        self._num_submitted += 1
        self._thread.send(Submit(request, now))
        return stream

    async def probe(self, ids: tuple[int, ...], binding: Binding) -> Logits:
        """Logits of every position, at lowest priority. Versions registered as candidates are read from there.

        Raises ``AdapterUnavailable``, ``InvalidRequest`` or ``EngineFailed``.
        """
        self._check_alive()
        self.limits.check_prompt(ids, binding.num_token_ids)
        self.limits.check_binding(binding)
        probe_id = f"probe:{next(self._probe_ids)}"
        future: asyncio.Future[Logits] = asyncio.get_running_loop().create_future()
        self._probes[probe_id] = future
        parts = tuple(replace(part, version=self._version_to_probe(part.version)) for part in binding.parts)
        self._thread.send(Probe(probe_id, ids, Binding(parts), self._engine.clock()))
        try:
            return await future
        finally:
            if self._probes.pop(probe_id, None) is not None:
                self._thread.send(Abort(probe_id))

    # ------------------------------------------------------------ adapters

    @property
    def names(self) -> NameMap:
        return self._names

    def resolve(self, tenant: str, model: str) -> Resolved:
        """What a ``model`` field means now. Raises the store's ``NotFound``."""
        return self._names.resolve(tenant, model)

    def publish(self, names: NameMap) -> None:
        """Swap the name map: requests resolved from now on see it; running ones keep their versions."""
        before, self._names = self._names, names
        self._thread.send(publication(before, names, self._engine.base_fingerprint))

    def register_candidate(self, version: str, folded_path: Path) -> None:
        """Let probes use a version that is not published yet. Raises ``Unavailable`` without a loader."""
        if self._loader is None:
            raise Unavailable("This engine cannot load adapters.")
        self._loader.register(version, folded_path)
        self._thread.send(AddCandidate(version))

    def unregister_candidate(self, version: str) -> None:
        """Forget a candidate; unknown ones are fine."""
        if self._loader is not None and self._loader.has_candidate(version):
            self._loader.unregister(version)
            self._thread.send(DropCandidate(version))

    async def preload(self, version: str) -> None:
        """Bring a version as near to the device as there is room. Raises ``AdapterUnavailable`` when it fails."""
        self._check_alive()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._preloads.setdefault(version, []).append(future)
        self._thread.send(Preload(version))
        await future

    async def unload(self, version: str) -> None:
        """Free a version's memory as soon as no running sequence uses it; the next request loads it again."""
        self._thread.send(Unload(version))

    async def retire(self, version: str) -> None:
        """Serve a version to nobody new, and free its memory when the last sequence using it ends."""
        self._thread.send(Retire(version))

    # ------------------------------------------------------------ inside

    def _check_alive(self) -> None:
        if self._thread.error is not None:
            raise _fresh(self._thread.error)
        if self._loop is None:
            raise Unavailable("The server is starting.", retry_after_seconds=1.0)

    def _version_to_probe(self, version: str) -> str:
        is_candidate = self._loader is not None and self._loader.has_candidate(version)
        return CANDIDATE_PREFIX + version if is_candidate else version

    def _abort(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None:
            self._thread.send(Abort(request_id))
            self._note_end()

    def _note_end(self) -> None:
        self._backlog.note_end(self._engine.clock())
        if not self._streams:
            self._drained.set()

    def _from_engine(self, delivery: Delivery) -> None:
        """On the engine thread: hand over to the event loop, which may be gone already."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        try:
            loop.call_soon_threadsafe(self._receive, delivery)
        except RuntimeError:  # closed between the check and the call
            return

    def _receive(self, delivery: Delivery) -> None:
        for output in delivery.outputs:
            self._push(output.request_id, output, is_last=output.is_finished)
        for failed in delivery.failed:
            probe = self._probes.get(failed.request_id)
            if probe is not None and not probe.done():
                probe.set_exception(failed.error)
            self._push(failed.request_id, failed.error, is_last=True)
        for probed in delivery.probed:
            probe = self._probes.get(probed.probe_id)
            if probe is not None and not probe.done():
                self._probes.pop(probed.probe_id)
                probe.set_result(probed.logits)
        for settled in delivery.settled:
            for waiter in self._preloads.pop(settled.version, []):
                _resolve(waiter, settled.error)
        if delivery.ended is not None:
            self._end(delivery.ended)

    def _push(self, request_id: str, item: RequestOutput | DeltaserveError, *, is_last: bool) -> None:
        stream = self._streams.get(request_id)
        if stream is None:
            return
        if is_last:
            del self._streams[request_id]
            self._note_end()
        stream.push(item)

    def _end(self, error: DeltaserveError) -> None:
        """The loop is over: every open request, probe and preload hears why. Idempotent."""
        self._has_ended = True
        if self._bridge is not None:
            self._bridge.close()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.push(_fresh(error))
        for probe in self._probes.values():
            _resolve(probe, _fresh(error))
        for waiters in self._preloads.values():
            for waiter in waiters:
                _resolve(waiter, _fresh(error))
        self._preloads = {}
        self._drained.set()


def _fresh(error: DeltaserveError) -> DeltaserveError:
    """A copy to raise: one exception object raised in many tasks would share a traceback."""
    return type(error)(error.message, code=error.error_code, retry_after_seconds=error.retry_after_seconds)


def _resolve(future: asyncio.Future[Any], error: DeltaserveError | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
