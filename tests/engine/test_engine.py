"""The engine on fakes: what comes out equals each sequence computed alone, whatever shares its steps."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from deltaserve.core import AdapterState, Binding, BindingPart, FinishReason, GenerationRequest
from deltaserve.deltas import composition
from deltaserve.errors import AdapterUnavailable, CompositionRefused, DeltaserveError, RequestTimeout
from deltatest.engine_fakes import expected_tokens, make_rig, request

CONTENTS = {f"v{i}": float(i + 1) for i in range(40)}


def solo(req: GenerationRequest, num_tokens: int | None = None, stops: tuple[int, ...] = ()) -> list[int]:
    parts = [(CONTENTS[part.version], part) for part in req.binding.parts]
    return expected_tokens(req.prompt_ids, parts, num_tokens or req.sampling.max_tokens, stops)


def prompts(count: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(53) for _ in range(rng.randint(low, high))] for _ in range(count)]


def test_one_request_alone() -> None:
    rig = make_rig()
    req = request("a", [1, 2, 3], max_tokens=20)
    assert rig.run(req) == {"a": [solo(req)]}
    assert rig.blocks.num_used == 0


def test_a_mixed_batch_equals_each_row_alone() -> None:
    rig = make_rig(contents=CONTENTS, num_slots=8)
    requests = [
        request(f"r{i}", prompt, *([] if i % 3 == 0 else [f"v{i % 8}"]), max_tokens=5 + i % 17)
        for i, prompt in enumerate(prompts(30, 1, 60))
    ]
    tokens = rig.run(*requests)
    assert tokens == {req.request_id: [solo(req)] for req in requests}
    assert rig.runner.max_step_tokens <= 64


def test_composed_bindings_and_late_parts() -> None:
    rig = make_rig(contents=CONTENTS)
    bindings = [
        Binding((BindingPart("v1"), BindingPart("v2", 0.5, 2.0))),
        Binding((BindingPart("v2", 0.5, 2.0), BindingPart("v1"))),
        Binding((BindingPart("v1", start_position=20),)),
        Binding((BindingPart("v1", start_position=34), BindingPart("v3"))),
    ]
    prompt = list(range(40))
    requests = [request(f"r{i}", prompt, binding=binding, max_tokens=12) for i, binding in enumerate(bindings)]
    assert rig.run(*requests) == {req.request_id: [solo(req)] for req in requests}
    # Again, with all prefixes cached.
    requests = [request(f"s{i}", prompt, binding=binding, max_tokens=12) for i, binding in enumerate(bindings)]
    assert rig.run(*requests) == {req.request_id: [solo(req)] for req in requests}


def test_a_composition_with_a_part_that_fails_holds_nothing_and_names_it() -> None:
    rig = make_rig(contents=CONTENTS)
    rig.loader.errors["v2"] = ValueError("broken")
    rig.engine.add(request("bad", [1, 2], "v1", "v2", "v3"), rig.engine.clock())
    with pytest.raises(AdapterUnavailable, match="broken") as caught:
        rig.finish({"bad": 1})
    assert caught.value.param == "adapters[1].id"
    assert not any(status.num_pins for status in rig.residency.status())
    good = request("good", [1, 2], "v3", "v1")
    assert rig.run(good) == {"good": [solo(good)]}


def test_a_composition_that_is_refused_is_loaded_once_and_evicts_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "RULES", {})  # every kind is served alone
    rig = make_rig(contents=CONTENTS, num_slots=2, host_adapters=8)
    for turn in range(3):
        with pytest.raises(CompositionRefused, match="no other adapter"):
            rig.run(request(f"bad{turn}", [1, 2], "v1", "v2"))
        rig.run(request(f"good{turn}", [1, 2], "v3"), request(f"fine{turn}", [1, 2], "v4"))
    assert sorted(rig.loader.loads) == ["v1", "v2", "v3", "v4"]
    ready = {status.version for status in rig.residency.status() if status.state is AdapterState.READY}
    assert ready == {"v3", "v4"}
    # A proof uses what strength it needs; a request for it is refused.
    half = Binding((BindingPart("v3", 0.5, 0.5),))
    with pytest.raises(CompositionRefused, match="strength 0 or 1"):
        rig.run(request("half", [1, 2], binding=half))
    rig.engine.add_probe("probe", (1, 2), half, rig.engine.clock())
    outcome = rig.engine.step()
    assert [probe_id for probe_id, _ in outcome.probes] == ["probe"]


def test_forced_preemption_changes_nothing() -> None:
    requests = [
        request(f"r{i}", prompt, *([] if i % 2 else [f"v{i % 5}"]), max_tokens=40)
        for i, prompt in enumerate(prompts(10, 1, 40))
    ]
    tight = make_rig(contents=CONTENTS, num_blocks=6, num_slots=5, max_model_len=96)
    for req in requests:
        tight.engine.add(req, tight.engine.clock())
    num_preempted = 0
    tokens: dict[str, list[int]] = {req.request_id: [] for req in requests}
    while tight.engine.open_ids:
        outcome = tight.engine.step()
        tight.engine.check_integrity()
        num_preempted += outcome.stats.num_preempted if outcome.stats else 0
        for output in outcome.outputs:
            for delta in output.deltas:
                tokens[output.request_id] += delta.token_ids
    assert num_preempted >= 3  # how often exactly depends on when the adapters arrive
    assert tokens == {req.request_id: solo(req) for req in requests}


def test_seeded_samples_do_not_depend_on_company_or_preemption() -> None:
    sampled = [
        request(f"r{i}", prompt, max_tokens=24, temperature=1.0, seed=7 + i, top_p=0.9, frequency_penalty=0.3)
        for i, prompt in enumerate(prompts(6, 3, 30))
    ]
    alone: dict[str, list[list[int]]] = {}
    for req in sampled:
        alone |= make_rig().run(req)
    together = make_rig(num_blocks=6, max_model_len=96).run(*sampled)
    assert together == alone
    other_seed = make_rig().run(request("r0", sampled[0].prompt_ids, max_tokens=24, temperature=1.0, seed=99))
    assert other_seed["r0"] != alone["r0"]


def test_n_sequences_share_the_prompt_and_sample_their_own() -> None:
    rig = make_rig()
    prompt = list(range(40))
    req = request("a", prompt, n=4, max_tokens=10, temperature=1.0, seed=3)
    tokens = rig.run(req)["a"]
    assert len({tuple(seq) for seq in tokens}) == 4
    for index in range(4):
        alone = make_rig().run(request("b", prompt, max_tokens=10, temperature=1.0, seed=3 + index))["b"][0]
        assert tokens[index] == alone
    # 40 tokens once, then only what lies beyond the last full block for each of the three siblings.
    computed = [position for position in rig.runner.kv if position is not None]
    assert len(computed) <= 40 + 4 * 24


def test_stop_tokens_and_ignore_eos() -> None:
    free = solo(request("a", [5, 6, 7], max_tokens=30))
    stop = free[6]
    length = free.index(stop)
    rig = make_rig()
    rig.engine.add(request("eos", [5, 6, 7], max_tokens=30, eos=[stop]), rig.engine.clock())
    rig.engine.add(request("stop", [5, 6, 7], max_tokens=30, stop_token_ids=(stop,), ignore_eos=True), 0.0)
    rig.engine.add(request("ignore", [5, 6, 7], max_tokens=30, eos=[stop], ignore_eos=True), rig.engine.clock())
    ends: dict[str, tuple[FinishReason | None, int | None]] = {}
    tokens: dict[str, list[int]] = {"eos": [], "stop": [], "ignore": []}
    while rig.engine.open_ids:
        for output in rig.engine.step().outputs:
            for delta in output.deltas:
                tokens[output.request_id] += delta.token_ids
                if delta.finish_reason:
                    ends[output.request_id] = (delta.finish_reason, delta.stop_token_id)
    assert ends == {
        "eos": (FinishReason.STOP, stop),
        "stop": (FinishReason.STOP, stop),
        "ignore": (FinishReason.LENGTH, None),
    }
    assert tokens == {"eos": free[:length], "stop": free[:length], "ignore": free}


def test_min_tokens_forbids_stops_until_then() -> None:
    free = solo(request("a", [5, 6, 7], max_tokens=30))
    tokens = make_rig().run(request("a", [5, 6, 7], max_tokens=30, eos=[free[0]], min_tokens=4))["a"][0]
    assert len(tokens) >= 4
    assert free[0] not in tokens[:4]


def test_prompt_logprobs_cover_every_prompt_token_despite_a_warm_cache() -> None:
    prompt = prompts(1, 150, 150)[0]
    rig = make_rig()
    rig.run(request("warm", prompt, max_tokens=2))
    rig.engine.add(request("a", prompt, max_tokens=3, prompt_logprobs=2, logprobs=1), rig.engine.clock())
    outputs = []
    while rig.engine.open_ids:
        outputs += rig.engine.step().outputs
    told = outputs[0].prompt_logprobs
    assert told is not None
    assert told[0] is None
    assert [entry.token_id for entry in told[1:] if entry] == prompt[1:]
    assert all(entry is not None and len(entry.top) == 2 for entry in told[1:])
    assert all(output.prompt_logprobs is None for output in outputs[1:])
    assert outputs[0].num_cached_tokens == 0
    for output in outputs:
        for delta in output.deltas:
            assert len(delta.logprobs) == 1
            assert delta.logprobs[0].token_id == delta.token_ids[0] == delta.logprobs[0].top[0][0]


def test_echo_alone_samples_nothing() -> None:
    rig = make_rig()
    rig.engine.add(request("a", [1, 2, 3], max_tokens=0, prompt_logprobs=0), 0.0)
    (output,) = rig.engine.step().outputs
    assert output.is_finished
    assert output.deltas[0].finish_reason is FinishReason.LENGTH
    assert output.deltas[0].token_ids == ()
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 3
    rig.engine.check_integrity()


def test_cached_prefix_is_reported_and_a_full_hit_still_computes_the_last_token() -> None:
    rig = make_rig()
    prompt = list(range(32))
    first = rig.run(request("a", prompt, max_tokens=4))["a"]
    rig.engine.add(request("b", prompt, max_tokens=4), rig.engine.clock())
    outputs = []
    while rig.engine.open_ids:
        outputs += rig.engine.step().outputs
    assert outputs[0].num_cached_tokens == 16  # the second block holds the last prompt token
    assert [t for o in outputs for d in o.deltas for t in d.token_ids] == first[0]


def test_a_growing_sequence_that_changes_its_rope_regime_is_computed_again() -> None:
    rig = make_rig(kv_regime=lambda length: int(length > 20))
    req = request("a", list(range(18)), max_tokens=10)
    rig.engine.add(req, 0.0)
    regimes: list[int] = []
    recomputed: list[int] = []
    original = rig.runner.execute

    def spy(batch):  # type: ignore[no-untyped-def]
        regimes.append(int(batch[0].length > 20))
        recomputed.append(batch[0].start)
        return original(batch)

    rig.runner.execute = spy  # type: ignore[method-assign]
    rig.finish({"a": 1})
    first_long = regimes.index(1)
    assert recomputed[first_long] == 0  # no block of the short regime was read under the long one
    assert sorted(regimes) == regimes


@pytest.mark.parametrize("phase", ["waiting", "loading", "prefilling", "decoding", "preempted"])
def test_abort_in_every_phase_frees_everything(phase: str) -> None:
    rig = make_rig(contents=CONTENTS, num_blocks=8, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=112)
    engine = rig.engine
    version = ["v1"] if phase == "loading" else []
    if phase == "loading":
        rig.loader.delays["v1"] = 0.2
    if phase in ("waiting", "preempted"):
        for i in range(2):
            engine.add(request(f"other{i}", [1, 2, 3], max_tokens=60), engine.clock())
    prompt = [1] * (60 if phase == "prefilling" else 5)
    engine.add(request("a", prompt, *version, max_tokens=40, n=1), engine.clock())
    for _ in range({"waiting": 1, "loading": 2, "prefilling": 2, "decoding": 5, "preempted": 3}[phase]):
        engine.step()
    if phase == "preempted":
        rig.scheduler._preempt(rig.scheduler.running[-1], rig.scheduler.schedule(0.0))
    engine.abort("a")
    engine.abort("a")
    for i in range(2):
        engine.abort(f"other{i}")
    engine.check_integrity()
    assert engine.open_ids == []
    assert rig.blocks.num_used == 0
    outcome = engine.step()
    assert {stats.outcome for stats, _ in outcome.finished} == {FinishReason.ABORT}
    assert outcome.outputs == []


def test_a_deadline_ends_a_request_with_an_error() -> None:
    now = [0.0]
    rig = make_rig()
    rig.engine.clock = lambda: now[0]
    rig.engine.add(request("a", [1], max_tokens=200, deadline_seconds=2.0), 0.0)
    rig.engine.step()
    rig.engine.expire()
    assert rig.engine.open_ids == ["a"]
    now[0] = 2.0
    rig.engine.expire()
    (failure,) = rig.engine.step().failures
    assert failure[0] == "a"
    assert isinstance(failure[1], RequestTimeout)
    rig.engine.check_integrity()


def test_a_stop_string_ends_one_sequence_and_the_others_go_on() -> None:
    rig = make_rig()
    rig.engine.add(request("a", [1, 2], n=2, max_tokens=6, temperature=1.0, seed=1), 0.0)
    for _ in range(3):
        rig.engine.step()
    rig.engine.stop("a", 0)
    outputs = []
    while rig.engine.open_ids:
        outputs += rig.engine.step().outputs
        rig.engine.check_integrity()
    ends = {d.index: d.finish_reason for o in outputs for d in o.deltas if d.finish_reason}
    assert ends == {0: FinishReason.STOP, 1: FinishReason.LENGTH}
    assert outputs[-1].is_finished


def test_logits_that_are_not_numbers_fail_their_own_request_only() -> None:
    rig = make_rig(contents={"v1": 1.0, "bad": 2.0})
    original = rig.runner.execute

    def poisoned(batch):  # type: ignore[no-untyped-def]
        rows = original(batch)
        bad = [i for i, item in enumerate(batch) if item.parts and rig.runner._content(item.parts[0].slot) == 2.0]
        if len(rows) == len(batch):
            rows[bad] = float("nan")
        return rows

    rig.runner.execute = poisoned  # type: ignore[method-assign]
    good = request("good", [1, 2, 3], max_tokens=12)
    rig.engine.add(good, 0.0)
    rig.engine.add(request("bad", [1, 2, 3], "bad", max_tokens=12), 0.0)
    failures: list[tuple[str, DeltaserveError]] = []
    tokens: list[int] = []
    while rig.engine.open_ids:
        outcome = rig.engine.step()
        rig.engine.check_integrity()
        failures += outcome.failures
        tokens += [t for o in outcome.outputs for d in o.deltas for t in d.token_ids]
    assert [(request_id, error.error_code) for request_id, error in failures] == [("bad", "non_finite_logits")]
    assert tokens == solo(good)


def test_a_probe_returns_logits_of_every_position_and_yields_to_requests() -> None:
    rig = make_rig(contents=CONTENTS, max_num_batched_tokens=32)
    probe_ids = tuple(range(48))
    rig.engine.add_probe("p", probe_ids, Binding((BindingPart("v1"),)), rig.engine.clock())
    req = request("a", list(range(40)), max_tokens=30)
    rig.engine.add(req, rig.engine.clock())
    probes, tokens = [], []
    while rig.engine.open_ids:
        outcome = rig.engine.step()
        rig.engine.check_integrity()
        probes += outcome.probes
        tokens += [t for o in outcome.outputs for d in o.deltas for t in d.token_ids]
    assert tokens == solo(req)
    ((name, logits),) = probes
    assert (name, logits.num_tokens, len(logits.data)) == ("p", 48, 48 * 53 * 4)
    # The probe left no prefix behind.
    rig.engine.add(request("b", probe_ids, "v1", max_tokens=1), rig.engine.clock())
    outputs = []
    while rig.engine.open_ids:
        outputs += rig.engine.step().outputs
    assert outputs[0].num_cached_tokens == 0


def test_probes_progress_under_a_constant_stream_of_requests() -> None:
    now = [0.0]
    rig = make_rig(max_num_seqs=2)
    rig.engine.clock = lambda: now[0]
    rig.engine.add_probe("p", tuple(range(20)), Binding(), 0.0)
    finished_at = None
    for step in range(400):
        while rig.engine.num_waiting < 4:
            rig.engine.add(request(f"r{step}-{rig.engine.num_waiting}", [1, 2], max_tokens=4), now[0])
        now[0] += 0.05
        if rig.engine.step().probes:
            finished_at = now[0]
            break
    assert finished_at is not None
    assert 2.0 <= finished_at < 4.0


def test_an_adapter_that_cannot_be_loaded_fails_its_requests_with_the_reason() -> None:
    rig = make_rig(contents=CONTENTS)
    rig.loader.errors["v1"] = ValueError("row pointers do not rise")
    with pytest.raises(AdapterUnavailable, match="row pointers do not rise") as caught:
        rig.run(request("a", [1], "v1"))
    assert caught.value.retry_after_seconds is not None
    rig.engine.check_integrity()
    assert rig.run(request("b", [1], max_tokens=2))["b"]


@pytest.mark.parametrize(
    "fields", [{}, {"n": 3}, {"logprobs": 2, "prompt_logprobs": 1}, {"stop_token_ids": (7, 11)}], ids=str
)
def test_an_answer_that_nobody_streams_is_told_once_and_equals_the_streamed_one(fields: dict[str, Any]) -> None:
    told: dict[bool, list[Any]] = {}
    for is_streamed in (True, False):
        rig = make_rig()
        asked = replace(
            request("a", [1, 2, 3], max_tokens=20, seed=5, temperature=1.0, **fields), is_streamed=is_streamed
        )
        rig.engine.add(asked, rig.engine.clock())
        told[is_streamed] = []
        while rig.engine.open_ids:
            told[is_streamed] += rig.engine.step().outputs
    (whole,) = told[False]
    assert whole.is_finished
    assert sorted(delta.index for delta in whole.deltas) == list(range(asked.n))
    for delta in whole.deltas:
        pieces = [piece for output in told[True] for piece in output.deltas if piece.index == delta.index]
        assert len(pieces) > 1
        assert delta.token_ids == tuple(token for piece in pieces for token in piece.token_ids)
        assert delta.logprobs == tuple(entry for piece in pieces for entry in piece.logprobs)
        assert delta[3:] == pieces[-1][3:]
    assert whole.prompt_logprobs == told[True][0].prompt_logprobs


def test_a_sequence_ended_from_outside_is_part_of_an_answer_told_once() -> None:
    rig = make_rig()
    rig.engine.add(replace(request("a", [1, 2, 3], max_tokens=9, n=2), is_streamed=False), rig.engine.clock())
    outputs = [*rig.engine.step().outputs, *rig.engine.step().outputs, *rig.engine.step().outputs]
    rig.engine.stop("a", 1)
    while rig.engine.open_ids:
        outputs += rig.engine.step().outputs
    (whole,) = outputs
    assert {delta.index: delta.finish_reason for delta in whole.deltas} == {0: "length", 1: "stop"}
    assert 0 < len(whole.deltas[1].token_ids) < 9
