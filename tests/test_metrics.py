"""Each exported series moves, labels stay bounded, and a deleted adapter leaves nothing behind."""

from __future__ import annotations

import dataclasses

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from deltaserve.core import AdapterState, AdapterStatus, EngineStatus, FinishReason, RequestStats, StepStats
from deltaserve.metrics import _SECONDS, OTHER, Metrics

STEP = StepStats(
    step_seconds=0.01,
    num_prefill_tokens=5,
    num_decode_tokens=3,
    num_running=4,
    num_waiting=2,
    num_distinct_adapters=2,
    num_preempted=1,
    num_blocks_used=7,
    num_blocks_total=64,
    oldest_wait_seconds=1.5,
)
REQUEST = RequestStats(
    outcome=FinishReason.STOP,
    versions=("ab" * 32,),
    num_prompt_tokens=10,
    num_cached_tokens=4,
    num_completion_tokens=6,
    queue_seconds=0.1,
    adapter_wait_seconds=0.2,
    ttft_seconds=0.3,
    itl_seconds=(0.01, 0.02),
    e2e_seconds=0.5,
)
IDLE = EngineStatus(
    is_alive=False, is_draining=False, num_running=0, num_waiting=0, num_blocks_used=0, num_blocks_total=0
)
BUSY = EngineStatus(
    is_alive=True,
    is_draining=True,
    num_running=4,
    num_waiting=2,
    num_blocks_used=7,
    num_blocks_total=64,
    adapters=tuple(
        AdapterStatus(f"{i:064x}", state, host_bytes=10, device_bytes=20, num_pins=1)
        for i, state in enumerate(AdapterState)
    ),
)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def drive(metrics: Metrics) -> None:
    for prefill, decode in ((5, 3), (5, 0), (0, 3)):
        metrics.on_step(dataclasses.replace(STEP, num_prefill_tokens=prefill, num_decode_tokens=decode))
    metrics.on_request(dataclasses.replace(REQUEST, versions=()), (), "base")
    for outcome in FinishReason:
        metrics.on_request(dataclasses.replace(REQUEST, outcome=outcome), ("tone",), "adapter")
    metrics.on_request(dataclasses.replace(REQUEST, adapter_wait_seconds=0.0), ("tone",), "adapter")
    for source in ("disk", "host"):
        for outcome in ("ok", "failed"):
            metrics.on_adapter_load(source, outcome, 0.1)
    metrics.on_adapter_eviction("device", "lru")
    metrics.on_http("/v1/completions", 200, "ok", 0.2, is_retry=True)
    metrics.on_upload("refused", 1000, ["missing_tensor"])
    metrics.set_adapter("tone", version="ab" * 32, kind="lora", rank=8, num_bytes=1000)


def test_every_series_moves() -> None:
    """A family without a sample above zero after each hook was called is one that is exported and never set."""
    metrics = Metrics(version="1.2.3")
    state = IDLE
    metrics.watch(lambda: state)
    before = samples(metrics)
    drive(metrics)
    state = BUSY
    after = samples(metrics)
    for family in text_string_to_metric_families(metrics.render().decode()):
        if family.name.endswith("_created"):
            continue
        moved = [sample for sample in family.samples if sample.value > 0]
        assert moved, f"{family.name} never moves"
    still = {key for key, value in after.items() if before.get(key) == value and value == 0}
    assert all(name.endswith("_bucket") for name, _ in still), still


def test_names_and_help_follow_the_rules() -> None:
    metrics = Metrics()
    metrics.watch(lambda: BUSY)
    drive(metrics)
    for family in text_string_to_metric_families(metrics.render().decode()):
        assert family.name.startswith("deltaserve_")
        assert ":" not in family.name
        assert family.documentation.endswith(".")
        if family.type == "histogram":
            assert all("adapter" not in sample.labels for sample in family.samples)


def test_adapter_labels_are_bounded_and_reused() -> None:
    metrics = Metrics(max_adapters=3)
    for i in range(100):
        metrics.on_request(REQUEST, (f"adapter-{i}",), "adapter")
    labels = {
        dict(labels)["adapter"] for (name, labels) in samples(metrics) if name == "deltaserve_adapter_requests_total"
    }
    assert labels == {"adapter-0", "adapter-1", "adapter-2", OTHER}
    metrics.remove_adapter("adapter-1")
    metrics.on_request(REQUEST, ("adapter-50",), "adapter")
    labels = {dict(labels).get("adapter") for (_, labels) in samples(metrics)} - {None}
    assert labels == {"adapter-0", "adapter-2", "adapter-50", OTHER}


def test_a_composed_request_counts_once_and_for_each_of_its_adapters() -> None:
    metrics = Metrics(max_adapters=2)
    metrics.on_request(REQUEST, ("tone", "code", "one more", "and more"), "composition")
    found = samples(metrics)
    served = {
        dict(labels)["adapter"]: value
        for (name, labels), value in found.items()
        if name == "deltaserve_adapter_requests_total"
    }
    assert served == {"tone": 1.0, "code": 1.0, OTHER: 1.0}
    assert found["deltaserve_generation_seconds_count", (("kind", "composition"),)] == 1.0
    prompts = [
        value for (name, labels), value in found.items() if name == "deltaserve_tokens_total" and "prompt" in labels[0]
    ]
    assert prompts == [REQUEST.num_prompt_tokens]


def test_a_deleted_adapter_leaves_no_series() -> None:
    metrics = Metrics()
    drive(metrics)
    metrics.remove_adapter("tone")
    metrics.remove_adapter("never-seen")
    assert not [key for key in samples(metrics) if ("adapter", "tone") in key[1]]


def test_a_new_version_replaces_the_info_series() -> None:
    metrics = Metrics()
    for version in ("aa" * 32, "bb" * 32):
        metrics.set_adapter("tone", version=version, kind="lora", rank=8, num_bytes=1)
    infos = [dict(labels) for (name, labels) in samples(metrics) if name == "deltaserve_adapter_info"]
    assert [info["version"] for info in infos] == ["bb" * 6]


def test_reject_reasons_are_bounded() -> None:
    metrics = Metrics()
    for i in range(500):
        metrics.on_upload("refused", 0, [f"reason_{i}"])
    reasons = [key for key in samples(metrics) if key[0] == "deltaserve_upload_rejects_total"]
    assert len(reasons) == 101


def test_the_oldest_wait_is_zero_when_nothing_waits() -> None:
    metrics = Metrics()
    metrics.watch(lambda: IDLE)
    metrics.on_step(STEP)
    assert samples(metrics)["deltaserve_queue_oldest_age_seconds", ()] == 0


def test_token_latency_counts_as_prometheus_own_histogram_does() -> None:
    metrics, registry = Metrics(), CollectorRegistry()
    own = Histogram("deltaserve_own_seconds", "as above", ("kind",), registry=registry, buckets=_SECONDS)
    values = (0.0, 0.0009, 0.001, 0.0010001, 0.3, 599.0, 600.0, 601.0, 1e9)
    for kind, shown in (("base", values), ("adapter", values[3:]), ("base", values[:2]), ("adapter", ())):
        metrics.on_request(dataclasses.replace(REQUEST, itl_seconds=shown), (), kind)
        for value in shown:
            own.labels(kind).observe(value)

    def series(text: str, name: str) -> list[tuple[str, float]]:
        found = [line.removeprefix(name).rsplit(" ", 1) for line in text.splitlines() if line.startswith(name)]
        return sorted((labels, float(value)) for labels, value in found if not labels.startswith("_created"))

    expected = series(generate_latest(registry).decode(), "deltaserve_own_seconds")
    assert len(expected) == 2 * (len(_SECONDS) + 1 + 2)
    assert series(metrics.render().decode(), "deltaserve_inter_token_latency_seconds") == expected
