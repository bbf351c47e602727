"""Many more adapters than slots: everyone's turn comes, within a bound that does not depend on how busy others are."""

from __future__ import annotations

import threading

import pytest

from deltaserve.core import Binding, BindingPart
from deltatest.engine_fakes import Rig, collect, expected_tokens, make_rig, request

CONTENTS = {f"v{i}": float(i + 1) for i in range(60)}


def settle_loads(rig: Rig) -> None:
    """Virtual time stands still while real loader threads finish."""
    while rig.residency.is_loading:
        rig.residency.poll()


@pytest.mark.parametrize("host_adapters", [64, 2])
def test_ten_times_more_adapters_than_slots_all_finish(host_adapters: int) -> None:
    rig = make_rig(contents=CONTENTS, num_slots=4, host_adapters=host_adapters, max_num_seqs=16)
    requests = [request(f"r{i}", [i % 53, 1, 2], f"v{i % 40}", max_tokens=6) for i in range(120)]
    tokens = rig.run(*requests, max_steps=4000)
    for i, req in enumerate(requests):
        part = req.binding.parts[0]
        assert tokens[f"r{i}"] == [expected_tokens(req.prompt_ids, [(CONTENTS[part.version], part)], 6)]


def test_a_rare_adapter_is_served_beside_adapters_that_never_rest() -> None:
    now = [0.0]
    rig = make_rig(contents=CONTENTS, num_slots=2, max_num_seqs=8, patience_seconds=1.0)
    rig.engine.clock = lambda: now[0]
    finished: dict[str, float] = {}
    serial = 0

    def step() -> None:
        nonlocal serial
        # Both slots always have young work waiting.
        while rig.engine.num_waiting < 6:
            serial += 1
            rig.engine.add(request(f"hot{serial}", [1, 2], f"v{serial % 2}", max_tokens=10), now[0])
        now[0] += 0.01
        outcome = rig.engine.step()
        rig.engine.check_integrity()
        settle_loads(rig)
        for output in outcome.outputs:
            if output.is_finished:
                finished[output.request_id] = now[0]

    for _ in range(50):
        step()
    arrival = now[0]
    rig.engine.add(request("rare", [3], "v7", max_tokens=5), arrival)
    rig.engine.add(request("rare base", [3], max_tokens=5), arrival)
    for _ in range(400):
        step()
        if "rare" in finished:
            break
    # Patience (1 s), then at most the ten steps that running work still needs, then its own five.
    assert finished["rare"] - arrival < 1.0 + 0.3
    assert finished["rare base"] - arrival < 0.5
    before = len(finished)
    for _ in range(100):
        step()
    assert len(finished) > before + 20  # the others go on as before


def test_a_binding_of_many_parts_gets_all_its_slots() -> None:
    now = [0.0]
    rig = make_rig(contents=CONTENTS, num_slots=3, max_num_seqs=8, patience_seconds=0.5)
    rig.engine.clock = lambda: now[0]
    binding = Binding(tuple(BindingPart(f"v{i}") for i in (10, 11, 12)))
    req = request("composed", [1, 2, 3], binding=binding, max_tokens=5)
    tokens: dict[str, list[list[int]]] = {"composed": [[]]}
    serial = 0
    for index in range(600):
        while rig.engine.num_waiting < 6:
            serial += 1
            rig.engine.add(request(f"hot{serial}", [1, 2], f"v{serial % 5}", max_tokens=8), now[0])
        if index == 20:
            rig.engine.add(req, now[0])
        now[0] += 0.01
        collect(rig.engine.step(), tokens)
        rig.engine.check_integrity()
        settle_loads(rig)
        if len(tokens["composed"][0]) == 5:
            break
    parts = [(CONTENTS[part.version], part) for part in binding.parts]
    assert tokens["composed"][0] == expected_tokens([1, 2, 3], parts, 5)
    assert now[0] < 2.5


def test_running_sequences_are_not_stopped_for_a_claimant() -> None:
    now = [0.0]
    rig = make_rig(contents=CONTENTS, num_slots=1, patience_seconds=0.1)
    rig.engine.clock = lambda: now[0]
    rig.engine.add(request("long", [1], "v1", max_tokens=50), 0.0)
    rig.engine.add(request("next", [1], "v2", max_tokens=2), 0.0)
    ends: list[str] = []
    num_preempted = 0
    while rig.engine.open_ids:
        now[0] += 0.1
        outcome = rig.engine.step()
        settle_loads(rig)
        num_preempted += outcome.stats.num_preempted if outcome.stats else 0
        ends += [output.request_id for output in outcome.outputs if output.is_finished]
    assert ends == ["long", "next"]
    assert num_preempted == 0


def test_running_work_is_counted_once_a_step_however_many_wait() -> None:
    """Thousands may wait for adapters that are still loading; looking for whose turn it is must not multiply."""

    class Counted(list):
        passes = 0

        def __iter__(self):
            Counted.passes += 1
            return super().__iter__()

    rig = make_rig(contents=CONTENTS, num_slots=2, patience_seconds=0.0)
    rig.loader.gates = {f"v{i}": threading.Event() for i in range(30)}
    for i in range(30):
        rig.engine.add(request(f"r{i}", [1], f"v{i}", max_tokens=1), 0.0)
    rig.engine.step()
    rig.scheduler._turn.begin_step(rig.scheduler.waiting, Counted(), now=1e9)
    assert Counted.passes <= 1
    for gate in rig.loader.gates.values():
        gate.set()
    rig.finish({})
