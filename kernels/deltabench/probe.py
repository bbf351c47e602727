"""Which baselines can be captured in a CUDA graph on this machine: tried in a process that nothing else depends on.

A capture that breaks can spoil those that come after it, so nobody tries during measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from deltabench import implementations, sparse_implementations
from deltabench.cases import Case, LoraCase, SparseCase
from deltabench.floors import FusedLinear
from deltabench.implementations import Implementation
from deltabench.kernel_section import check
from deltabench.points import uniform
from deltabench.timing import capture

SMALL = FusedLinear("small", 256, (256,))


def find(device: torch.device, dtype: torch.dtype, tell: Callable[[str, str], None]) -> None:
    """Calls ``tell(name, "")`` for each that can be captured and replays right, else ``tell(name, why not)``."""
    point = uniform(4, 2, 16)
    for one in implementations.BASELINES:
        if not one.capturable:
            tell(one.name, _reason(LoraCase(SMALL, point, 1, dtype, device), one))
    for one in sparse_implementations.BASELINES:
        if not one.capturable:
            tell(one.name, _reason(SparseCase(SMALL, point, 1, dtype, device, 0.05), one))


def _reason(case: Case, one: Implementation) -> str:
    try:
        run = one.prepare(case)
        check(case, one, run)
        before = case.y.clone()
        wanted, found = before.clone(), before.clone()
        run(0, wanted)
        graph = capture([partial(run, 0, found)])
        found.copy_(before)
        graph.replay()
        torch.cuda.synchronize(case.device)
    except Exception as error:  # whatever it is, it is no way to measure
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "" if torch.allclose(found.float(), wanted.float(), rtol=1e-2, atol=1e-2) else "a replay gave other numbers"
