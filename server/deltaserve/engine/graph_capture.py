"""How a pass over static inputs becomes something that can be run again without its host code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Pass = Callable[[], None]

NUM_TRIAL_RUNS = 2
"""Ordinary runs before a capture: kernels compile, libraries make their work areas, lazily made buffers are there."""


class Capture(Protocol):
    """Turns a pass into a replay: the same operations on the same memory, reading no host state again."""

    def __call__(self, run: Pass) -> Pass: ...


class CudaCapture:
    """CUDA graphs. All share one memory pool, so no two may run at once, and what a pass allocates is overwritten by
    other graphs' replays: results belong into memory made outside. Capture large passes before small ones, which then
    fit into their memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Pass) -> Pass:
        """Runs ``run`` for trial, captures it; the replay goes to the stream that is current when it is called."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(NUM_TRIAL_RUNS):
                    run()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads (adapters on their way to the device) may allocate meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                run()
        return graph.replay
