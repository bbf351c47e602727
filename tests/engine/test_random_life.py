"""Random lives: arrivals, aborts, stops, slow and failing loads, evictions, retirements, preemptions, in any order.

After every step the books balance; at the end everything is free; every finished output equals its solo oracle.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaserve.core import Binding, BindingPart, Ensemble, FinishReason, GenerationRequest, Member
from deltaserve.errors import AdapterUnavailable, EnsembleRefused
from deltatest.engine_fakes import Rig, expected_tokens, make_rig, request
from deltatest.ensemble_oracle import expected_of_ensemble

NAMES = [f"v{i}" for i in range(8)]
CONTENTS = {name: float(i + 1) for i, name in enumerate(NAMES)}

parts = st.builds(
    BindingPart,
    version=st.sampled_from(NAMES),
    scale_first=st.sampled_from([1.0, 0.5]),
    scale_last=st.sampled_from([1.0, 2.0]),
    start_position=st.sampled_from([0, 0, 0, 7, 16]),
)
arrivals = st.tuples(
    st.just("arrive"),
    st.integers(0, 2),  # few prompts, so that prefixes are shared
    st.integers(1, 60),  # prompt length
    st.integers(0, 20),  # max_tokens
    st.lists(parts, max_size=3, unique_by=lambda part: part.version).map(tuple),
    st.integers(1, 2),  # n
    st.booleans(),  # prompt logprobs
    st.sampled_from([(), (), (), (1.0,), (0.75, 0.25), (-0.5, 0.5, 1.0)]),  # an ensemble with these weights
)
actions = st.lists(
    st.one_of(
        arrivals,
        arrivals,
        st.tuples(st.just("steps"), st.integers(1, 12)),
        st.tuples(st.just("abort"), st.integers(0, 50)),
        st.tuples(st.just("stop"), st.integers(0, 50)),
        st.tuples(st.just("probe"), st.integers(1, 40), st.lists(parts, max_size=1).map(tuple)),
        st.tuples(st.just("retire"), st.sampled_from(NAMES)),
        st.tuples(st.just("publish"), st.sampled_from(NAMES)),
        st.tuples(st.just("unload"), st.sampled_from(NAMES)),
        st.tuples(st.just("preload"), st.sampled_from(NAMES)),
        st.tuples(st.just("fault"), st.sampled_from(NAMES), st.booleans()),
    ),
    min_size=5,
    max_size=40,
)


@dataclass
class Life:
    rig: Rig
    requests: dict[str, GenerationRequest] = field(default_factory=dict)
    tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    ends: dict[str, dict[int, FinishReason]] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)

    def step(self) -> bool:
        outcome = self.rig.engine.step()
        self.rig.engine.check_integrity()
        for output in outcome.outputs:
            assert output.request_id not in self.failed
            assert output.request_id not in self.left or not any(delta.token_ids for delta in output.deltas)
            for delta in output.deltas:
                self.tokens[output.request_id][delta.index] += delta.token_ids
                if delta.finish_reason is not None:
                    assert delta.index not in self.ends[output.request_id]
                    self.ends[output.request_id][delta.index] = delta.finish_reason
        for request_id, error in outcome.failures:
            assert isinstance(error, AdapterUnavailable)
            self.failed.add(request_id)
        return outcome.stats is not None

    def act(self, action: tuple) -> None:  # type: ignore[type-arg]
        engine, residency = self.rig.engine, self.rig.residency
        match action:
            case ("arrive", kind, length, max_tokens, binding_parts, n, with_prompt, weights):
                request_id = f"r{len(self.requests)}"
                prompt = [(kind * 7 + i) % 53 for i in range(length)]
                req = request(
                    request_id,
                    prompt,
                    binding=Binding(binding_parts[: engine.limits.max_parts]),
                    max_tokens=max_tokens,
                    n=n,
                    prompt_logprobs=0 if with_prompt else None,
                )
                if weights:  # each member lacks one part more
                    parts_of = [req.binding.parts[index:] for index in range(len(weights))]
                    members = zip(map(Binding, parts_of), weights, strict=True)
                    req = replace(req, ensemble=Ensemble(tuple(Member(*member) for member in members)))
                try:
                    engine.check(req)
                except EnsembleRefused:
                    return
                engine.add(req, engine.clock())
                self.requests[request_id] = req
                self.tokens[request_id] = [[] for _ in range(n)]
                self.ends[request_id] = {}
            case ("steps", count):
                for _ in range(count):
                    self.step()
            case ("abort", index) if self.requests:
                request_id = f"r{index % len(self.requests)}"
                if request_id in engine.open_ids:
                    self.left.add(request_id)
                engine.abort(request_id)
            case ("stop", index) if self.requests:
                engine.stop(f"r{index % len(self.requests)}", 0)
            case ("probe", length, binding_parts):
                probe_id = f"p{time.perf_counter_ns()}"
                engine.add_probe(probe_id, tuple(range(length)), Binding(binding_parts), engine.clock())
            case ("retire", name):
                residency.publish([], [name], {})
            case ("publish", name):
                residency.publish([name], [], {})
            case ("unload", name):
                residency.unload(name)
            case ("preload", name):
                residency.settle(name)
            case ("fault", name, is_broken):
                if is_broken:
                    self.rig.loader.errors[name] = ValueError("broken")
                else:
                    self.rig.loader.errors.pop(name, None)
        engine.check_integrity()

    def finish(self) -> None:
        until = time.monotonic() + 4
        while self.rig.engine.open_ids:
            assert time.monotonic() < until, f"stuck with {self.rig.engine.open_ids}"
            if not self.step():
                time.sleep(0.0005)
        self.step()
        assert self.rig.blocks.num_used == 0
        for request_id, req in self.requests.items():
            if request_id in self.failed | self.left:
                continue
            assert set(self.ends[request_id]) == set(range(req.n))
            if req.ensemble is None:
                own = [(CONTENTS[p.version], p) for p in req.binding.parts]
                oracle = expected_tokens(req.prompt_ids, own, req.sampling.max_tokens)
            else:
                oracle = expected_of_ensemble(req.prompt_ids, req.ensemble, CONTENTS, req.sampling.max_tokens)
            for index, tokens in enumerate(self.tokens[request_id]):
                if self.ends[request_id][index] is FinishReason.LENGTH:
                    assert tokens == oracle
                else:  # ended by a stop string
                    assert tokens == oracle[: len(tokens)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    actions=actions,
    num_blocks=st.integers(6, 14),
    num_slots=st.integers(2, 4),
    host_adapters=st.integers(1, 4),
    device_adapters=st.integers(2, 4),
    budget=st.integers(3, 40),
    max_num_seqs=st.integers(1, 6),
    delays=st.lists(st.sampled_from([0.0, 0.0, 0.001, 0.004]), min_size=len(NAMES), max_size=len(NAMES)),
    has_regimes=st.booleans(),
)
def test_any_life_keeps_the_books_and_gives_the_oracle(
    actions: list[tuple],  # type: ignore[type-arg]
    num_blocks: int,
    num_slots: int,
    host_adapters: int,
    device_adapters: int,
    budget: int,
    max_num_seqs: int,
    delays: list[float],
    has_regimes: bool,
) -> None:
    rig = make_rig(
        contents=CONTENTS,
        num_blocks=num_blocks,
        num_slots=num_slots,
        host_adapters=host_adapters,
        device_adapters=device_adapters,
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        max_model_len=96,
        retry_seconds=0.0,
        patience_seconds=0.002,
        kv_regime=(lambda length: int(length > 24)) if has_regimes else None,
    )
    rig.loader.delays.update(zip(NAMES, delays, strict=True))
    life = Life(rig)
    try:
        for action in actions:
            life.act(action)
        life.finish()
    finally:
        rig.residency.close()
