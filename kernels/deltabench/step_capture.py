"""Captures of decode steps that remember what was replayed last, so that it can be timed without the host's part."""

from __future__ import annotations

from collections.abc import Callable

import torch

from deltabench.timing import count_nodes, new_graph, record

Pass = Callable[[], None]
TRIAL_RUNS = 2


class HostCapture:
    """No graph: the pass itself, where there is no GPU."""

    def __init__(self) -> None:
        self.last: Pass | None = None
        self.last_nodes: int | None = None

    def __call__(self, run: Pass) -> Pass:
        def replay() -> None:
            self.last = run
            run()

        return replay


class CountingCapture:
    """CUDA graphs as the server captures them, kept so that their nodes can be counted."""

    def __init__(self, device: torch.device) -> None:
        self.last: Pass | None = None
        self.last_nodes: int | None = None
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Pass) -> Pass:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(TRIAL_RUNS):
                run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = new_graph()
        record(graph, [run], pool=self._pool, stream=self._stream)
        nodes = count_nodes(graph)

        def replay() -> None:
            self.last, self.last_nodes = graph.replay, nodes
            graph.replay()

        return replay
