"""The step loop: the one thread that owns the engine and every table behind it."""

from __future__ import annotations

import logging
import queue
import threading
import traceback
from collections.abc import Callable, Mapping

from deltaserve.adapters.fault import describe
from deltaserve.adapters.loader import CANDIDATE_PREFIX
from deltaserve.core import GenerationRequest
from deltaserve.engine.engine import Engine
from deltaserve.engine.messages import (
    Abort,
    AddCandidate,
    Delivery,
    DropCandidate,
    Failed,
    Message,
    Preload,
    Probe,
    Probed,
    Publish,
    Retire,
    Settled,
    Shutdown,
    StopSequence,
    Submit,
    Unload,
    Wake,
)
from deltaserve.engine.observer import EngineMetrics
from deltaserve.engine.outcome import Outcome
from deltaserve.errors import DeltaserveError, EngineFailed, Unavailable

log = logging.getLogger(__name__)

_BLOCKED_WAIT_SECONDS = 0.1
"""How long to sleep at most while requests are open but none can run (their adapters are loading)."""


class EngineThread:
    """``deliver`` is called on this thread, at most once a step; it must only hand over.

    ``check_each_step`` verifies all books after each step: for tests.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: EngineMetrics,
        deliver: Callable[[Delivery], None],
        *,
        check_each_step: bool = False,
    ) -> None:
        self.num_received = 0
        self.error: DeltaserveError | None = None
        self._engine = engine
        self._metrics = metrics
        self._deliver = deliver
        self._check_each_step = check_each_step
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._labels: Mapping[str, str] = {}
        self._preloads: set[str] = set()
        self._farewell: DeltaserveError | None = None
        self._is_busy = False
        self._thread = threading.Thread(target=self._run, name="deltaserve-engine", daemon=True)
        engine.residency.workers.wake = lambda: self._inbox.put(Wake())

    def start(self) -> None:
        self._thread.start()

    def send(self, message: Message) -> None:
        """From any thread; applied before the next step."""
        self._inbox.put(message)

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self.error is None

    # ------------------------------------------------------------ on the thread

    def _run(self) -> None:
        try:
            while self._farewell is None:
                self._take_messages()
                self._engine.expire()
                outcome = self._engine.step()
                self._is_busy = outcome.stats is not None
                if self._check_each_step:
                    self._engine.check_integrity()
                self._measure(outcome)
                self._hand_over(outcome)
        except BaseException as error:
            reason = describe(error)
            log.critical("the step loop died: %s\n%s", reason, "".join(traceback.format_tb(error.__traceback__)))
            self._farewell = EngineFailed(f"The engine has failed and must be restarted: {reason}")
        self.error = self._farewell
        self._engine.residency.close()
        self._deliver(Delivery(ended=self._farewell))

    def _take_messages(self) -> None:
        """Apply all messages; with nothing to compute, sleep until one comes."""
        try:
            message = self._inbox.get(timeout=0 if self._is_busy else self._idle_seconds())
            while True:
                self._apply(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _idle_seconds(self) -> float | None:
        """None: until a message comes."""
        if not self._engine.open_ids and not self._preloads:
            return None
        deadline = self._engine.next_deadline
        left = _BLOCKED_WAIT_SECONDS if deadline is None else deadline - self._engine.clock()
        return min(max(left, 0.0), _BLOCKED_WAIT_SECONDS)

    def _apply(self, message: Message) -> None:
        engine, residency = self._engine, self._engine.residency
        match message:
            case Submit(request, arrival_seconds):
                engine.add(request, arrival_seconds, self._labels_of(request))
                self.num_received += 1
            case Abort(request_id):
                engine.abort(request_id)
            case StopSequence(request_id, index):
                engine.stop(request_id, index)
            case Probe(probe_id, prompt_ids, binding, arrival_seconds):
                engine.add_probe(probe_id, prompt_ids, binding, arrival_seconds)
            case Publish(added, retired, incompatible, labels):
                residency.publish(added, retired, incompatible)
                self._labels = labels
            case AddCandidate(version):
                residency.publish((CANDIDATE_PREFIX + version,), (), None)
            case DropCandidate(version):
                residency.retire(CANDIDATE_PREFIX + version, forget=True)
            case Preload(version):
                self._preloads.add(version)
            case Unload(version):
                residency.unload(version)
            case Retire(version):
                residency.retire(version)
            case Shutdown(reason):
                self._farewell = Unavailable(reason)
            case Wake():
                pass

    def _measure(self, outcome: Outcome) -> None:
        if outcome.stats is not None:
            self._metrics.on_step(outcome.stats)
        for stats, labels in outcome.finished:
            kind = "ensemble" if stats.is_ensemble else ("base", "adapter", "composition")[min(len(labels), 2)]
            self._metrics.on_request(stats, labels, kind)

    def _labels_of(self, request: GenerationRequest) -> tuple[str, ...]:
        """The names of its adapters, as they are now."""
        return tuple(self._labels.get(version, version[:12]) for version in request.versions)

    def _hand_over(self, outcome: Outcome) -> None:
        delivery = Delivery(
            outputs=tuple(outcome.outputs),
            failed=tuple(Failed(request_id, error) for request_id, error in outcome.failures),
            probed=tuple(Probed(probe_id, logits) for probe_id, logits in outcome.probes),
            settled=self._settle_preloads() if self._preloads else (),
        )
        if not delivery.is_empty:
            self._deliver(delivery)

    def _settle_preloads(self) -> tuple[Settled, ...]:
        residency = self._engine.residency
        done = tuple(version for version in self._preloads if residency.settle(version))
        self._preloads -= set(done)
        return tuple(Settled(version, residency.failure(version)) for version in done)
