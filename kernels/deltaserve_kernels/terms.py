"""Public operators of further adapter terms. On a CPU the PyTorch definition runs, whatever the default backend."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from deltaserve_kernels import term_reference
from deltaserve_kernels.backend import select
from deltaserve_kernels.block_tables import BlockTables
from deltaserve_kernels.checks import Member
from deltaserve_kernels.worklist import WorkList


def _implementation(device: torch.device, backend: str | None) -> ModuleType:
    if select(device, backend) == "triton":
        from deltaserve_kernels.triton_ops import entry

        return entry
    return term_reference


def block_linear(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: BlockTables,
    members: Sequence[Member],
    depth: float = 0.0,
    *,
    backend: str | None = None,
) -> None:
    """Add row and column blocks in place: ``y[row, start:stop] += sum over parts of scale * put_O(D take_I x[row])``.

    Arguments, precision, order and errors as in ``lora_linear``.
    """
    if not work.is_empty and work.concerns(tables, members):
        _implementation(x.device, backend).block_linear(y, x, work, tables, members, depth)
