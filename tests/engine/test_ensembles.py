"""Ensembles on the fake model: what comes out equals the members computed one by one and mixed offline, whatever
happens around them; and their rows start, advance and end together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from deltaserve.core import (
    BASE_BINDING,
    Binding,
    BindingPart,
    Ensemble,
    FinishReason,
    GenerationRequest,
    Member,
    Mix,
    RequestOutput,
)
from deltaserve.deltas import composition
from deltaserve.engine.batch import ScheduledSequence
from deltaserve.errors import (
    AdapterUnavailable,
    CompositionRefused,
    ContextLengthExceeded,
    DeltaserveError,
    EnsembleRefused,
    InvalidRequest,
    RequestTimeout,
)
from deltatest.engine_fakes import Rig, expected_tokens, make_rig, request
from deltatest.ensemble_oracle import expected_of_ensemble, mixed_after

CONTENTS = {f"v{i}": float(i + 1) for i in range(20)}
PROMPT = list(range(40))


def bound(*versions: str) -> Binding:
    return Binding(tuple(BindingPart(version) for version in versions))


def ensemble(*members: tuple[Binding, float], mix: Mix = Mix.LOGITS) -> Ensemble:
    return Ensemble(tuple(Member(binding, weight) for binding, weight in members), mix)


PAIR = ensemble((bound("v1"), 0.5), (bound("v2"), 0.5))
TRIO = ensemble((bound("v1", "v3"), 0.7), (BASE_BINDING, -0.4), (Binding((BindingPart("v2", 0.5, 2.0, 20),)), 0.9))
MEAN = ensemble((bound("v1"), 2.0), (BASE_BINDING, 1.0), (bound("v4"), 0.5), mix=Mix.PROBABILITIES)
ALL = {"pair": PAIR, "trio": TRIO, "mean": MEAN}


def ask(request_id: str, prompt: Sequence[int], models: Ensemble, **fields: Any) -> GenerationRequest:
    return replace(request(request_id, prompt, **fields), ensemble=models)


def rows_of(models: Ensemble, tokens: Sequence[int]) -> np.ndarray:
    return mixed_after(models, CONTENTS, tokens)


def solo(req: GenerationRequest, num_tokens: int | None = None) -> list[int]:
    """Greedy, one member after the other."""
    if req.ensemble is None:
        parts = [(CONTENTS[part.version], part) for part in req.binding.parts]
        return expected_tokens(req.prompt_ids, parts, num_tokens or req.sampling.max_tokens)
    return expected_of_ensemble(req.prompt_ids, req.ensemble, CONTENTS, num_tokens or req.sampling.max_tokens)


def outputs_of(rig: Rig, *requests: GenerationRequest) -> list[RequestOutput]:
    for req in requests:
        rig.engine.check(req)
        rig.engine.add(req, rig.engine.clock())
    outputs: list[RequestOutput] = []
    while rig.engine.open_ids:
        outcome = rig.engine.step()
        rig.engine.check_integrity()
        assert not outcome.failures
        outputs += outcome.outputs
    return outputs


def watch(rig: Rig) -> list[dict[int, ScheduledSequence]]:
    """What each step computed, by sequence id."""
    steps: list[dict[int, ScheduledSequence]] = []
    original = rig.runner.execute

    def spy(batch: list[ScheduledSequence]) -> Any:
        steps.append({item.seq_id: replace(item, token_ids=list(item.token_ids)) for item in batch})
        return original(batch)

    rig.runner.execute = spy  # type: ignore[method-assign]
    return steps


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("budget", [64, 7, 3])
def test_greedy_equals_the_offline_mix(name: str, budget: int) -> None:
    rig = make_rig(contents=CONTENTS, max_num_batched_tokens=budget)
    for length in (1, 40):
        req = ask(f"of {length}", PROMPT[:length], ALL[name], max_tokens=12)
        assert rig.run(req) == {req.request_id: [solo(req)]}
    assert rig.blocks.num_used == 0
    assert not any(status.num_pins for status in rig.residency.status())


@pytest.mark.parametrize("mix", Mix)
def test_one_member_is_the_plain_request_to_the_bit(mix: Mix) -> None:
    for fields in (
        {"logprobs": 3},
        {"temperature": 1.0, "seed": 5, "top_p": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    ):
        plain = outputs_of(make_rig(contents=CONTENTS), request("a", PROMPT, "v1", max_tokens=20, **fields))  # type: ignore[arg-type]
        one = ensemble((bound("v1"), 1.0), mix=mix)
        alone = outputs_of(make_rig(contents=CONTENTS), ask("a", PROMPT, one, max_tokens=20, **fields))
        assert [o.deltas[0][:2] for o in alone] == [o.deltas[0][:2] for o in plain]
        if mix is Mix.LOGITS:
            assert alone == plain


@pytest.mark.parametrize("mix", Mix)
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.8), (1 / 3, 1 / 3, 1 / 3)])
def test_members_that_agree_give_what_each_gives(mix: Mix, weights: tuple[float, ...]) -> None:
    fields: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0, "seed": 3, "logprobs": 2, "repetition_penalty": 1.2}
    plain = outputs_of(make_rig(contents=CONTENTS), request("a", PROMPT, "v1", **fields))
    twice = ensemble(*[(bound("v1"), weight) for weight in weights], mix=mix)
    agreed = outputs_of(make_rig(contents=CONTENTS), ask("a", PROMPT, twice, **fields))
    assert [o.deltas[0].token_ids for o in agreed] == [o.deltas[0].token_ids for o in plain]
    for one, other in zip(agreed, plain, strict=True):
        (first,), (second,) = one.deltas[0].logprobs, other.deltas[0].logprobs
        assert first.logprob == pytest.approx(second.logprob, abs=1e-5)


def test_scores_are_of_the_mix() -> None:
    for models in ALL.values():
        rig = make_rig(contents=CONTENTS)
        outputs = outputs_of(rig, ask("a", PROMPT, models, max_tokens=5, logprobs=2, prompt_logprobs=1))
        tokens = list(PROMPT)
        told = outputs[0].prompt_logprobs
        assert told is not None
        assert told[0] is None
        for at, entry in enumerate(told[1:], start=1):
            assert entry is not None
            assert_scored(entry.logprob, entry.top, rows_of(models, PROMPT[:at]), PROMPT[at])
        for output in outputs:
            (entry,) = output.deltas[0].logprobs
            assert_scored(entry.logprob, entry.top, rows_of(models, tokens), entry.token_id)
            tokens += output.deltas[0].token_ids


def assert_scored(logprob: float, top: Sequence[tuple[int, float]], row: np.ndarray, token: int) -> None:
    scores = row - row.max() - np.log(np.exp(row - row.max()).sum())
    assert logprob == pytest.approx(scores[token], abs=1e-4)
    assert [token_id for token_id, _ in top] == np.argsort(-scores, kind="stable")[: len(top)].tolist()


def test_a_prompt_is_scored_alike_in_chunks_and_alone() -> None:
    """An echo of nothing but scores; rows of every position come in steps that hold few of them."""
    asked = ask("a", PROMPT, TRIO, max_tokens=0, prompt_logprobs=0)
    (whole,) = outputs_of(make_rig(contents=CONTENTS, max_num_batched_tokens=256), asked)
    (chunked,) = outputs_of(make_rig(contents=CONTENTS, max_num_batched_tokens=7), asked)
    assert whole == chunked
    assert whole.deltas[0].finish_reason is FinishReason.LENGTH
    assert whole.prompt_logprobs is not None
    assert len(whole.prompt_logprobs) == len(PROMPT)


def test_company_is_not_felt_and_does_not_feel() -> None:
    rng = random.Random(1)
    requests = []
    for i in range(12):
        prompt = [rng.randrange(53) for _ in range(rng.randint(1, 60))]
        if i % 3 == 0:
            requests.append(ask(f"r{i}", prompt, [PAIR, TRIO, MEAN, PAIR][i // 3], max_tokens=10 + i))
        else:
            requests.append(request(f"r{i}", prompt, *(["v1"] if i % 2 else []), max_tokens=10 + i, logprobs=0))
    rig = make_rig(contents=CONTENTS, num_slots=6, num_blocks=128, max_num_seqs=32)
    assert rig.run(*requests) == {req.request_id: [solo(req)] for req in requests}
    # Plain rows beside ensembles have the bits that they have alone.
    plain = [req for req in requests if req.ensemble is None]
    scores: dict[str, list[Any]] = {}
    for together in (requests, plain):
        for output in outputs_of(make_rig(contents=CONTENTS, num_slots=6, num_blocks=128), *together):
            scores.setdefault(output.request_id, []).extend(output.deltas[0].logprobs)
    for req in plain:
        half = len(scores[req.request_id]) // 2
        assert scores[req.request_id][:half] == scores[req.request_id][half:]


@pytest.mark.parametrize("name", ALL)
def test_seeded_samples_do_not_depend_on_company_or_preemption(name: str) -> None:
    sampled = ask("a", PROMPT[:20], ALL[name], max_tokens=24, temperature=1.0, seed=7, top_p=0.9, presence_penalty=0.3)
    alone = make_rig(contents=CONTENTS).run(sampled)["a"]
    tight = make_rig(contents=CONTENTS, num_blocks=13, max_model_len=64)
    others = [request(f"r{i}", [i, 1, 2], max_tokens=40, temperature=0.5, seed=i) for i in range(5)]
    tight.engine.add(others[0], 0.0)
    tight.engine.add(sampled, 1.0)
    for other in others[1:]:
        tight.engine.add(other, 2.0)
    assert tight.finish({"a": 1})["a"] == alone
    assert make_rig(contents=CONTENTS).run(replace(sampled, sampling=replace(sampled.sampling, seed=8)))["a"] != alone


def test_rows_are_in_every_step_together_and_hold_their_last_token_back() -> None:
    """One member's prompt is cached, the other's is not, and comes in pieces."""
    rig = make_rig(contents=CONTENTS, max_num_batched_tokens=10)
    rig.run(request("warm", PROMPT, "v1", max_tokens=1))
    steps = watch(rig)
    req = ask("a", PROMPT, PAIR, max_tokens=6)
    (first, *_) = outputs = outputs_of(rig, req)
    assert [t for o in outputs for t in o.deltas[0].token_ids] == solo(req)
    assert first.num_cached_tokens == 0  # what every member has
    one, other = sorted({seq_id for step in steps for seq_id in step})
    begun = {seq_id: next(step[seq_id].start for step in steps if seq_id in step) for seq_id in (one, other)}
    assert begun == {one: 32, other: 0}
    with_logits = [step for step in steps if any(item.logits != "none" for item in step.values())]
    assert len(with_logits) == 6
    for step in with_logits:
        assert {item.logits for item in step.values()} == {"last"}
        assert {item.stop for item in step.values()} == {step[one].stop}
        assert set(step) == {one, other}
    rig.run(request("warm too", PROMPT, "v2", max_tokens=1))
    (first, *_) = outputs_of(rig, ask("b", PROMPT, PAIR, max_tokens=2))
    assert first.num_cached_tokens == 32


def test_preemption_takes_all_rows_and_changes_nothing() -> None:
    requests = [
        ask("a", PROMPT[:30], PAIR, max_tokens=30),
        request("r", [5, 6], "v1", max_tokens=50),
        ask("b", PROMPT[3:20], TRIO, max_tokens=25),
        ask("c", PROMPT[:17], MEAN, max_tokens=40),
    ]
    rig = make_rig(contents=CONTENTS, num_blocks=12, num_slots=5, max_model_len=64)
    num_preempted = 0
    tokens: dict[str, list[int]] = {req.request_id: [] for req in requests}
    for req in requests:
        rig.engine.check(req)
        rig.engine.add(req, rig.engine.clock())
    while rig.engine.open_ids:
        outcome = rig.engine.step()
        rig.engine.check_integrity()
        assert not outcome.failures
        num_preempted += outcome.stats.num_preempted if outcome.stats else 0
        for output in outcome.outputs:
            tokens[output.request_id] += output.deltas[0].token_ids
    assert num_preempted >= 2
    assert tokens == {req.request_id: solo(req) for req in requests}


def test_choices_are_ensembles_of_their_own() -> None:
    rig = make_rig(contents=CONTENTS, num_blocks=64)
    req = ask("a", PROMPT, PAIR, n=3, max_tokens=10, temperature=1.0, seed=3)
    tokens = rig.run(req)["a"]
    assert len({tuple(each) for each in tokens}) == 3
    for index in range(3):
        alone = ask("b", PROMPT, PAIR, max_tokens=10, temperature=1.0, seed=3 + index)
        assert make_rig(contents=CONTENTS).run(alone)["b"] == [tokens[index]]


def test_a_stop_string_ends_one_choice_with_all_its_rows() -> None:
    rig = make_rig(contents=CONTENTS)
    rig.engine.add(ask("a", [1, 2], TRIO, n=2, max_tokens=6, temperature=1.0, seed=1), 0.0)
    while rig.engine.num_running != 6:
        rig.engine.step()
    rig.engine.stop("a", 0)
    assert rig.engine.num_running == 3
    outputs = []
    while rig.engine.open_ids:
        outputs += rig.engine.step().outputs
        rig.engine.check_integrity()
    ends = {d.index: d.finish_reason for o in outputs for d in o.deltas if d.finish_reason}
    assert ends == {0: FinishReason.STOP, 1: FinishReason.LENGTH}


def test_tokens_and_time_are_counted_once() -> None:
    rig = make_rig(contents=CONTENTS)
    stop = solo(ask("a", PROMPT, TRIO, max_tokens=9))[8]
    for req in (
        ask("stopped", PROMPT, TRIO, max_tokens=30, stop_token_ids=(stop,)),
        ask("whole", PROMPT, TRIO, max_tokens=30, n=2),
    ):
        rig.engine.add(req, rig.engine.clock())
        stats = []
        while rig.engine.open_ids:
            stats += rig.engine.step().finished
        ((told, _),) = stats
        assert told.is_ensemble
        assert told.versions == ("v1", "v3", "v2")
        assert told.num_prompt_tokens == len(PROMPT)
        assert told.num_completion_tokens == (solo(req).index(stop) + 1 if req.n == 1 else 60)


@pytest.mark.parametrize("phase", ["waiting", "loading", "prefilling", "decoding", "preempted"])
@pytest.mark.parametrize("ending", ["abort", "fail"])
def test_leaving_in_every_phase_frees_everything(phase: str, ending: str) -> None:
    rig = make_rig(contents=CONTENTS, num_blocks=16, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=112)
    engine = rig.engine
    if phase == "loading":
        rig.loader.delays["v2"] = 0.2
    else:
        rig.run(ask("load", [1], PAIR, max_tokens=1))
    if phase == "waiting":
        for i in range(3):
            engine.add(request(f"other{i}", [1, 2, 3], max_tokens=60), engine.clock())
    engine.add(ask("a", [1] * (60 if phase == "prefilling" else 5), PAIR, max_tokens=40, n=2), engine.clock())
    for _ in range({"waiting": 3, "loading": 2, "prefilling": 2, "decoding": 5, "preempted": 5}[phase]):
        engine.step()
    assert engine.num_running == {"waiting": 3, "loading": 0, "prefilling": 2}.get(phase, 4)
    if phase == "preempted":
        rig.scheduler._preempt(rig.scheduler.running[-1], rig.scheduler.schedule(0.0))
        assert engine.num_running == engine.num_waiting == 2
    if ending == "abort":
        engine.abort("a")
    else:
        engine.fail("a", RequestTimeout("too long"))
    engine.abort("a")
    for i in range(3):
        engine.abort(f"other{i}")
    engine.check_integrity()
    assert engine.open_ids == []
    assert rig.blocks.num_used == 0
    assert engine.num_waiting == engine.num_running == 0
    assert not any(status.num_pins for status in rig.residency.status())
    rig.residency.close()


def test_an_ensemble_that_needs_every_seat_gets_them_beside_requests_without_end() -> None:
    now = [0.0]
    rig = make_rig(contents=CONTENTS, max_num_seqs=4, max_num_batched_tokens=4)
    rig.engine.clock = lambda: now[0]
    four = ensemble(*[(bound(f"v{i}"), 0.25) for i in range(4)])
    req = ask("a", PROMPT, four, max_tokens=5, prompt_logprobs=0)
    tokens: list[int] = []
    for step in range(800):
        while rig.engine.num_waiting < 8:
            rig.engine.add(request(f"r{step}-{rig.engine.num_waiting}", [1, 2], max_tokens=4), now[0])
        if step == 10:
            rig.engine.check(req)
            rig.engine.add(req, now[0])
        now[0] += 0.01
        while rig.residency.is_loading:
            rig.residency.poll()
        outcome = rig.engine.step()
        rig.engine.check_integrity()
        tokens += [t for o in outcome.outputs if o.request_id == "a" for t in o.deltas[0].token_ids]
        if len(tokens) == 5:
            break
    assert tokens == solo(req)
    assert now[0] < 1.5


def test_an_ensemble_whose_prompt_is_scored_gets_its_tokens_beside_younger_ones() -> None:
    """Four members need four tokens of a step at once. Two that are older leave three, which must not go to others."""
    rig = make_rig(contents=CONTENTS, max_num_seqs=8, max_num_batched_tokens=5)
    four = ensemble(*[(Binding((BindingPart("v1", i + 1.0, i + 1.0),)), 0.25) for i in range(4)])
    req = ask("a", PROMPT, four, max_tokens=5, prompt_logprobs=0)
    rig.run(request("load", [1], "v1", max_tokens=1))
    for i in range(2):
        rig.engine.add(request(f"older{i}", [1, 2], max_tokens=20 + 9 * i), rig.engine.clock())
    rig.engine.add(req, rig.engine.clock())
    tokens: list[int] = []
    for step in range(120):
        while rig.engine.num_waiting < 8:
            name = f"r{step}-{rig.engine.num_waiting}"
            rig.engine.add(request(name, [1, 2], max_tokens=20), rig.engine.clock())
        outcome = rig.engine.step()
        tokens += [t for o in outcome.outputs if o.request_id == "a" for t in o.deltas[0].token_ids]
    assert tokens == solo(req)
    assert rig.runner.max_step_tokens <= 5


def test_an_ensemble_waits_for_room_in_a_step() -> None:
    """Two that are older leave one token of three."""
    rig = make_rig(contents=CONTENTS, max_num_seqs=8, max_num_batched_tokens=3)
    rig.run(ask("load", [1], PAIR, max_tokens=1))
    requests = [request(f"r{i}", [1, i], max_tokens=9 + i) for i in range(2)]
    requests += [ask("a", [4, 5], PAIR, max_tokens=8), request("young", [3], max_tokens=30)]
    assert rig.run(*requests) == {req.request_id: [solo(req)] for req in requests}
    assert rig.runner.max_step_tokens <= 3


def test_slots_are_cleared_for_members_behind_the_first() -> None:
    """The first member is the base, and both slots always have work for adapters that never rest."""
    now = [0.0]
    rig = make_rig(contents=CONTENTS, num_slots=2, max_num_seqs=8, patience_seconds=0.3)
    rig.engine.clock = lambda: now[0]
    req = ask("rare", [3], ensemble((BASE_BINDING, 0.5), (bound("v7"), 0.25), (bound("v8"), 0.25)), max_tokens=5)
    tokens: list[int] = []
    for step in range(200):
        while rig.engine.num_waiting < 6:
            rig.engine.add(request(f"hot{step}-{rig.engine.num_waiting}", [1], f"v{step % 2}", max_tokens=10), now[0])
        if step == 20:
            rig.engine.add(req, now[0])
        now[0] += 0.01
        while rig.residency.is_loading:
            rig.residency.poll()
        outcome = rig.engine.step()
        rig.engine.check_integrity()
        tokens += [t for o in outcome.outputs if o.request_id == "rare" for t in o.deltas[0].token_ids]
    assert tokens == solo(req)


def test_more_adapters_than_slots_take_turns() -> None:
    """Every ensemble takes both slots, and there is never a time when both are free of themselves."""
    now = [0.0]
    rig = make_rig(contents=CONTENTS, num_slots=2, max_num_seqs=8, patience_seconds=0.2)
    rig.engine.clock = lambda: now[0]
    pairs = [ensemble((bound(f"v{i}"), 0.5), (bound(f"v{i + 1}"), 0.5)) for i in range(6)]
    requests = [ask(f"e{i}", [i, 1], pairs[i], max_tokens=4) for i in range(6)]
    tokens: dict[str, list[int]] = {req.request_id: [] for req in requests}
    for req in requests:
        rig.engine.add(req, 0.0)
    for step in range(2000):
        while rig.engine.num_waiting < 6:
            rig.engine.add(request(f"hot{step}-{rig.engine.num_waiting}", [1], f"v{step % 3}", max_tokens=6), now[0])
        now[0] += 0.01
        while rig.residency.is_loading:
            rig.residency.poll()
        for output in rig.engine.step().outputs:
            if output.request_id in tokens:
                tokens[output.request_id] += output.deltas[0].token_ids
        rig.engine.check_integrity()
        if all(len(each) == 4 for each in tokens.values()):
            break
    assert tokens == {req.request_id: solo(req) for req in requests}


def test_a_member_whose_adapter_fails_is_named_and_holds_nothing() -> None:
    for version, param in (("v3", "ensemble.members[0].adapters[1].id"), ("v2", "ensemble.members[2]")):
        rig = make_rig(contents=CONTENTS)
        rig.loader.errors[version] = ValueError("broken")
        with pytest.raises(AdapterUnavailable, match="broken") as caught:
            rig.run(ask("bad", [1, 2], TRIO))
        assert caught.value.param == param
        assert not any(status.num_pins for status in rig.residency.status())
        rig.run(request("good", [1, 2], "v1"))


def test_an_adapter_that_goes_while_it_runs_is_kept_to_the_end() -> None:
    rig = make_rig(contents=CONTENTS)
    req = ask("a", PROMPT, PAIR, max_tokens=12)
    rig.engine.add(req, rig.engine.clock())
    tokens: list[int] = []
    while rig.engine.open_ids:
        outcome = rig.engine.step()
        if outcome.outputs:
            rig.residency.unload("v1")
            rig.residency.publish([], ["v2"], {})
        rig.engine.check_integrity()
        tokens += [t for output in outcome.outputs for t in output.deltas[0].token_ids]
    assert tokens == solo(req)
    with pytest.raises(AdapterUnavailable, match="no longer served") as caught:
        rig.run(replace(req, request_id="b"))
    assert caught.value.param == "ensemble.members[1]"


def test_a_composition_is_refused_in_the_name_of_its_member(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "RULES", {})  # every kind is served alone
    rig = make_rig(contents=CONTENTS)
    rig.run(request("1", [1], "v1"), request("3", [1], "v3"), request("2", [1], "v2"))
    with pytest.raises(CompositionRefused, match="no other adapter") as caught:
        rig.run(ask("a", [1, 2], TRIO))
    assert caught.value.param == "ensemble.members[0].adapters"
    assert caught.value.reasons[0].where == "ensemble.members[0].adapters[0]"


def test_logits_that_are_not_numbers_fail_their_own_request_only() -> None:
    rig = make_rig(contents=CONTENTS)
    original = rig.runner.execute

    def poisoned(batch: list[ScheduledSequence]) -> Any:
        rows = original(batch)
        if len(rows) == len(batch):
            rows[
                [i for i, item in enumerate(batch) if item.parts and rig.runner._content(item.parts[0].slot) == 3.0]
            ] = float("nan")
        return rows

    rig.runner.execute = poisoned  # type: ignore[method-assign]
    good = ask("good", [1, 2, 3], ensemble((bound("v1"), 0.5), (BASE_BINDING, 0.5)), max_tokens=12)
    rig.engine.add(good, 0.0)
    rig.engine.add(ask("bad", [1, 2, 3], PAIR, max_tokens=12, n=2), 0.0)
    failures: list[tuple[str, DeltaserveError]] = []
    tokens: list[int] = []
    while rig.engine.open_ids:
        outcome = rig.engine.step()
        rig.engine.check_integrity()
        failures += outcome.failures
        tokens += [t for o in outcome.outputs if o.request_id == "good" for t in o.deltas[0].token_ids]
    assert [(request_id, error.error_code) for request_id, error in failures] == [("bad", "non_finite_logits")]
    assert tokens == solo(good)


@pytest.mark.parametrize(
    ("models", "fields", "error", "param", "text"),
    [
        (Ensemble(()), {}, EnsembleRefused, "ensemble.members", "0 members"),
        (ensemble(*[(BASE_BINDING, 0.1)] * 5), {}, EnsembleRefused, "ensemble.members", "1 to 4 are allowed"),
        (
            ensemble((BASE_BINDING, 1.0), (bound("v1"), 0.0)),
            {},
            InvalidRequest,
            "ensemble.members[1].weight",
            "from 1e-06",
        ),
        (ensemble((bound("v1"), 1e-300)), {}, InvalidRequest, "ensemble.members[0].weight", "1e-06 to 1000, above or"),
        (ensemble((bound("v1"), float("nan"))), {}, InvalidRequest, "ensemble.members[0].weight", "nan"),
        (ensemble((bound("v1"), float("inf"))), {}, InvalidRequest, "ensemble.members[0].weight", "inf"),
        (ensemble((bound("v1"), -1001.0)), {}, InvalidRequest, "ensemble.members[0].weight", "1000, above or below 0"),
        (
            ensemble((bound("v1"), 1.0), (bound("v2"), -1.0), mix=Mix.PROBABILITIES),
            {},
            InvalidRequest,
            "ensemble.members[1].weight",
            "above 0 and at most 1000",
        ),
        (
            ensemble((BASE_BINDING, 1.0), (bound("v1", "v1"), 1.0)),
            {},
            InvalidRequest,
            "ensemble.members[1].adapters",
            "composed twice",
        ),
        (
            ensemble((bound("v0", "v1"), 1.0), (bound("v2", "v3"), 1.0)),
            {},
            EnsembleRefused,
            "ensemble.members",
            "need 4 adapters at once; the device has 3 slots",
        ),
        (PAIR, {"n": 33}, EnsembleRefused, "n", "33 choices of 2 members are 66 rows; at most 64"),
        (PAIR, {"max_tokens": 60}, EnsembleRefused, "ensemble.members", "need 14 blocks .* and it has 12"),
        (
            ensemble((Binding((BindingPart("v1", num_prefix_tokens=86),)), 1.0)),
            {},
            ContextLengthExceeded,
            "max_tokens",
            "virtual tokens take 86",
        ),
    ],
)
def test_what_can_never_run_is_refused_at_the_door(
    models: Ensemble, fields: dict[str, Any], error: type[InvalidRequest], param: str, text: str
) -> None:
    rig = make_rig(contents=CONTENTS, num_blocks=12, num_slots=3, max_num_seqs=4, max_model_len=128)
    with pytest.raises(error, match=text) as caught:
        rig.engine.check(ask("a", PROMPT, models, **fields))
    assert type(caught.value) is error
    assert caught.value.param == param
    rig.engine.check(ask("a", PROMPT, PAIR, max_tokens=56))
