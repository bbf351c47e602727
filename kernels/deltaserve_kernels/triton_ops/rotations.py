"""Launches of rotations over the rows of a list. Definition: ``deltaserve_kernels.rotations``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from deltaserve_kernels import row_checks
from deltaserve_kernels.checks import Member
from deltaserve_kernels.rotation_tables import RotationTables
from deltaserve_kernels.triton_ops import rotation_kernels
from deltaserve_kernels.triton_ops.early import early
from deltaserve_kernels.triton_ops.members import MAX_MEMBERS, groups_of
from deltaserve_kernels.triton_ops.row_items import listed_rows, row_items
from deltaserve_kernels.triton_ops.tiles import row_tiles
from deltaserve_kernels.worklist import WorkList

ROWS_AT_ONCE = 256
"""Rows that planes have room for where a rotation has several factors; a step with prompts that has more goes in
pieces."""


@dataclass(frozen=True)
class RotationForm:
    """``tile_rows`` rows share the reading of a block; inputs of a block go ``step`` at a time, ``block_n`` outputs."""

    tile_rows: int
    step: int
    block_n: int


DECODE = RotationForm(tile_rows=1, step=16, block_n=128)
PROMPTS = RotationForm(tile_rows=16, step=2, block_n=64)


def turn_rows(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: RotationTables,
    members: Sequence[Member],
    depth: float,
    num_factors: int,
    num_fanned: int = 0,
) -> None:
    """``vector_rows.turn_rows`` and, with the number of listed rows, ``turn_fanned``: a launch for each of
    ``num_factors``. Raises a KernelError."""
    row_checks.check_turned(y, x, work, tables, members, num_fanned)
    form = PROMPTS if work.has_prompts else DECODE
    if work.is_empty:
        return
    rows, tiles = (listed_rows(work), None) if form is DECODE else (work.rows, row_tiles(work, form.tile_rows))
    capacity = len(rows) if tiles is None else tiles.capacity
    piece, planes, widest = capacity, work.part_scale, max(stop - start for _, start, stop in members)
    if num_factors > 1:
        if tiles is not None:
            piece = min(capacity, ROWS_AT_ONCE // form.tile_rows)
        planes = torch.empty(2, piece * form.tile_rows, MAX_MEMBERS, widest, dtype=torch.float32, device=x.device)
    lists = (
        rows, row_items(work), work.item_parts, work.item_parts if tiles is None else tiles.records, work.part_slot,
        work.part_scale, tables.pointers, tables.num_slots,
    )  # fmt: skip
    for number, group in enumerate(groups_of(members)):
        first_row = work.num_rows + number * MAX_MEMBERS * num_fanned
        for begin in range(0, capacity, piece):
            grid = (min(piece, capacity - begin), triton.cdiv(max(group.widths), form.block_n), len(group.members))
            for factor in range(num_factors):
                rotation_kernels.turn_rows[grid](
                    y, y.stride(0), x, x.stride(0), planes, planes.stride(0), MAX_MEMBERS * widest, *lists,
                    *group.linears, *group.widths, *group.columns, factor, depth, begin, first_row, num_fanned,
                    TILE_ROWS=form.tile_rows, STEP=form.step, BLOCK_N=form.block_n, num_warps=4, **early(x.device),
                )  # fmt: skip
