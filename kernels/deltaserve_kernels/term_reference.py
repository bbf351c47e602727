"""The operators of ``terms`` in plain PyTorch: definition, oracle and fallback in one. See ``reference``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deltaserve_kernels import checks
from deltaserve_kernels.block_tables import BlockTables
from deltaserve_kernels.checks import Member
from deltaserve_kernels.reference import add_parts
from deltaserve_kernels.worklist import WorkList


def block_linear(
    y: Tensor, x: Tensor, work: WorkList, tables: BlockTables, members: Sequence[Member], depth: float
) -> None:
    """``y[row, start:stop] += sum over parts of scale * put_O(D take_I x[row])`` for every member and row."""
    checks.check_linear(y, x, work, tables, members)
    add_parts(y, x, work, tables, members, depth, _block_delta)


def _block_delta(x_tile: Tensor, inverse: Tensor, in_cols: Tensor, d: Tensor, scale: float) -> Tensor:
    taken = x_tile[:, in_cols.long()] if in_cols.numel() else x_tile
    if not inverse.numel():
        return taken @ d.float() * scale
    put = (taken @ d.float().t())[:, inverse.clamp(min=0).long()]
    return put.masked_fill(inverse < 0, 0.0) * scale
