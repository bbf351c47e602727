"""Clocks. All take calls and tell the time of one pass through them: a median over many passes, nothing averaged away.

    GraphClock  calls captured in one CUDA graph, replays between events: device time, no host in it
    QueueClock  the same calls launched one by one while the device is held up, so that the host is ahead: for calls
                that may not be captured. Device time, with the gaps between launches that a graph would not have
    WallClock   the host's clock, where there is no GPU: the twin by which everything else is tried

Each call works on a layer of its own, so that what one pass has read does not lie in the cache for the next.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], object]
ROUNDS = 20
WARM_UPS = 3
HOLD_CYCLES = 10_000_000  # about 5 ms: longer than the host needs to queue a pass


@dataclass(frozen=True)
class Timing:
    """Microseconds of one pass; ``nodes`` of the captured graph, None where there is none or it does not tell."""

    median_us: float
    min_us: float
    max_us: float
    rounds: int
    clock: str
    nodes: int | None = None


class Clock(Protocol):
    name: str

    def time(self, calls: Sequence[Call], rounds: int = ROUNDS) -> Timing:
        """One pass through ``calls``, after warm-up passes."""


class WallClock:
    name = "wall clock"

    def time(self, calls: Sequence[Call], rounds: int = ROUNDS) -> Timing:
        samples = []
        for index in range(rounds + 1):
            started = time.perf_counter()
            for call in calls:
                call()
            if index:
                samples.append((time.perf_counter() - started) * 1e6)
        return summary(samples, self.name)


class GraphClock:
    name = "cuda graph"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def time(self, calls: Sequence[Call], rounds: int = ROUNDS) -> Timing:
        graph = capture(calls)
        nodes = count_nodes(graph)
        for _ in range(WARM_UPS):
            graph.replay()
        torch.cuda.synchronize(self.device)
        samples = timed_passes(graph.replay, rounds, self.device)
        graph.reset()
        return summary(samples, self.name, nodes)


class QueueClock:
    name = "queued launches"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def time(self, calls: Sequence[Call], rounds: int = ROUNDS) -> Timing:
        def one_pass() -> None:
            for call in calls:
                call()

        for _ in range(WARM_UPS):
            one_pass()
        torch.cuda.synchronize(self.device)
        samples = [timed_passes(one_pass, 1, self.device)[0] for _ in range(rounds)]
        return summary(samples, self.name)


def timed_passes(one_pass: Call, rounds: int, device: torch.device) -> list[float]:
    """Microseconds of each pass between events. The device is held up first, so that it never waits for the host."""
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(rounds)]
    stops = [torch.cuda.Event(enable_timing=True) for _ in range(rounds)]
    hold()
    for start, stop in zip(starts, stops, strict=True):
        start.record()
        one_pass()
        stop.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(stop) * 1e3 for start, stop in zip(starts, stops, strict=True)]


def hold() -> None:
    """Keep the device busy for some milliseconds. Without torch's spinning kernel the first pass may show host time,
    which a median leaves out."""
    spin = getattr(torch.cuda, "_sleep", None)
    if spin is not None:
        spin(HOLD_CYCLES)


class CaptureFailed(RuntimeError):
    """A capture that broke half-way. What it leaves behind (streams, pools of memory) can spoil later ones, so the
    process should end."""


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """One graph of all calls, which run before on a stream of their own: what compiles or allocates does so then."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = new_graph()
    record(graph, calls)
    return graph


def record(graph: torch.cuda.CUDAGraph, calls: Sequence[Call], **options: Any) -> None:
    """Capture calls that have run before. ``options`` of ``torch.cuda.graph``. Raises CaptureFailed."""
    try:
        with torch.cuda.graph(graph, **options):
            for call in calls:
                call()
    except Exception as error:
        raise CaptureFailed(f"{type(error).__name__}: {str(error)[:300]}") from error


def new_graph() -> torch.cuda.CUDAGraph:
    """One that keeps what it captured, so that its nodes can be counted, where this torch has such."""
    try:
        return torch.cuda.CUDAGraph(keep_graph=True)
    except TypeError:
        return torch.cuda.CUDAGraph()


def count_nodes(graph: torch.cuda.CUDAGraph) -> int | None:
    """Nodes of a captured graph (kernels, copies, memsets), or None where CUDA's runtime cannot be asked."""
    try:
        major = str(torch.version.cuda).split(".", maxsplit=1)[0]
        runtime = ctypes.CDLL(f"libcudart.so.{major}")
        count = ctypes.c_size_t(0)
        status = runtime.cudaGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    except (OSError, AttributeError, RuntimeError):
        return None
    return int(count.value) if status == 0 else None


def summary(samples: Sequence[float], clock: str, nodes: int | None = None) -> Timing:
    return Timing(statistics.median(samples), min(samples), max(samples), len(samples), clock, nodes)


def is_alive(device: torch.device) -> bool:
    """False after a fault that no later call of this process survives, such as an illegal address."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True
