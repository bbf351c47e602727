"""Who is measured on sparse cases: our kernel, merging per adapter, torch's sparse products."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from deltabench.cases import AddDelta, SparseCase, row_of_entry
from deltabench.implementations import Implementation, NotPresent, require_triton


def _form(*names: str) -> Callable[[SparseCase], AddDelta]:
    """The first of these forms that the operators have."""

    def prepare(case: SparseCase) -> AddDelta:
        require_triton(case)
        sparse = importlib.import_module("deltaserve_kernels.triton_ops.sparse")
        form = next((getattr(sparse, name) for name in names if hasattr(sparse, name)), None)
        if form is None:
            raise NotPresent(f"the sparse operator has no form {names[0]}")

        def run(layer: int, y: Tensor) -> None:
            sparse.sparse_linear(y, case.x, case.work, case.tables, case.members[layer], 0.0, form)

        return run

    return prepare


def _merge_and_multiply(case: SparseCase) -> AddDelta:
    """One adapter after another scattered into a copy of the weight, as PEFT's SHiRA does it, then a dense product for
    its rows: base included."""
    scratch = torch.empty_like(case.weights[0])
    width = case.group.in_features
    flat = [
        [
            [((row_of_entry(one.indptr) + start) * width + one.cols, one.values) for one in of_member]
            for (start, _), of_member in zip(case.columns, of_layer, strict=True)
        ]
        for of_layer in case.csr
    ]

    def run(layer: int, y: Tensor) -> None:
        for adapter, rows in enumerate(case.groups):
            scratch.copy_(case.weights[layer])
            for of_member in flat[layer]:
                scratch.view(-1).index_add_(0, *of_member[adapter])
            y[rows] = case.x[rows] @ scratch.t()

    return run


def _csr_loop(case: SparseCase) -> AddDelta:
    """torch's CSR product, one adapter after another."""
    if case.device.type == "cpu" and case.dtype != torch.float32:
        raise NotPresent(f"torch multiplies no {case.dtype} CSR matrix on the host")
    width = case.group.in_features
    matrices = [
        [
            [
                torch.sparse_csr_tensor(*one[:3], size=(one.indptr.numel() - 1, width), check_invariants=False)
                for one in of_member
            ]
            for of_member in of_layer
        ]
        for of_layer in case.csr
    ]

    def run(layer: int, y: Tensor) -> None:
        for (start, stop), of_member in zip(case.columns, matrices[layer], strict=True):
            for adapter, rows in enumerate(case.groups):
                y[:, start:stop].index_add_(0, rows, (of_member[adapter] @ case.x[rows].t()).t())

    return run


OURS = (
    Implementation("sparse kernel", "ours", _form("DECODE"), exact=True),
    Implementation("sparse for prompts", "ours", _form("PROMPTS"), decode=False, prefill=True),
)
BASELINES = (
    Implementation("merge and GEMM", "baseline", _merge_and_multiply, layers=1, replaces_base=True, prefill=True),
    Implementation("torch CSR loop", "baseline", _csr_loop, layers=2, capturable=False, prefill=True),
)
