"""Every Prometheus metric of the server, once. One registry per server; names begin with ``deltaserve_``, base units.

Labels are bounded: at most ``max_adapters`` adapter names have series of their own, the rest share ``_other``; a
deleted adapter's series go away; nothing that a client invents becomes a label. Histograms never carry an adapter.
What has a current value (queue, blocks, residency) is read from the engine's status when Prometheus asks.
"""

from __future__ import annotations

import contextlib
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from deltaserve.core import AdapterState, EngineStatus, FinishReason, RequestStats, StepStats

OTHER = "_other"
MAX_REASONS = 100
CONTENT_TYPE = CONTENT_TYPE_LATEST

_TOKEN_KINDS = ("prompt", "cached", "generated")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_ADAPTERS = (0, 1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Moves the metrics. Methods are cheap, thread-safe and never raise; the engine calls ``on_*`` from its thread."""

    def __init__(self, *, version: str = "0", max_adapters: int = 50) -> None:
        self.registry = registry = CollectorRegistry(auto_describe=True)
        self._max_adapters = max_adapters
        self._labelled: set[str] = set()
        self._infos: dict[str, tuple[str, ...]] = {}
        self._reasons: set[str] = set()
        self._oldest_wait_seconds = 0.0

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"deltaserve_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"deltaserve_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return Histogram(f"deltaserve_{name}", text, labels, registry=registry, buckets=tuple(buckets))

        gauge("build_info", "1; the label says which version runs.", "version").labels(version).set(1)
        # Engine
        self._step_seconds = histogram("step_seconds", "Time of one engine step.", _SECONDS, "phase")
        self._batch_tokens = histogram("batch_tokens", "Tokens computed in one step.", _TOKENS)
        self._batch_adapters = histogram("batch_distinct_adapters", "Adapters in one step.", _ADAPTERS)
        self._preemptions = counter("preemptions_total", "Sequences whose blocks were taken back for recomputing.")
        # Requests
        self._requests = counter(
            "requests_total", "HTTP requests by route and outcome.", "route", "status_class", "outcome"
        )
        self._request_seconds = histogram("request_seconds", "Time of an HTTP request.", _SECONDS, "route")
        self._retries = counter("client_retries_total", "Requests that the client's library marked as retries.")
        self._tokens = counter("tokens_total", "Tokens by kind: prompt, cached (of the prompt), generated.", "kind")
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first sampled token.", _SECONDS, "kind")
        self._itl = _TokenLatency("inter_token_latency_seconds", "Between two tokens of a sequence.")
        registry.register(self._itl)
        self._e2e = histogram("generation_seconds", "Arrival to last token.", _SECONDS, "kind")
        self._queue = histogram("queue_seconds", "Arrival to first scheduled.", _SECONDS, "kind")
        # Adapters by name
        self._adapter_requests = counter("adapter_requests_total", "Finished requests.", "adapter", "outcome")
        self._adapter_tokens = counter("adapter_tokens_total", "Tokens of an adapter.", "adapter", "kind")
        self._adapter_used = gauge("adapter_last_used_timestamp_seconds", "Unix time of the last request.", "adapter")
        self._adapter_info = gauge(
            "adapter_info", "1 for each adapter that is served.", "adapter", "version", "type", "rank", "bytes"
        )
        # Adapter cache
        self._loads = counter("adapter_loads_total", "Loads towards the device.", "from", "outcome")
        self._load_seconds = histogram("adapter_load_seconds", "Time of one load.", _SECONDS, "from")
        self._evictions = counter("adapter_evictions_total", "Adapters evicted.", "level", "reason")
        self._hits = counter("adapter_cache_hits_total", "Requests whose adapters were resident.", "level")
        self._misses = counter("adapter_cache_misses_total", "Requests that waited for an adapter.", "level")
        self._adapter_wait = histogram("adapter_wait_seconds", "Time spent waiting only for an adapter.", _SECONDS)
        # The door
        self._uploads = counter("adapter_uploads_total", "Uploads: created, unchanged, refused, failed.", "outcome")
        self._rejects = counter("upload_rejects_total", "Reasons of refused uploads.", "reason")
        self._upload_bytes = counter("upload_bytes_total", "Bytes received by uploads.")

    def watch(self, status: Callable[[], EngineStatus]) -> None:
        """Reads the engine's state through ``status`` at each scrape."""
        self.registry.register(_EngineState(status, lambda: self._oldest_wait_seconds))

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    # The engine's side -----------------------------------------------------------------------------------------------

    def on_step(self, stats: StepStats) -> None:
        has_prefill, has_decode = stats.num_prefill_tokens > 0, stats.num_decode_tokens > 0
        phase = "mixed" if has_prefill and has_decode else "prefill" if has_prefill else "decode"
        self._step_seconds.labels(phase).observe(stats.step_seconds)
        self._batch_tokens.observe(stats.num_prefill_tokens + stats.num_decode_tokens)
        self._batch_adapters.observe(stats.num_distinct_adapters)
        self._preemptions.inc(stats.num_preempted)
        self._oldest_wait_seconds = stats.oldest_wait_seconds

    def on_request(self, stats: RequestStats, adapter_labels: tuple[str, ...], kind: str) -> None:
        """``kind`` is ``base``, ``adapter``, ``composition`` or ``ensemble``; ``adapter_labels`` the names of the
        adapters: each of them is counted as used."""
        amounts = (stats.num_prompt_tokens, stats.num_cached_tokens, stats.num_completion_tokens)
        by_kind = dict(zip(_TOKEN_KINDS, amounts, strict=True))
        for token_kind, amount in by_kind.items():
            self._tokens.labels(token_kind).inc(amount)
        self._queue.labels(kind).observe(stats.queue_seconds)
        self._e2e.labels(kind).observe(stats.e2e_seconds)
        if stats.ttft_seconds is not None:
            self._ttft.labels(kind).observe(stats.ttft_seconds)
        self._itl.observe_all(kind, stats.itl_seconds)
        if not adapter_labels:
            return
        waited = stats.adapter_wait_seconds > 0
        (self._misses if waited else self._hits).labels("device").inc()
        self._adapter_wait.observe(stats.adapter_wait_seconds)
        for label in dict.fromkeys(map(self._label, adapter_labels)):  # several may share ``_other``
            self._adapter_requests.labels(label, FinishReason(stats.outcome).value).inc()
            for token_kind, amount in by_kind.items():
                self._adapter_tokens.labels(label, token_kind).inc(amount)
            self._adapter_used.labels(label).set(time.time())

    def on_adapter_load(self, source: str, outcome: str, seconds: float) -> None:
        self._loads.labels(source, outcome).inc()
        self._load_seconds.labels(source).observe(seconds)

    def on_adapter_eviction(self, level: str, reason: str) -> None:
        self._evictions.labels(level, reason).inc()

    # HTTP's side -----------------------------------------------------------------------------------------------------

    def on_http(self, route: str, status: int, outcome: str, seconds: float, is_retry: bool) -> None:
        """``route`` is a route's pattern, never a path as sent."""
        self._requests.labels(route, f"{status // 100}xx", outcome).inc()
        self._request_seconds.labels(route).observe(seconds)
        if is_retry:
            self._retries.inc()

    def on_upload(self, outcome: str, num_bytes: int, reasons: Iterable[str] = ()) -> None:
        """``outcome``: created, unchanged, refused, failed. ``reasons`` are the codes of a refusal."""
        self._uploads.labels(outcome).inc()
        self._upload_bytes.inc(num_bytes)
        for reason in set(reasons):
            if reason not in self._reasons and len(self._reasons) >= MAX_REASONS:
                reason = OTHER
            self._reasons.add(reason)
            self._rejects.labels(reason).inc()

    @property
    def adapter_names(self) -> frozenset[str]:
        """Adapters that have series of their own."""
        return frozenset(self._labelled)

    @property
    def max_adapters(self) -> int:
        return self._max_adapters

    def set_adapter(self, name: str, *, version: str, kind: str, rank: int | None, num_bytes: int) -> None:
        """Tells that ``name`` now means this version; an earlier version's series goes away."""
        label = self._label(name)
        if label == OTHER:
            return
        labels = (label, version[:12], kind, "" if rank is None else str(rank), str(num_bytes))
        earlier = self._infos.get(name)
        if earlier is not None and earlier != labels:
            self._adapter_info.remove(*earlier)
        self._infos[name] = labels
        self._adapter_info.labels(*labels).set(1)

    def remove_adapter(self, name: str) -> None:
        """Forgets a deleted adapter's series and gives its label to the next one."""
        if name not in self._labelled:
            return
        self._labelled.discard(name)
        if name in self._infos:
            self._adapter_info.remove(*self._infos.pop(name))
        _forget(self._adapter_requests, *((name, reason.value) for reason in FinishReason))
        _forget(self._adapter_tokens, *((name, kind) for kind in _TOKEN_KINDS))
        _forget(self._adapter_used, (name,))

    def _label(self, name: str) -> str:
        if name in self._labelled:
            return name
        if len(self._labelled) >= self._max_adapters:
            return OTHER
        self._labelled.add(name)
        return name


def _forget(metric: Counter | Gauge, *label_sets: tuple[str, ...]) -> None:
    for labels in label_sets:
        with contextlib.suppress(KeyError):
            metric.remove(*labels)


class _TokenLatency(Collector):
    """A histogram by ``kind`` that takes all values of a request at once: one for each token would be slow to tell."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = f"deltaserve_{name}", text
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        self._lock = threading.Lock()

    def observe_all(self, kind: str, seconds: Iterable[float]) -> None:
        values = list(seconds)
        with self._lock:
            counts = self._counts.setdefault(kind, [0] * (len(_SECONDS) + 1))
            for value in values:
                counts[bisect_left(_SECONDS, value)] += 1
            self._sums[kind] = self._sums.get(kind, 0.0) + sum(values)

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=["kind"])
        bounds = [floatToGoString(bound) for bound in (*_SECONDS, float("inf"))]
        with self._lock:
            for kind, counts in self._counts.items():
                buckets = list(zip(bounds, accumulate(counts), strict=True))
                family.add_metric([kind], buckets, sum_value=self._sums[kind])
        yield family


class _EngineState(Collector):
    """Gauges of the moment, from one status snapshot a scrape."""

    def __init__(self, status: Callable[[], EngineStatus], oldest_wait_seconds: Callable[[], float]) -> None:
        self._status = status
        self._oldest_wait_seconds = oldest_wait_seconds

    def collect(self) -> Iterator[Metric]:
        status = self._status()

        def single(name: str, text: str, value: float) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"deltaserve_{name}", text, value=value)

        yield single("engine_up", "1 while the step loop lives.", float(status.is_alive))
        yield single("engine_draining", "1 while no new requests are taken.", float(status.is_draining))
        yield single("requests_running", "Sequences being computed.", status.num_running)
        yield single("requests_waiting", "Requests not yet scheduled.", status.num_waiting)
        oldest = self._oldest_wait_seconds() if status.num_waiting else 0.0
        yield single("queue_oldest_age_seconds", "Age of the request that waits longest, at the last step.", oldest)
        yield single("kv_blocks_used", "KV blocks in use.", status.num_blocks_used)
        yield single("kv_blocks_capacity", "KV blocks there are.", status.num_blocks_total)
        slots = GaugeMetricFamily("deltaserve_adapter_slots_used", "Adapters resident, by level.", labels=["level"])
        size = GaugeMetricFamily("deltaserve_adapter_bytes", "Bytes of resident adapters, by level.", labels=["level"])
        for level, sizes in (
            ("device", [adapter.device_bytes for adapter in status.adapters]),
            ("host", [adapter.host_bytes for adapter in status.adapters]),
        ):
            slots.add_metric([level], sum(amount > 0 for amount in sizes))
            size.add_metric([level], sum(sizes))
        yield slots
        yield size
        states = GaugeMetricFamily("deltaserve_adapter_versions", "Versions by state.", labels=["state"])
        for state in AdapterState:
            states.add_metric([state.value], sum(adapter.state == state for adapter in status.adapters))
        yield states
        pins = sum(adapter.num_pins for adapter in status.adapters)
        yield single("adapter_pins", "Sequences that hold an adapter in its slot.", pins)
