from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import time
import types
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch

from deltabench import machine, rates
from deltabench.step_capture import CountingCapture
from deltabench.timing import CaptureFailed, GraphClock, QueueClock, WallClock, is_alive, summary


def test_the_wall_clock_tells_the_time_of_one_pass() -> None:
    calls = []

    def work() -> None:
        calls.append(1)
        time.sleep(0.002)

    timing = WallClock().time([work, work], rounds=5)
    assert len(calls) == 12  # one pass before the five
    assert timing.rounds == 5
    assert 4000 <= timing.min_us <= timing.median_us <= timing.max_us
    assert timing.nodes is None


def test_a_summary_is_the_median_not_the_mean() -> None:
    timing = summary([1.0, 2.0, 300.0], "clock")
    assert (timing.median_us, timing.min_us, timing.max_us) == (2.0, 1.0, 300.0)


def test_rates_of_the_host_are_plausible() -> None:
    found = rates.measure(torch.device("cpu"), torch.float32)
    assert 1e8 < found.copy < 1e13
    assert 1e8 < found.gemm < 1e15
    assert found.seconds(found.copy) == pytest.approx(1.0)
    assert found.seconds(0.0, 2 * found.gemm) == pytest.approx(2.0)
    assert rates.launch_us(torch.device("cpu")) is None


def test_the_host_is_alive_and_described() -> None:
    assert is_alive(torch.device("cpu"))
    found = machine.describe(torch.device("cpu"))
    assert found["gpu"] is None
    assert found["processor"]
    assert machine.versions()["torch"] is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, whose clock it is")
def test_device_clocks_time_what_really_ran() -> None:
    """Other tests may run on the device meanwhile, so times are only bounded from below: by a speed no memory has."""
    device = torch.device("cuda")
    source = torch.arange(2**26, dtype=torch.int32, device=device)
    for clock in (GraphClock(device), QueueClock(device)):
        target = torch.empty_like(source)
        timing = clock.time([functools.partial(target.copy_, source)] * 4, rounds=5)
        assert torch.equal(target, source)
        assert timing.median_us * 1e-6 > 4 * 2 * source.nbytes / 30e12
        assert timing.nodes in (None, 4)
    launch = rates.launch_us(device)
    assert launch is not None
    assert launch > 0
    assert 1e11 < rates.measure(device, torch.bfloat16).copy < 30e12


class FakeGraph:
    """Stands for a captured graph: replays what ran between the beginning and the end of its capture."""

    made: ClassVar[list[FakeGraph]] = []

    def __init__(self, keep_graph: bool = False) -> None:
        self.calls: list[str] = []
        self.replays = 0
        self.was_reset = False
        FakeGraph.made.append(self)

    def replay(self) -> None:
        assert not self.was_reset
        self.replays += 1

    def reset(self) -> None:
        self.was_reset = True

    def raw_cuda_graph(self) -> int:
        return 4711


class FakeStream:
    def __init__(self, *_: object) -> None: ...

    def wait_stream(self, other: object) -> None: ...


class FakeEvent:
    """One microsecond passes between any two events."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.now += 1e-3
        self.at = FakeEvent.now

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


@contextlib.contextmanager
def fake_capture(graph: FakeGraph, pool: object = None, stream: object = None) -> Iterator[None]:
    graph.calls.append("begin")
    yield
    graph.calls.append("end")


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGraph.made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "graph", fake_capture)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: FakeStream())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None, raising=False)


def test_the_graph_clock_replays_what_it_captured_once(fake_cuda: None) -> None:
    calls: list[int] = []
    timing = GraphClock(torch.device("cuda")).time([lambda: calls.append(1)] * 3, rounds=20)
    (graph,) = FakeGraph.made
    assert len(calls) == 6  # once before, once captured
    assert graph.calls == ["begin", "end"]
    assert graph.replays == 23
    assert graph.was_reset
    assert (timing.rounds, timing.clock) == (20, "cuda graph")
    assert timing.median_us == pytest.approx(1.0)


def test_the_queue_clock_launches_every_pass(fake_cuda: None) -> None:
    calls: list[int] = []
    timing = QueueClock(torch.device("cuda")).time([lambda: calls.append(1)], rounds=5)
    assert len(calls) == 8
    assert (timing.rounds, timing.clock, timing.nodes) == (5, "queued launches", None)


def test_a_capture_that_breaks_says_so(fake_cuda: None) -> None:
    calls: list[int] = []

    def breaks_when_captured() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("operation not permitted when stream is capturing")

    with pytest.raises(CaptureFailed, match="not permitted"):
        GraphClock(torch.device("cuda")).time([breaks_when_captured])


def test_nodes_are_asked_from_the_runtime(monkeypatch: pytest.MonkeyPatch, fake_cuda: None) -> None:
    def get_nodes(graph: ctypes.c_void_p, nodes: None, count: object) -> int:
        assert graph.value == 4711
        assert nodes is None
        count._obj.value = 12  # type: ignore[attr-defined]
        return 0

    asked: list[str] = []

    def load(name: str) -> types.SimpleNamespace:
        asked.append(name)
        return types.SimpleNamespace(cudaGraphGetNodes=get_nodes)

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert GraphClock(torch.device("cuda")).time([lambda: None]).nodes == 12
    assert asked == ["libcudart.so.13"]


def test_nodes_are_unknown_without_the_runtime(fake_cuda: None) -> None:
    assert GraphClock(torch.device("cuda")).time([lambda: None]).nodes is None


def test_steps_remember_the_graph_replayed_last(fake_cuda: None) -> None:
    calls: list[str] = []
    capture = CountingCapture(torch.device("cuda"))
    first, second = capture(lambda: calls.append("first")), capture(lambda: calls.append("second"))
    assert calls == ["first"] * 3 + ["second"] * 3
    second()
    first()
    assert capture.last is not None
    capture.last()
    assert [graph.replays for graph in FakeGraph.made] == [2, 1]


def test_this_torch_takes_what_captures_ask_for() -> None:
    assert {"pool", "stream"} <= set(inspect.signature(torch.cuda.graph.__init__).parameters)
    assert "keep_graph" in inspect.signature(torch.cuda.CUDAGraph.__new__).parameters
