"""The engine behind its thread: every request hears its end, whatever happens; the loop never waits for a load."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltaserve.adapters.loader import NotPrepared
from deltaserve.core import (
    AdapterState,
    AdapterStatus,
    Binding,
    BindingPart,
    EngineStatus,
    Ensemble,
    FinishReason,
    GenerationRequest,
    Logits,
    Member,
    Mix,
    RequestOutput,
    RequestStats,
    SamplingParams,
    SequenceDelta,
    StepStats,
    TokenLogprob,
)
from deltaserve.engine import messages
from deltaserve.engine.async_engine import AsyncEngine, RequestStream
from deltaserve.errors import (
    AdapterUnavailable,
    CompositionRefused,
    Conflict,
    ContextLengthExceeded,
    DeltaserveError,
    EngineFailed,
    EnsembleRefused,
    InvalidRequest,
    QueueFull,
    Reason,
    RequestTimeout,
    Unavailable,
)
from deltaserve_store.manifest import AdapterRecord, BaseRef
from deltaserve_store.names import NameEntry, NameMap
from deltatest.engine_fakes import FINGERPRINT, Rig, expected_tokens, make_rig, request
from deltatest.ensemble_oracle import expected_of_ensemble

pytestmark = pytest.mark.anyio

CONTENTS = {f"v{i}": float(i + 1) for i in range(40)}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Recorder:
    """Everything a metrics object hears."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.requests: list[tuple[RequestStats, tuple[str, ...], str]] = []
        self.loads: list[tuple[str, str]] = []
        self.evictions: list[tuple[str, str]] = []

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_request(self, stats: RequestStats, adapter_labels: tuple[str, ...], kind: str) -> None:
        self.requests.append((stats, adapter_labels, kind))

    def on_adapter_load(self, source: str, outcome: str, seconds: float) -> None:
        self.loads.append((source, outcome))

    def on_adapter_eviction(self, level: str, reason: str) -> None:
        self.evictions.append((level, reason))


@asynccontextmanager
async def serving(rig: Rig, **options: Any) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(rig.engine, check_each_step=True, **options)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def tokens_of(stream: RequestStream) -> list[int]:
    return [token async for output in stream for delta in output.deltas for token in delta.token_ids]


def solo(req: GenerationRequest) -> list[int]:
    parts = [(CONTENTS[part.version], part) for part in req.binding.parts]
    return expected_tokens(req.prompt_ids, parts, req.sampling.max_tokens)


async def eventually(condition: Any, seconds: float = 1.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        await asyncio.sleep(0.005)


async def test_streams_equal_solo_runs_and_metrics_hear_of_them() -> None:
    rig, metrics = make_rig(contents=CONTENTS), Recorder()
    async with serving(rig, metrics=metrics) as engine:
        requests = [request(f"r{i}", [i, 2, 3], *([f"v{i}"] if i % 2 else []), max_tokens=9) for i in range(6)]
        results = await asyncio.gather(*(tokens_of(engine.submit(req)) for req in requests))
        assert results == [solo(req) for req in requests]
        await eventually(lambda: len(metrics.requests) == 6)
        assert engine.status().num_running == 0
    assert sorted(kind for _, _, kind in metrics.requests) == ["adapter"] * 3 + ["base"] * 3
    for stats, labels, kind in metrics.requests:
        assert stats.outcome is FinishReason.LENGTH
        assert stats.num_completion_tokens == 9
        assert len(stats.itl_seconds) == 8
        assert stats.ttft_seconds is not None
        assert 0 <= stats.queue_seconds <= stats.ttft_seconds <= stats.e2e_seconds
        assert len(labels) == (kind == "adapter")
        if kind == "adapter":
            assert 0 < stats.adapter_wait_seconds <= stats.queue_seconds + 0.01
    assert metrics.loads.count(("disk", "ok")) == 3
    assert sum(step.num_prefill_tokens for step in metrics.steps) == 18
    assert sum(step.num_decode_tokens for step in metrics.steps) == 48


async def test_a_stalled_load_leaves_the_steps_of_others_running() -> None:
    rig = make_rig(contents=CONTENTS)
    gate = rig.loader.gates["v1"] = threading.Event()
    async with serving(rig) as engine:
        stalled = asyncio.create_task(tokens_of(engine.submit(request("slow", [1, 2], "v1", max_tokens=3))))
        began = time.monotonic()
        other = request("fast", [1, 2], max_tokens=60)
        assert await tokens_of(engine.submit(other)) == solo(other)
        assert time.monotonic() - began < 2
        assert not stalled.done()
        assert engine.status().adapters[0].state is AdapterState.LOADING
        gate.set()
        assert await stalled == solo(request("slow", [1, 2], "v1", max_tokens=3))
    assert rig.loader.threads
    assert all(name.startswith("deltaserve-load") for name in rig.loader.threads)


async def test_waiting_for_a_load_does_not_spin() -> None:
    rig = make_rig(contents=CONTENTS)
    gate = rig.loader.gates["v1"] = threading.Event()
    steps = 0
    original = rig.engine.step

    def counted() -> Any:
        nonlocal steps
        steps += 1
        return original()

    rig.engine.step = counted  # type: ignore[method-assign]
    async with serving(rig) as engine:
        await asyncio.sleep(0.2)
        assert steps == 0  # idle: it sleeps until a message comes
        task = asyncio.create_task(tokens_of(engine.submit(request("a", [1], "v1"))))
        await asyncio.sleep(0.5)
        assert 1 <= steps < 20
        gate.set()
        began = time.monotonic()
        await task
        assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("phase", ["queued", "loading", "prefilling", "decoding"])
@pytest.mark.parametrize("how", ["abort", "aclose", "cancel"])
async def test_leaving_early_frees_everything_within_a_second(phase: str, how: str) -> None:
    rig = make_rig(contents=CONTENTS, max_num_seqs=1 if phase == "queued" else 4, max_num_batched_tokens=8)
    rig.runner.before_step = lambda: time.sleep(0.002)
    if phase == "loading":
        rig.loader.gates["v1"] = threading.Event()
    async with serving(rig) as engine:
        blocker = engine.submit(request("blocker", [1], max_tokens=200)) if phase == "queued" else None
        prompt = [1] * (200 if phase == "prefilling" else 3)
        stream = engine.submit(request("a", prompt, *(["v1"] if phase == "loading" else []), max_tokens=50))
        reader = asyncio.create_task(tokens_of(stream))
        await asyncio.sleep(0.02)
        if phase == "decoding":
            await eventually(lambda: rig.engine.num_running == 1)
        if how == "abort":
            stream.abort()
            stream.abort()
            await reader
        elif how == "aclose":
            await stream.aclose()
            await reader
        else:
            async with stream:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
        if blocker is not None:
            blocker.abort()
        await eventually(lambda: rig.blocks.num_used == 0 and not rig.engine.open_ids)
        if phase == "loading":
            rig.loader.gates["v1"].set()


async def test_the_queue_is_bounded() -> None:
    rig = make_rig(max_num_seqs=1, max_queue=3)
    rig.runner.before_step = lambda: time.sleep(0.005)
    async with serving(rig) as engine:
        streams = [engine.submit(request("first", [1], max_tokens=30))]
        await eventually(lambda: rig.engine.num_unstarted == 0 and rig.engine.num_running == 1)
        streams += [engine.submit(request(f"r{i}", [1], max_tokens=2)) for i in range(3)]
        with pytest.raises(QueueFull, match="3 requests are waiting") as caught:
            engine.submit(request("one too many", [1]))
        assert caught.value.retry_after_seconds is not None
        assert caught.value.retry_after_seconds >= 1
        await asyncio.gather(*(tokens_of(stream) for stream in streams))
        assert len(await tokens_of(engine.submit(request("again", [1], max_tokens=2)))) == 2


async def test_limits_are_checked_before_anything_enters() -> None:
    rig = make_rig(max_model_len=64)
    async with serving(rig) as engine:
        with pytest.raises(ContextLengthExceeded, match=r"60 tokens and max_tokens is 5: 65 tokens.*64 tokens"):
            engine.submit(request("a", [1] * 60, max_tokens=5))
        with pytest.raises(ContextLengthExceeded):
            engine.submit(request("a", [1] * 65, max_tokens=1))
        for bad, param in (
            (request("a", []), "prompt"),
            (request("a", [53]), "prompt"),
            (request("a", [-1]), "prompt"),
            (request("a", [1], n=0), "n"),
            (request("a", [1], temperature=float("nan")), "temperature"),
            (request("a", [1], temperature=float("inf")), "temperature"),
            (request("a", [1], top_p=0.0), "top_p"),
            (request("a", [1], min_p=2.0), "min_p"),
            (request("a", [1], repetition_penalty=0.0), "repetition_penalty"),
            (request("a", [1], logit_bias=((99, 1.0),)), "logit_bias"),
            (request("a", [1], logit_bias=((1, float("nan")),)), "logit_bias"),
            (request("a", [1], stop_token_ids=(53,)), "stop_token_ids"),
            (request("a", [1], min_tokens=20), "min_tokens"),
            (request("a", [1], *["v1", "v2", "v3", "v4", "v5"]), "adapters"),
            (request("a", [1], *["v1", "v2", "v1"]), "adapters"),
            (request("a", [1], binding=Binding((BindingPart("v1", float("nan")),))), "adapters[0].scale"),
            (request("a", [1], binding=Binding((BindingPart("v1"), BindingPart("v", 1.0, 1e39)))), "adapters[1].scale"),
            (request("a", [1], binding=Binding((BindingPart("v1", start_position=-1),))), "adapters"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                engine.submit(bad)
            assert caught.value.param == param
        assert len(await tokens_of(engine.submit(request("a", [1] * 60, max_tokens=4)))) == 4
        stream = engine.submit(request("same", [1], max_tokens=50))
        with pytest.raises(Conflict):
            engine.submit(request("same", [1]))
        stream.abort()


async def test_engine_failure_reaches_every_open_request_and_status() -> None:
    rig = make_rig(contents=CONTENTS, max_num_seqs=2)
    rig.loader.gates["v1"] = threading.Event()
    engine = AsyncEngine(rig.engine)
    await engine.start()
    streams = [engine.submit(request(f"r{i}", [1], max_tokens=200)) for i in range(4)]
    streams.append(engine.submit(request("loading", [1], "v1")))
    readers = [asyncio.create_task(tokens_of(stream)) for stream in streams]
    probe = asyncio.create_task(engine.probe((1, 2), Binding()))
    preload = asyncio.create_task(engine.preload("v1"))
    await asyncio.sleep(0.05)

    def explode() -> None:
        raise MemoryError("no room in /srv/models/base/weights for it")

    rig.runner.before_step = explode
    results = await asyncio.wait_for(asyncio.gather(*readers, probe, preload, return_exceptions=True), 5)
    assert len(results) == 7
    for result in results:
        assert isinstance(result, EngineFailed)
        assert "MemoryError: no room in <path> for it" in result.message
    status = engine.status()
    assert not status.is_alive
    assert status.error is not None
    with pytest.raises(EngineFailed):
        engine.submit(request("late", [1]))
    with pytest.raises(EngineFailed):
        await engine.probe((1,), Binding())
    rig.loader.gates["v1"].set()
    await engine.stop()


async def test_a_deadline_is_kept_while_running_and_while_blocked() -> None:
    rig = make_rig(contents=CONTENTS)
    rig.loader.gates["v1"] = threading.Event()
    rig.runner.before_step = lambda: time.sleep(0.005)
    async with serving(rig) as engine:
        for versions in ([], ["v1"]):
            began = time.monotonic()
            with pytest.raises(RequestTimeout):
                await tokens_of(engine.submit(request("a", [1], *versions, max_tokens=250, deadline_seconds=0.2)))
            assert 0.15 < time.monotonic() - began < 1.2
        rig.loader.gates["v1"].set()


async def test_draining_finishes_open_requests_and_refuses_new_ones() -> None:
    rig = make_rig()
    rig.runner.before_step = lambda: time.sleep(0.002)
    engine = AsyncEngine(rig.engine)
    await engine.start()
    req = request("a", [1], max_tokens=30)
    reader = asyncio.create_task(tokens_of(engine.submit(req)))
    await asyncio.sleep(0.01)
    stopping = asyncio.create_task(engine.stop(drain_seconds=5))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        engine.submit(request("b", [1]))
    assert engine.status().is_draining
    assert await reader == solo(req)
    await asyncio.wait_for(stopping, 2)
    assert engine.status().error is None


async def test_a_drain_that_takes_too_long_tells_what_is_still_open() -> None:
    rig = make_rig()
    rig.runner.before_step = lambda: time.sleep(0.01)
    engine = AsyncEngine(rig.engine)
    await engine.start()
    reader = asyncio.create_task(tokens_of(engine.submit(request("a", [1], max_tokens=250))))
    await asyncio.sleep(0.02)
    await asyncio.wait_for(engine.stop(drain_seconds=0.1), 2)
    with pytest.raises(Unavailable):
        await reader


def record(name: str, version: str, fingerprint: str = FINGERPRINT, state: str = "stored") -> AdapterRecord:
    return AdapterRecord(
        name, version, "default", ("lora",), "peft-lora", 1, 64, 16, 0.0, BaseRef(fingerprint), state=state
    )


def name_map(**current: AdapterRecord) -> NameMap:
    entries = {name: NameEntry(entry.version, {entry.version: entry}) for name, entry in current.items()}
    return NameMap(("base",), {"default": entries})


async def test_a_candidate_changes_nothing_about_other_versions() -> None:
    rig = make_rig(contents=CONTENTS)
    async with serving(rig) as engine:
        engine.publish(name_map(alien=record("alien", "v2", "0" * 64)))
        engine._thread.send(messages.AddCandidate("v1"))
        engine._thread.send(messages.DropCandidate("v1"))
        with pytest.raises(AdapterUnavailable, match="another base"):
            await tokens_of(engine.submit(request("c", [1], "v2")))
    assert rig.loader.loads == []


async def test_publish_resolve_retire_and_incompatible() -> None:
    rig, metrics = make_rig(contents=CONTENTS), Recorder()
    rig.runner.before_step = lambda: time.sleep(0.002)
    async with serving(rig, metrics=metrics) as engine:
        engine.publish(name_map(poet=record("poet", "v1"), alien=record("alien", "v2", "0" * 64)))
        assert engine.resolve("default", "poet").version == "v1"
        assert engine.resolve("default", "base").is_base
        req = request("a", [1, 2], "v1", max_tokens=40)
        stream = engine.submit(req)
        await anext(stream)
        # The name moves and the old version goes: the running request keeps it to the end.
        engine.publish(name_map(poet=record("poet", "v3"), alien=record("alien", "v2", "0" * 64)))
        rest = await tokens_of(stream)
        assert rest == solo(req)[1:]
        await eventually(lambda: rig.residency.state("v1") is AdapterState.RETIRED)
        with pytest.raises(AdapterUnavailable, match="no longer served"):
            await tokens_of(engine.submit(request("b", [1], "v1")))
        with pytest.raises(AdapterUnavailable, match="another base"):
            await tokens_of(engine.submit(request("c", [1], "v2")))
        states = {adapter.version: adapter.state for adapter in engine.status().adapters}
        assert states == {
            "v1": AdapterState.RETIRED,
            "v2": AdapterState.INCOMPATIBLE,
            "v3": AdapterState.STORED,
        }
        # Back again: rolled back to the same bytes.
        engine.publish(name_map(poet=record("poet", "v1")))
        assert await tokens_of(engine.submit(request("d", [1, 2], "v1", max_tokens=5))) == solo(req)[:5]
    assert metrics.requests[0][1:] == (("poet",), "adapter")
    assert ("device", "retired") in metrics.evictions


async def test_preload_unload_and_a_failed_load() -> None:
    rig = make_rig(contents=CONTENTS, retry_seconds=0.2)
    async with serving(rig) as engine:
        await engine.preload("v1")
        assert rig.residency.state("v1") is AdapterState.READY
        await engine.unload("v1")
        await eventually(lambda: rig.residency.state("v1") is AdapterState.STORED)
        rig.loader.errors["v2"] = OSError(5, "Input/output error", "/srv/store/secret")
        with pytest.raises(AdapterUnavailable, match="Input/output error") as caught:
            await engine.preload("v2")
        assert "/srv" not in caught.value.message
        with pytest.raises(AdapterUnavailable):
            await tokens_of(engine.submit(request("a", [1], "v2")))
        assert rig.loader.loads.count("v2") == 1  # not tried again at once
        del rig.loader.errors["v2"]
        await asyncio.sleep(0.25)
        assert await tokens_of(engine.submit(request("b", [1], "v2"))) == solo(request("b", [1], "v2"))


class CandidateLoader:
    """Stands for FoldedLoader: candidates by prefix, and versions that must be prepared first."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.paths: dict[str, Path] = {}
        self.unprepared: set[str] = set()

    def register(self, version: str, path: Path) -> None:
        self.paths["candidate:" + version] = path

    def unregister(self, version: str) -> None:
        self.paths.pop("candidate:" + version, None)

    def has_candidate(self, version: str) -> bool:
        return "candidate:" + version in self.paths

    def load(self, version: str) -> Any:
        if version in self.unprepared:
            raise NotPrepared(version)
        return self.rig.loader.load(version.removeprefix("candidate:"))


def with_candidates(rig: Rig) -> CandidateLoader:
    loader = CandidateLoader(rig)
    rig.residency.workers._loader = loader
    return loader


async def test_probing_a_candidate_and_a_published_version() -> None:
    rig = make_rig(contents=CONTENTS)
    loader: Any = with_candidates(rig)
    async with serving(rig, loader=loader) as engine:
        ids, binding = (1, 2, 3, 4), Binding((BindingPart("v1"),))
        engine.register_candidate("v1", Path("somewhere"))
        logits = await engine.probe(ids, binding)
        rows = np.frombuffer(logits.data, dtype=np.float32).reshape(logits.num_tokens, logits.vocab_size)
        assert [int(rows[-1].argmax())] == solo(request("a", ids, "v1", max_tokens=1))
        engine.unregister_candidate("v1")
        engine.unregister_candidate("v1")
        await eventually(lambda: rig.residency.pool.num_free_slots == 4)
        assert engine.status().adapters == ()
        again = await engine.probe(ids, binding)  # now as published
        assert again.data == logits.data
        rig.loader.errors["v7"] = ValueError("damaged")
        with pytest.raises(AdapterUnavailable, match="damaged"):
            await engine.probe(ids, Binding((BindingPart("v7"),)))
        with pytest.raises(ContextLengthExceeded):
            await engine.probe((1,) * 300, Binding())


async def test_a_version_without_folded_file_is_prepared_off_the_loop_and_may_probe() -> None:
    rig = make_rig(contents=CONTENTS)
    loader: Any = with_candidates(rig)
    loader.unprepared = {"v1", "v2"}
    async with serving(rig, loader=loader) as engine:
        prepared: list[str] = []

        async def prepare(version: str) -> None:
            engine.register_candidate(version, Path("somewhere"))
            await engine.probe((1, 2, 3), Binding((BindingPart(version),)))  # a proof goes through the engine itself
            engine.unregister_candidate(version)
            prepared.append(version)
            if version == "v1":
                loader.unprepared.discard(version)

        engine.on_prepare = prepare
        req = request("a", [1, 2], "v1", max_tokens=4)
        assert await asyncio.wait_for(tokens_of(engine.submit(req)), 5) == solo(req)
        assert prepared == ["v1"]
        with pytest.raises(AdapterUnavailable):  # prepared, and still not there: fails instead of going round
            await asyncio.wait_for(tokens_of(engine.submit(request("b", [1], "v2"))), 5)
        assert prepared == ["v1", "v2"]
        engine.on_prepare = None
        loader.unprepared.add("v3")
        with pytest.raises(AdapterUnavailable, match="nothing here can make it"):
            await asyncio.wait_for(tokens_of(engine.submit(request("c", [1], "v3"))), 5)


async def test_two_versions_being_prepared_leave_room_for_the_loads_of_their_proofs() -> None:
    rig = make_rig(contents=CONTENTS)
    loader: Any = with_candidates(rig)
    loader.unprepared = {"v1", "v2", "v3"}
    async with serving(rig, loader=loader) as engine:

        async def prepare(version: str) -> None:
            await asyncio.sleep(0.02)
            engine.register_candidate(version, Path("somewhere"))
            await engine.probe((1, 2, 3), Binding((BindingPart(version),)))
            engine.unregister_candidate(version)
            loader.unprepared.discard(version)

        engine.on_prepare = prepare
        requests = [request(f"r{i}", [1, 2], f"v{i}", max_tokens=4) for i in (1, 2, 3)]
        results = await asyncio.wait_for(asyncio.gather(*(tokens_of(engine.submit(req)) for req in requests)), 10)
        assert results == [solo(req) for req in requests]


async def test_a_stop_string_found_outside_ends_the_sequence() -> None:
    rig = make_rig()
    rig.runner.before_step = lambda: time.sleep(0.002)
    async with serving(rig) as engine:
        stream = engine.submit(request("a", [1, 2], max_tokens=200))
        await anext(stream)
        stream.stop(0)
        outputs = [output async for output in stream]
        assert outputs[-1].is_finished
        assert outputs[-1].deltas[0].finish_reason is FinishReason.STOP
        stream.stop(0)


async def test_an_ensemble_streams_as_one_and_is_measured_as_a_kind_of_its_own() -> None:
    rig, metrics = make_rig(contents=CONTENTS), Recorder()
    member = Member(Binding((BindingPart("v1"),)), 0.5)
    both = Ensemble((member, Member(Binding((BindingPart("v2"), BindingPart("v1"))), 0.5)))
    async with serving(rig, metrics=metrics) as engine:
        asked = replace(request("a", [1, 2, 3], max_tokens=9), ensemble=both)
        assert await tokens_of(engine.submit(asked)) == expected_of_ensemble([1, 2, 3], both, CONTENTS, 9)
        stream = engine.submit(replace(asked, request_id="b", sampling=replace(asked.sampling, max_tokens=200)))
        await anext(stream)
        stream.abort()
        await eventually(lambda: len(metrics.requests) == 2)
        assert engine.status().num_running == engine.status().num_blocks_used == 0
        with pytest.raises(EnsembleRefused, match="17 members; 1 to 16"):
            engine.submit(replace(asked, request_id="c", ensemble=Ensemble((member,) * 17)))
        assert [engine.max_row_len(num_rows) for num_rows in (1, 4, 5, 64, 65)] == [256, 256, 192, 16, 0]
        longest = replace(asked, sampling=replace(asked.sampling, max_tokens=192 - 3))
        five = replace(longest, request_id="d", ensemble=Ensemble((member,) * 5))
        engine.submit(five).abort()
        with pytest.raises(EnsembleRefused, match="72 blocks"):
            engine.submit(replace(five, request_id="e", ensemble=Ensemble((member,) * 6)))
    (stats, labels, kind), *_ = metrics.requests
    assert (kind, len(labels), stats.num_completion_tokens) == ("ensemble", 2, 9)


def test_everything_that_crosses_pickles_and_is_frozen() -> None:
    binding = Binding((BindingPart("v", 0.5, 1.5, 3),))
    ensemble = Ensemble((Member(binding, 0.5),), Mix.PROBABILITIES)
    req = GenerationRequest("id", (1, 2), SamplingParams(logit_bias=((1, 2.0),)), binding, ensemble=ensemble)
    output = RequestOutput("id", (SequenceDelta(0, (1,), (TokenLogprob(1, -0.5, ((1, -0.5),)),)),))
    crossing: list[Any] = [
        messages.Submit(req, 1.0),
        messages.Probe("p", (1,), binding, 1.0),
        messages.Abort("id"),
        messages.StopSequence("id", 0),
        messages.Publish(("a",), ("b",), {"c": "why"}, {"a": "name"}),
        messages.AddCandidate("v"),
        messages.DropCandidate("v"),
        messages.Preload("v"),
        messages.Unload("v"),
        messages.Retire("v"),
        messages.Wake(),
        messages.Shutdown("why"),
        messages.Probed("p", Logits(1, 2, b"12345678")),
        messages.Settled("v"),
        output,
        EngineStatus(True, False, 0, 0, 0, 1, (AdapterStatus("v", AdapterState.READY),)),
        name_map(poet=record("poet", "v1")),
    ]
    for message in crossing:
        assert pickle.loads(pickle.dumps(message)) == message  # noqa: S301
        fields = message._fields if isinstance(message, tuple) else message.__dataclass_fields__
        field = next(iter(fields), None)
        if field is not None:
            with pytest.raises(AttributeError):
                setattr(message, field, None)
    assert {type(message) for message in crossing} >= set(messages.Message.__args__)
    errors: list[DeltaserveError] = [
        AdapterUnavailable("why", retry_after_seconds=2.0),
        EngineFailed("why"),
        CompositionRefused("why", param="adapters", reasons=[Reason("code", "where", "found", "allowed")]),
    ]
    delivery = messages.Delivery((output,), tuple(messages.Failed("id", error) for error in errors), ended=errors[1])
    copy = pickle.loads(pickle.dumps(delivery))  # noqa: S301
    assert copy.outputs == delivery.outputs
    assert [f.error.body() for f in copy.failed] == [error.body() for error in errors]
    assert copy.failed[0].error.retry_after_seconds == 2.0
