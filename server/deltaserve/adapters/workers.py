"""The threads that read, prepare and copy adapters, and the queue of what they finished."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from deltaserve.adapters.device_pool import DevicePool, StagedAdapter
from deltaserve.adapters.host_cache import HostedAdapter
from deltaserve.deltas.composition import traits_of
from deltaserve.deltas.folded import FoldedAdapter


class AdapterLoader(Protocol):
    """Gives the folded form of a version. Called on worker threads only."""

    def load(self, version: str) -> FoldedAdapter:
        """Raises ``NotPrepared`` when the version must be folded and proven first, anything else when it fails."""
        ...


@dataclass(frozen=True, slots=True)
class Finished:
    """A job's end: exactly one of ``error`` and the result is set. ``seconds`` is the job's own time."""

    version: str
    seconds: float
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Loaded(Finished):
    adapter: HostedAdapter | None = None


@dataclass(frozen=True, slots=True)
class Prepared(Finished):
    """The version has been folded and proven; it can be loaded now."""


@dataclass(frozen=True, slots=True)
class Staged(Finished):
    staged: StagedAdapter | None = None


class LoadWorkers:
    """Loads and copies share ``num_threads`` threads. Preparing has its own single thread: a proof waits for steps
    that themselves need loads, so it must never hold the last loader.

    ``prepare`` folds and proves a version; None when nobody can.
    """

    def __init__(self, loader: AdapterLoader, pool: DevicePool, num_threads: int) -> None:
        self.max_in_flight = 2 * num_threads
        self.num_in_flight = 0  # loads and copies; preparing is not counted, since its proof needs loads of its own
        self.prepare: Callable[[str], None] | None = None
        self.wake: Callable[[], None] | None = None
        self._loader = loader
        self._pool = pool
        self._done: queue.SimpleQueue[Finished] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="deltaserve-load")
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="deltaserve-prepare")

    @property
    def has_room(self) -> bool:
        """Whether another load would begin soon."""
        return self.num_in_flight < self.max_in_flight

    def start_load(self, version: str) -> None:
        self.num_in_flight += 1
        self._threads.submit(self._load, version)

    def start_prepare(self, version: str) -> None:
        self._preparing.submit(self._prepare, version)

    def start_staging(self, version: str, hosted: HostedAdapter) -> None:
        self.num_in_flight += 1
        self._threads.submit(self._stage, version, hosted)

    def finished(self) -> Iterator[Finished]:
        """What has ended since the last call; does not block."""
        while True:
            try:
                done = self._done.get_nowait()
            except queue.Empty:
                return
            self.num_in_flight -= not isinstance(done, Prepared)
            yield done

    def close(self) -> None:
        """Take no more jobs and abandon those not begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._preparing.shutdown(wait=False, cancel_futures=True)

    def _load(self, version: str) -> None:
        began = time.perf_counter()
        try:
            folded = self._loader.load(version)
            terms = self._pool.convert(folded)
            hosted = HostedAdapter(terms, terms.nbytes, traits_of(folded))
            result = Loaded(version, time.perf_counter() - began, adapter=hosted)
        except BaseException as error:
            result = Loaded(version, time.perf_counter() - began, error=error)
        self._finish(result)

    def _prepare(self, version: str) -> None:
        began = time.perf_counter()
        failure: BaseException | None = None
        try:
            if self.prepare is not None:
                self.prepare(version)
        except BaseException as error:
            failure = error
        self._finish(Prepared(version, time.perf_counter() - began, error=failure))

    def _stage(self, version: str, hosted: HostedAdapter) -> None:
        began = time.perf_counter()
        try:
            staged = self._pool.stage(hosted.terms)
            result = Staged(version, time.perf_counter() - began, staged=staged)
        except BaseException as error:
            result = Staged(version, time.perf_counter() - began, error=error)
        self._finish(result)

    def _finish(self, result: Finished) -> None:
        self._done.put(result)
        if self.wake is not None:
            self.wake()
