"""Who is measured on low-rank cases: our forms, and what else there is in PyTorch. ``vendor.py`` adds others' kernels.

An implementation prepares a case (untimed: layouts, metadata) and gives a function that adds the adapters' terms of one
layer into y.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from deltabench.cases import AddDelta, Case, LoraCase
from deltaserve_kernels import BackendUnavailable, select

Origin = Literal["ours", "baseline", "vendor"]
# Largest difference from float64, relative to the largest value: one rounding of y, or of h as well.
ROUNDS_ONCE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9, torch.float32: 1e-5}
ROUNDS_BETWEEN = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


class NotPresent(Exception):
    """An implementation cannot be measured here; the message says why. Reported as "not present"."""


@dataclass(frozen=True)
class Implementation:
    """``capturable``: may be captured in a CUDA graph, in every build; others are tried (``probe``). ``layers``:
    measured over so many at most (0: no limit), for those with thousands of launches.
    ``prefill``: measured at prefill points, ``decode``: at the others. ``replaces_base``: writes y, base included, so
    what it adds is its time less the base's. ``exact``: rounds once."""

    name: str
    origin: Origin
    prepare: Callable[..., AddDelta]
    capturable: bool = True
    layers: int = 0
    decode: bool = True
    prefill: bool = False
    replaces_base: bool = False
    exact: bool = False

    def tolerance(self, dtype: torch.dtype) -> float:
        return (ROUNDS_ONCE if self.exact else ROUNDS_BETWEEN)[dtype]


def _form(name: str) -> Callable[[LoraCase], AddDelta]:
    def prepare(case: LoraCase) -> AddDelta:
        require_triton(case)
        lora = importlib.import_module("deltaserve_kernels.triton_ops.lora")
        form = getattr(lora, name)

        def run(layer: int, y: Tensor) -> None:
            lora.lora_linear(y, case.x, case.work, case.tables, case.members[layer], 0.0, form)

        return run

    return prepare


def require_triton(case: Case) -> None:
    """Raises NotPresent where our Triton operators cannot run on the case's device."""
    try:
        select(case.device, "triton")
    except BackendUnavailable as error:
        raise NotPresent(str(error)) from error


def _gathered_bmm(case: LoraCase) -> AddDelta:
    """Each row's adapter gathered, two batched products: common PyTorch, for few rows."""

    def run(layer: int, y: Tensor) -> None:
        for (start, stop), a, b_t in zip(case.columns, case.a[layer], case.b_t[layer], strict=True):
            h = torch.bmm(case.x.unsqueeze(1), a[case.owner].transpose(1, 2))
            y[:, start:stop] += torch.bmm(h, b_t[case.owner]).squeeze(1)

    return run


def _adapter_loop(case: LoraCase) -> AddDelta:
    """One adapter after another, as PEFT does it for a mixed batch."""

    def run(layer: int, y: Tensor) -> None:
        for (start, stop), a, b_t in zip(case.columns, case.a[layer], case.b_t[layer], strict=True):
            for adapter, rows in enumerate(case.groups):
                y[:, start:stop].index_add_(0, rows, case.x[rows] @ a[adapter].t() @ b_t[adapter])

    return run


def _merge_and_multiply(case: LoraCase) -> AddDelta:
    """One adapter after another folded into a copy of the weight, then a dense product for its rows: base included."""
    scratch = torch.empty_like(case.weights[0])

    def run(layer: int, y: Tensor) -> None:
        for adapter, rows in enumerate(case.groups):
            scratch.copy_(case.weights[layer])
            for (start, stop), a, b_t in zip(case.columns, case.a[layer], case.b_t[layer], strict=True):
                scratch[start:stop].addmm_(b_t[adapter].t(), a[adapter])
            y[rows] = case.x[rows] @ scratch.t()

    return run


def _all_slots(case: LoraCase) -> AddDelta:
    """Two large products over the adapters of all slots; a mask keeps each row's own."""
    slots, rank = case.point.num_slots, case.max_rank
    mask = F.one_hot(case.owner, slots).to(case.dtype).unsqueeze(2)

    def run(layer: int, y: Tensor) -> None:
        for (start, stop), a, b_t in zip(case.columns, case.a[layer], case.b_t[layer], strict=True):
            h = (case.x @ a.view(slots * rank, -1).t()).view(-1, slots, rank) * mask
            y[:, start:stop].addmm_(h.view(-1, slots * rank), b_t.view(slots * rank, -1))

    return run


def _grouped_mm(case: LoraCase) -> AddDelta:
    """torch's grouped GEMM over rows sorted by adapter, padded ranks."""
    grouped = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped is None:
        raise NotPresent(f"torch {torch.__version__} has no grouped_mm")
    if case.device.type != "cuda":
        raise NotPresent("grouped_mm is measured on CUDA only")
    if case.max_rank * case.dtype.itemsize % 16:
        raise NotPresent(f"grouped_mm wants rows of 16 bytes; rank {case.max_rank} is not")
    adapters = case.point.adapters
    ends = torch.tensor([len(rows) for rows in case.groups], device=case.device).cumsum(0).to(torch.int32)

    def run(layer: int, y: Tensor) -> None:
        x = case.x[case.order]
        for (start, stop), a, b_t in zip(case.columns, case.a[layer], case.b_t[layer], strict=True):
            h = grouped(x, a[:adapters].transpose(1, 2), offs=ends)
            y[:, start:stop].index_add_(0, case.order, grouped(h, b_t[:adapters], offs=ends))

    return run


OURS = (
    Implementation("by row", "ours", _form("DECODE"), exact=True),
    Implementation("two launches", "ours", _form("PRODUCTS"), exact=True),
    Implementation("one launch", "ours", _form("ONE_LAUNCH"), exact=True),
    Implementation("prefill form", "ours", _form("PREFILL"), decode=False, prefill=True),
)
BASELINES = (
    Implementation("gathered bmm", "baseline", _gathered_bmm),
    Implementation("all slots GEMM", "baseline", _all_slots),
    Implementation("torch grouped_mm", "baseline", _grouped_mm, capturable=False, prefill=True),
    Implementation("adapter loop", "baseline", _adapter_loop, layers=2, prefill=True),
    Implementation("merge and GEMM", "baseline", _merge_and_multiply, layers=1, replaces_base=True),
)
