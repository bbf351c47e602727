"""The state machine of adapter versions, its two tiers, and its books."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from deltaserve.adapters import residency as residency_module
from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.adapters.device_pool import DevicePool, StagedAdapter
from deltaserve.adapters.host_cache import GOES_FIRST, HostCache, HostedAdapter
from deltaserve.adapters.loader import NotPrepared
from deltaserve.adapters.residency import AdapterResidency
from deltaserve.core import AdapterState
from deltaserve.deltas.folded import FoldedAdapter, LowRankTerm, SparseTerm
from deltaserve.errors import AdapterUnavailable
from deltaserve_kernels import LoraTables, SparseTables
from deltaserve_store.errors import BaseMismatch, Reason
from deltatest.engine_fakes import ADAPTER_BYTES, FINGERPRINT, LINEAR, FakeLoader, adapter

CONTENTS = {f"v{i}": float(i + 1) for i in range(20)}


class Observed:
    def __init__(self) -> None:
        self.loads: list[tuple[str, str]] = []
        self.evictions: list[tuple[str, str]] = []

    def on_adapter_load(self, source: str, outcome: str, seconds: float) -> None:
        self.loads.append((source, outcome))

    def on_adapter_eviction(self, level: str, reason: str) -> None:
        self.evictions.append((level, reason))


class Bench:
    """Residency with ``slots`` slots and budgets counted in adapters; checks its books after every call."""

    def __init__(self, slots: int = 2, device: int = 8, host: int = 4, retry_seconds: float = 5.0) -> None:
        self.now = 100.0
        self.loader = FakeLoader(CONTENTS)
        self.lora, self.sparse = LoraTables(1, slots, "cpu"), SparseTables(1, slots, "cpu")
        pool = DevicePool(
            DeltaTables(self.lora, self.sparse, linears=[LINEAR]), num_slots=slots, max_bytes=device * ADAPTER_BYTES
        )
        self.observed = Observed()
        self.residency = AdapterResidency(
            pool,
            HostCache(host * ADAPTER_BYTES),
            self.loader,
            retry_seconds=retry_seconds,
            observer=self.observed,
            clock=lambda: self.now,
        )
        self.pins: dict[str, int] = {}

    def acquire(self, *versions: str) -> tuple[int, ...] | None:
        slots = self.residency.acquire(versions)
        for version in versions if slots is not None else ():
            self.pins[version] = self.pins.get(version, 0) + 1
        self.check()
        return slots

    def release(self, *versions: str) -> None:
        for version in versions:
            self.pins[version] -= 1
        self.residency.release(versions)
        self.check()

    def load(self, *versions: str) -> None:
        """Want the versions, and wait until each is on the host or beyond."""
        self.residency.plan(versions)
        self.wait(lambda: not any(self.residency.state(v) is AdapterState.LOADING for v in versions))
        self.residency.plan(versions)
        self.wait(lambda: not any(self.residency.state(v) is AdapterState.LOADING for v in versions))

    def wait(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.001)
            self.residency.poll()
        self.check()

    def check(self) -> None:
        self.residency.check_integrity(self.pins)

    def states(self, *versions: str) -> list[str]:
        return [self.residency.state(version).value for version in versions]

    def content(self, slot: int) -> float | None:
        entry = self.lora.get(0, slot)
        return None if entry is None else float(entry[0][0, 0])


@pytest.fixture(autouse=True)
def a_step_has_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step may place goes by the clock; on a busy machine the first of two would be all."""
    monkeypatch.setattr(residency_module, "MAX_PLACING_SECONDS", 60.0)


def test_the_way_up_and_the_tables_point_at_the_right_bytes() -> None:
    bench = Bench()
    assert bench.acquire("v1") is None
    assert bench.states("v1") == ["stored"]
    bench.load("v1", "v2")
    assert bench.states("v1", "v2") == ["host", "host"]
    (slot,) = bench.acquire("v1") or ()
    assert bench.content(slot) == 2.0
    assert bench.states("v1") == ["ready"]
    assert bench.acquire("v1") == (slot,)
    (other,) = bench.acquire("v2") or ()
    assert other != slot
    assert bench.content(other) == 3.0
    assert bench.observed.loads == [("disk", "ok")] * 2 + [("host", "ok")] * 2
    status = {entry.version: entry for entry in bench.residency.status()}
    assert (status["v1"].num_pins, status["v1"].device_bytes, status["v1"].host_bytes) == (2, ADAPTER_BYTES, 0)


def test_pinned_slots_are_never_taken_and_idle_ones_least_recently_used_first() -> None:
    bench = Bench(slots=2)
    bench.load("v1", "v2")
    bench.load("v3")
    one, two = bench.acquire("v1"), bench.acquire("v2")
    assert one is not None
    assert two is not None
    assert bench.acquire("v3") is None
    assert bench.states("v1", "v2", "v3") == ["ready", "ready", "host"]
    bench.release("v2")
    bench.release("v1")
    assert bench.acquire("v3") == two  # v2 became idle first
    assert bench.states("v1", "v2", "v3") == ["ready", "host", "ready"]
    assert bench.observed.evictions == [("device", "capacity")]
    assert bench.content(two[0]) == 4.0


def test_an_idle_adapter_that_someone_waits_for_is_evicted_last() -> None:
    bench = Bench(slots=2)
    bench.load("v1", "v2")
    bench.load("v3")
    bench.acquire("v1")
    bench.acquire("v2")
    bench.release("v1")
    bench.release("v2")
    bench.residency.plan(["v3", "v1"])
    assert bench.acquire("v3") is not None
    assert bench.states("v1", "v2") == ["ready", "host"]


def test_status_costs_little_for_versions_that_were_never_loaded() -> None:
    bench = Bench()
    bench.residency.publish(["v1", "v2", "v3"], [], {"v3": "it was admitted for base x"})
    first, again = bench.residency.status(), bench.residency.status()
    assert [a is b for a, b in zip(first, again, strict=True)] == [True, True, True]
    assert [(s.state, s.reason) for s in first[1:]] == [
        ("stored", None),
        ("incompatible", "it was admitted for base x"),
    ]
    bench.residency.publish([], [], {"v3": "it was admitted for base y"})
    bench.load("v1")
    assert bench.acquire("v1") is not None
    told = bench.residency.status()
    assert (told[0].state, told[0].num_pins, told[0].device_bytes) == ("ready", 1, ADAPTER_BYTES)
    assert told[1] is first[1]
    assert told[2].reason == "it was admitted for base y"


def test_composition_takes_all_or_nothing() -> None:
    bench = Bench(slots=2)
    bench.load("v1", "v2")
    bench.load("v3")
    assert bench.acquire("v3") is not None
    assert bench.acquire("v1", "v2") is None
    assert bench.states("v1", "v2") == ["host", "host"]
    assert bench.residency.must_drain(("v1", "v2"), {"v3": 5}) == {"v3"}
    bench.release("v3")
    slots = bench.acquire("v1", "v2", "v1")
    assert slots is not None
    assert slots[0] == slots[2]
    bench.release("v1", "v2", "v1")


def test_a_composition_larger_than_the_host_goes_up_part_by_part() -> None:
    bench = Bench(slots=2, host=1)
    for _ in range(4):
        bench.load("v1", "v2")
        slots = bench.acquire("v1", "v2")
    assert slots is not None
    assert [bench.content(slot) for slot in slots] == [2.0, 3.0]


def test_a_composition_larger_than_the_device_is_refused() -> None:
    bench = Bench(slots=3, device=1)
    bench.load("v1", "v2")
    with pytest.raises(AdapterUnavailable, match="2 adapters of 128 bytes are needed at once"):
        bench.acquire("v1", "v2")
    bench = Bench(slots=1)
    with pytest.raises(AdapterUnavailable, match="the device has 1 slots"):
        bench.acquire("v1", "v2")


def test_bytes_bound_the_device_too() -> None:
    bench = Bench(slots=8, device=2)
    bench.load("v1", "v2")
    bench.load("v3")
    assert bench.acquire("v1") is not None
    assert bench.acquire("v2") is not None
    assert bench.acquire("v3") is None
    assert bench.residency.must_drain(("v3",), {"v1": 9, "v2": 3}) == {"v2"}
    bench.release("v1")
    assert bench.acquire("v3") is not None


def test_what_must_drain_is_what_ends_soonest_and_nothing_while_loading() -> None:
    bench = Bench(slots=2)
    bench.load("v1", "v2")
    bench.acquire("v1")
    bench.acquire("v2")
    assert bench.residency.must_drain(("v3",), {}) is None
    bench.load("v3")
    assert bench.residency.must_drain(("v3",), {"v1": 10, "v2": 20}) == {"v1"}
    bench.release("v2")
    assert bench.residency.must_drain(("v3",), {"v1": 10}) == frozenset()


def test_the_host_keeps_what_is_wanted_soonest() -> None:
    bench = Bench(slots=1, host=2)
    bench.load("v1")
    bench.acquire("v1")
    bench.load("v2", "v3")
    bench.residency.plan(["v4", "v2", "v3"])
    bench.wait(lambda: bench.residency.state("v4") is not AdapterState.LOADING)
    # v4 is wanted first, so v3, wanted last, makes room; v2 stays.
    assert bench.states("v4", "v2", "v3") == ["host", "host", "stored"]
    bench.residency.plan(["v4", "v2", "v3"])
    assert bench.states("v3") == ["stored"]  # its size is known and there is no room: not read again
    num_loads = len(bench.loader.loads)
    bench.residency.plan(["v4", "v2", "v3"])
    assert len(bench.loader.loads) == num_loads


@pytest.mark.parametrize(("device", "host", "flag"), [(0.5, 4, "--adapter-device-bytes"), (4, 0.5, "--adapter-host-b")])
def test_an_adapter_bigger_than_a_budget_is_refused_with_both_numbers(device: float, host: float, flag: str) -> None:
    bench = Bench()
    bench.residency.pool.max_bytes = int(device * ADAPTER_BYTES)
    bench.residency.cache.max_bytes = int(host * ADAPTER_BYTES)
    bench.load("v1")
    with pytest.raises(AdapterUnavailable, match=rf"needs 64 bytes.* 32 are allowed; raise {flag}"):
        bench.acquire("v1")


def test_failures_are_told_and_tried_again_later_or_when_published() -> None:
    bench = Bench(retry_seconds=5)
    bench.loader.errors["v1"] = OSError(2, "No such file or directory", "/srv/secret/path")
    bench.load("v1")
    assert bench.states("v1") == ["failed"]
    with pytest.raises(AdapterUnavailable, match="No such file or directory") as caught:
        bench.acquire("v1")
    assert "/srv" not in caught.value.message
    bench.now += 3
    bench.residency.hold(["v1"])
    assert bench.states("v1") == ["failed"]
    bench.now += 3
    bench.residency.hold(["v1"])
    assert bench.states("v1") == ["stored"]
    bench.load("v1")
    assert bench.states("v1") == ["failed"]
    del bench.loader.errors["v1"]
    bench.residency.publish([], [], {})
    bench.load("v1")
    assert bench.acquire("v1") is not None


def test_an_adapter_of_another_base_is_incompatible() -> None:
    bench = Bench()
    bench.loader.errors["v1"] = BaseMismatch([Reason("base", "config", "a", "b")], "made for another base")
    bench.load("v1")
    assert bench.states("v1") == ["incompatible"]
    with pytest.raises(AdapterUnavailable, match="made for another base"):
        bench.acquire("v1")
    bench.residency.publish(["v2"], [], {"v2": "it was admitted for base x"})
    with pytest.raises(AdapterUnavailable, match="admitted for base x"):
        bench.acquire("v2")


def test_terms_for_an_unknown_linear_are_refused_not_skipped() -> None:
    bench = Bench()

    class Wrong:
        def load(self, version: str) -> FoldedAdapter:
            term = LowRankTerm(torch.zeros(1, 8), torch.zeros(1, 8))
            return FoldedAdapter({"layer.9.linear": (term,)}, FINGERPRINT, torch.float32)

    bench.residency.workers._loader = Wrong()
    bench.load("v1")
    with pytest.raises(AdapterUnavailable, match=r"no linear 'layer\.9\.linear'"):
        bench.acquire("v1")


def test_damaged_terms_are_found_by_the_worker_that_reads_them() -> None:
    bench = Bench()

    class Wrong:
        def load(self, version: str) -> FoldedAdapter:
            bad = SparseTerm(torch.tensor([0, 2], dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.zeros(1))
            good = LowRankTerm(torch.zeros(1, 8), torch.zeros(1, 1))
            return FoldedAdapter({LINEAR: (good, bad)}, FINGERPRINT, torch.float32)

    bench.residency.workers._loader = Wrong()
    bench.load("v1")
    with pytest.raises(AdapterUnavailable, match="indptr must rise"):
        bench.acquire("v1")
    assert bench.states("v1") == ["failed"]
    assert bench.residency.pool.num_free_slots == 2


def test_terms_the_tables_refuse_fail_the_version_and_free_its_slot() -> None:
    bench = Bench()

    class Wrong:
        def load(self, version: str) -> FoldedAdapter:
            half = {"float": LowRankTerm(torch.zeros(1, 8), torch.zeros(1, 8))}
            half["half"] = LowRankTerm(torch.zeros(1, 8).half(), torch.zeros(1, 8).half())
            return FoldedAdapter({LINEAR: (half[version],)}, FINGERPRINT, torch.float32)

    bench.residency.workers._loader = Wrong()
    bench.load("float")
    assert bench.acquire("float") is not None
    bench.release("float")
    bench.residency.unload("float")
    bench.load("half")
    assert bench.acquire("half") is None
    assert bench.states("half") == ["failed"]
    assert not bench.lora.has_any(0)
    assert bench.residency.pool.num_free_slots == 2


class Mixed:
    """A low-rank and a sparse term of one linear, views of one buffer as a file's are."""

    def load(self, version: str) -> FoldedAdapter:
        buffer = torch.zeros(256, dtype=torch.int32)
        a, b_t, values = (buffer[i : i + 8].view(torch.float32) for i in (0, 8, 16))
        a.fill_(2.0)
        b_t.fill_(3.0)
        values.copy_(torch.arange(1.0, 9.0))
        indptr, cols = buffer[32:41], buffer[64:72]
        indptr.copy_(torch.arange(9))
        cols.copy_(torch.arange(7, -1, -1))
        terms = (LowRankTerm(a.view(1, 8), b_t.view(1, 8)), SparseTerm(indptr, cols, values))
        return FoldedAdapter({LINEAR: terms}, FINGERPRINT, torch.float32)


def bytes_of(terms: StagedAdapter) -> int:
    """Of all memory that the terms keep alive."""
    tensors = [tensor for _, a, b_t in terms.lora for tensor in (a, b_t)]
    for _, entry in terms.sparse:
        tensors += [*entry[:3], *(entry.jagged.tensors if entry.jagged is not None else ())]
    memory = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(memory.values())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_jagged_form_is_all_that_is_held_and_booked_where_it_is_all_that_is_read(device: str) -> None:
    """``meta`` stands for a device with memory of its own: it takes what is copied to it and computes nothing."""
    lora, sparse = LoraTables(1, 2, device), SparseTables(1, 2, device, has_csr=False)
    pool = DevicePool(DeltaTables(lora, sparse, linears=[LINEAR]), num_slots=2, max_bytes=1 << 20, device=device)
    staged: list[StagedAdapter] = []
    install = pool.install

    def watched(slot: int, terms: StagedAdapter) -> None:
        staged.append(terms)
        install(slot, terms)

    pool.install = watched  # type: ignore[method-assign]
    bench = Bench()
    bench.residency = AdapterResidency(pool, HostCache(1 << 20), Mixed())
    bench.load("v1")
    bench.residency.settle("v1")
    bench.wait(lambda: bench.residency.state("v1") is AdapterState.READY)
    bench.check()
    (terms,) = staged
    ((_, entry),) = terms.sparse
    assert entry.jagged is not None
    assert not any(tensor.numel() for tensor in entry[:3])
    assert pool.used_bytes == terms.nbytes == bytes_of(terms) == 64 + entry.jagged.nbytes
    assert {tensor.device.type for tensor in entry.jagged.tensors} == {device}
    assert sparse.has_any(0)
    if device == "meta":  # the host keeps its own
        hosted = bench.residency.cache.get("v1")
        assert bench.residency.cache.used_bytes == hosted.nbytes == bytes_of(hosted.terms) == pool.used_bytes
    else:
        assert not sparse.pointers.any()
        indptr, cols, values = sparse.get(0, 0) or pytest.fail("the slot is filled")
        (_, term) = Mixed().load("v1").terms[LINEAR]
        assert isinstance(term, SparseTerm)
        assert (indptr.tolist(), cols.tolist()) == (term.indptr.tolist(), term.cols.tolist())
        assert values.tolist() == term.values.tolist()
    bench.residency.unload("v1")
    assert pool.used_bytes == bench.residency.cache.used_bytes == 0
    assert not sparse.has_any(0)
    assert not sparse._jagged


def test_a_preload_that_finds_no_room_is_not_read_again_and_again() -> None:
    bench = Bench(slots=1, host=1)
    bench.load("v1")
    assert bench.acquire("v1") is not None  # the only slot
    bench.load("v2")  # the host is full of what somebody waits for
    for _ in range(5):
        assert not bench.residency.settle("v3")
        bench.wait(lambda: bench.residency.state("v3") is AdapterState.STORED)
    assert bench.loader.loads.count("v3") == 1  # that is how its size became known
    bench.residency.plan([])
    assert not bench.residency.settle("v3")
    bench.wait(lambda: bench.residency.state("v3") is AdapterState.HOST)
    assert bench.residency.settle("v3")


def test_room_on_the_host_is_found_without_looking_at_everyone() -> None:
    cache = HostCache(100)
    for i in range(100):
        cache.put(f"v{i}", HostedAdapter(StagedAdapter((), ()), 1))
    ranks = {"v0": None, "v1": -3, "v3": -5}
    looked_at: list[str] = []

    def order(version: str) -> int | None:
        looked_at.append(version)
        return ranks.get(version, GOES_FIRST)

    assert cache.find_room(2, order) == ["v2", "v4"]
    assert len(looked_at) == 5
    first = ["v2", *(f"v{i}" for i in range(4, 100))]
    assert cache.find_room(98, order) == [*first, "v3"]
    assert cache.find_room(99, order) == [*first, "v3", "v1"]
    assert cache.find_room(100, order) is None


def test_retiring_waits_for_holds_and_pins() -> None:
    bench = Bench()
    bench.load("v1")
    bench.residency.hold(["v1"])
    bench.acquire("v1")
    bench.residency.publish([], ["v1"], {})
    assert bench.states("v1") == ["ready"]
    bench.release("v1")  # preempted, say: the sequence still lives
    assert bench.states("v1") == ["ready"]
    assert bench.acquire("v1") is not None
    bench.release("v1")
    bench.residency.unhold(["v1"])
    assert bench.states("v1") == ["retired"]
    assert bench.residency.pool.num_free_slots == 2
    assert bench.residency.pool.used_bytes == bench.residency.cache.used_bytes == 0
    with pytest.raises(AdapterUnavailable, match="no longer served"):
        bench.acquire("v1")
    bench.residency.publish(["v1"], [], {})
    bench.load("v1")
    assert bench.acquire("v1") is not None


def test_retiring_or_unloading_while_loading_keeps_nothing() -> None:
    bench = Bench()
    for version in ("v1", "v2"):
        bench.loader.gates[version] = threading.Event()
    bench.residency.plan(["v1", "v2"])
    bench.residency.retire("v1", forget=True)
    bench.residency.unload("v2")
    assert bench.states("v1", "v2") == ["loading", "loading"]
    for gate in bench.loader.gates.values():
        gate.set()
    bench.wait(lambda: not bench.residency.is_loading)
    assert bench.states("v2") == ["stored"]
    assert [entry.version for entry in bench.residency.status()] == ["v2"]
    assert bench.residency.cache.used_bytes == 0


def test_unloading_frees_memory_once_unpinned() -> None:
    bench = Bench()
    bench.load("v1")
    bench.acquire("v1")
    bench.residency.unload("v1")
    assert bench.states("v1") == ["ready"]
    bench.release("v1")
    assert bench.states("v1") == ["stored"]
    assert bench.residency.pool.used_bytes == 0
    assert bench.observed.evictions == [("device", "unloaded")]


@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("loading", [False, True])
def test_unloading_and_retiring_leave_a_waiting_sequence_its_adapter(forget: bool, loading: bool) -> None:
    bench = Bench()
    bench.residency.hold(["v1"])
    if loading:
        bench.loader.gates["v1"] = threading.Event()
        bench.residency.plan(["v1"])
        bench.residency.unload("v1")
        bench.residency.retire("v1", forget=forget)
        bench.loader.gates["v1"].set()
        bench.wait(lambda: not bench.residency.is_loading)
    else:
        bench.load("v1")
        bench.acquire("v1")
        bench.residency.unload("v1")
        bench.residency.retire("v1", forget=forget)
        bench.release("v1")
    assert bench.states("v1") == ["stored"]
    bench.load("v1")
    assert bench.acquire("v1") is not None
    bench.release("v1")
    bench.residency.unhold(["v1"])
    assert [entry.state.value for entry in bench.residency.status()] == ([] if forget else ["retired"])


def test_placing_many_adapters_is_spread_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency_module, "MAX_PLACING_SECONDS", 0.005)
    bench = Bench(slots=4)
    bench.load("v1", "v2")
    bench.load("v3")
    install = bench.residency.pool.install

    def slow(*args: object) -> None:
        time.sleep(0.006)
        install(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(bench.residency.pool, "install", slow)
    bench.residency.plan(["v1", "v2", "v3"])
    assert bench.acquire("v1") is not None
    assert bench.acquire("v2") is None  # the step has spent its time on placing
    assert bench.acquire("v1") is not None  # what is there already costs nothing
    bench.residency.plan(["v2", "v3"])
    assert bench.acquire("v2") is not None


def test_loads_run_on_few_worker_threads_only() -> None:
    bench = Bench(host=8)
    gates = {f"v{i}": threading.Event() for i in range(6)}
    bench.loader.gates.update(gates)
    bench.residency.plan(gates)
    states = bench.states(*gates)
    assert states.count("loading") == bench.residency.workers.max_in_flight == 2
    for gate in gates.values():
        gate.set()
    bench.wait(lambda: not bench.residency.is_loading)
    bench.load(*gates)
    assert threading.current_thread().name not in bench.loader.threads


def test_preparing_happens_once_and_on_its_own_thread() -> None:
    bench = Bench()
    prepared: list[tuple[str, str]] = []
    missing = {"v1", "v2"}

    class Unprepared:
        def load(self, version: str) -> FoldedAdapter:
            if version in missing:
                raise NotPrepared("no folded file")
            return adapter(CONTENTS[version])

    def prepare(version: str) -> None:
        prepared.append((version, threading.current_thread().name))
        if version == "v1":
            missing.discard(version)

    bench.residency.workers._loader = Unprepared()
    bench.load("v1")
    assert bench.states("v1") == ["failed"]  # nobody can prepare
    bench.residency.publish([], [], {})
    bench.residency.workers.prepare = prepare
    bench.load("v1", "v2")
    bench.wait(lambda: not bench.residency.is_loading)
    assert bench.states("v1", "v2") == ["host", "failed"]
    assert [version for version, _ in prepared] == ["v1", "v2"]
    assert all(name.startswith("deltaserve-prepare") for _, name in prepared)


def test_the_books_are_really_checked() -> None:
    for spoil, match in (
        (lambda b: b.residency.pool.reserve("ghost", 1), "claim them"),
        (lambda b: setattr(b.residency.pool, "used_bytes", 7), "device pool"),
        (lambda b: setattr(b.residency.cache, "used_bytes", 7), "host cache"),
        (lambda b: b.pins.update(v1=5), "pins booked"),
        (lambda b: setattr(b.residency._resident("v1"), "num_pins", 0), "idle"),
        (lambda b: setattr(b.residency._resident("v1"), "state", AdapterState.STORED), "slot"),
    ):
        bench = Bench()
        bench.load("v1", "v2")
        bench.acquire("v1")
        spoil(bench)
        with pytest.raises(RuntimeError, match=match):
            bench.check()
