"""``rotate_blocks``: rotations of a linear's input or output, row by row.

The definition runs in tiles of a fixed number of rows (see ``reference``): who else is in the step changes no shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaserve_kernels.backend import select
from deltaserve_kernels.checks import Member, check_linear
from deltaserve_kernels.errors import ShapeMismatch
from deltaserve_kernels.reference import TILE_ROWS, items_of
from deltaserve_kernels.rotation_tables import RotationEntry, RotationTables
from deltaserve_kernels.worklist import WorkList


def rotate_blocks(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: RotationTables,
    members: Sequence[Member],
    depth: float = 0.0,
    *,
    backend: str | None = None,
) -> None:
    """``y[row, start:stop] += sum over parts of scale * (R(x) - x)[row, start:stop]``, rounded once.

    x [T, N] is what is turned, y [T, N] what the change is added to: mostly a copy of x, and not x itself. R are a
    part's factors one after the other. A part at scale 0, rows and members without an entry change nothing, to the
    bit. fp32 sums in binding order; members, ``depth`` and errors as in ``lora_linear``. On a GPU the
    definition: Triton's form is ``vector_rows.turn_rows``, for rows that one part of their binding turns.
    """
    if work.is_empty or not work.concerns(tables, members):
        return
    if select(y.device, backend) == "cpu":
        from deltaserve_kernels import cpu

        cpu.rotate_blocks(y, x, work, tables, members, depth)
    else:
        rotate_by_definition(y, x, work, tables, members, depth)


def rotate_by_definition(
    y: Tensor, x: Tensor, work: WorkList, tables: RotationTables, members: Sequence[Member], depth: float
) -> None:
    check_linear(y, x, work, tables, members)
    if x.shape != y.shape:
        raise ShapeMismatch(f"x is {list(x.shape)} and y {list(y.shape)}; one shape is needed")
    for rows, parts in items_of(work):
        for linear, start, stop in members:
            found = [(tables.factors(linear, slot), first + (last - first) * depth) for slot, first, last in parts]
            active = [(factors, scale) for factors, scale in found if factors is not None and scale]
            if not active:
                continue
            for factors, _ in active:
                _check_width(linear, factors, stop - start)
            for at in range(0, len(rows), TILE_ROWS):
                index = torch.tensor(rows[at : at + TILE_ROWS], device=x.device)
                tile = torch.zeros(TILE_ROWS, stop - start, device=x.device)
                tile[: len(index)] = x[index, start:stop].float()
                total = torch.stack([scale * rotation_change(tile, factors) for factors, scale in active]).sum(0)
                y[index, start:stop] = (y[index, start:stop].float() + total[: len(index)]).to(y.dtype)


def rotation_change(x: Tensor, factors: RotationEntry) -> Tensor:
    """``R(x) - x`` of fp32 rows x [R, N], in fp32: small where the rotation is, and not the difference of two."""
    change = torch.zeros_like(x)
    for blocks, order in factors:
        turned = x + change
        cut = turned if order is None else turned[:, order.long()]
        size = blocks.shape[1]
        cut = cut.view(len(x), -1, size).transpose(0, 1)  # [N / b, R, b]
        step = torch.bmm(cut, blocks.float().expand(len(cut), -1, -1)).transpose(0, 1).reshape(x.shape)
        if order is not None:
            step = torch.empty_like(step).index_copy_(1, order.long(), step)
        change = change + step
    return change


def _check_width(linear: int, factors: RotationEntry, width: int) -> None:
    for factor in factors:
        size = factor.blocks.shape[1]
        if width % size or factor.width not in (0, width):
            raise ShapeMismatch(f"linear {linear}: blocks {list(factor.blocks.shape)} do not cut {width} columns")
