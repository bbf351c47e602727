"""Launches of rotations over a work list."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from deltaserve_kernels.checks import Member
from deltaserve_kernels.errors import ShapeMismatch
from deltaserve_kernels.rotation_tables import RotationTables
from deltaserve_kernels.triton_ops import guard, lora, rotation_kernels
from deltaserve_kernels.triton_ops.members import groups_of
from deltaserve_kernels.triton_ops.tiles import row_tiles
from deltaserve_kernels.worklist import WorkList

BLOCK_N = 128


def rotate_blocks(
    y: Tensor, x: Tensor, work: WorkList, tables: RotationTables, members: Sequence[Member], depth: float
) -> None:
    """``y[row, start:stop] += sum over parts of scale * (R(x) - x)[row, start:stop]``; see ``rotations.rotate_blocks``.

    One launch for each factor that some entry has, and one that adds. Raises a KernelError.
    """
    if x.shape != y.shape:
        raise ShapeMismatch(f"x is {list(x.shape)} and y {list(y.shape)}; one shape is needed")
    for linear, start, stop in members:
        tables.check_width(linear, stop - start)
        guard.check_linear(y, x[:, start:stop], work, tables, ((linear, start, stop),))
    if work.is_empty:
        return
    tiles = row_tiles(work, lora.DECODE.tile_rows)
    width = x.shape[1]
    h = torch.empty(tables.max_factors, tiles.num_plane_rows, width, dtype=torch.float32, device=x.device)
    planes = (h, h.stride(0), width)
    for group in groups_of(members):
        if not work.concerns(tables, group.members):
            continue
        grid = (tiles.capacity, triton.cdiv(max(group.widths), BLOCK_N), len(group.members))
        places = (tables.num_slots, *group.linears, *group.widths, *group.columns)
        for factor in range(tables.max_factors):
            rotation_kernels.turn_rows[grid](
                *planes, x, x.stride(0), work.rows, tiles.records, work.part_slot, tables.pointers, *places, factor,
                BLOCK_N=BLOCK_N, num_warps=4,
            )  # fmt: skip
        rotation_kernels.add_turned[grid](
            y, y.stride(0), *planes, work.rows, tiles.records, work.part_slot, work.part_scale, tables.pointers,
            *places, depth, BLOCK_N=BLOCK_N, num_warps=4,
        )  # fmt: skip
