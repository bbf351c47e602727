"""Launches of the row and column blocks over a work list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaserve_kernels.block_tables import BlockTables
from deltaserve_kernels.checks import Member
from deltaserve_kernels.tables import RANK_TILE
from deltaserve_kernels.triton_ops import block_kernels, guard
from deltaserve_kernels.triton_ops.lora import LoraForm
from deltaserve_kernels.triton_ops.members import groups_of
from deltaserve_kernels.triton_ops.tiles import row_tiles
from deltaserve_kernels.worklist import WorkList

# Narrow output tiles: each of its entries is looked up in every plane.
FORM = LoraForm(block_n=64)
BLOCK_COLUMNS = 32  # listed columns a step


def block_linear(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: BlockTables,
    members: Sequence[Member],
    depth: float,
    form: LoraForm = FORM,
) -> None:
    """``y[row, start:stop] += sum over parts of scale * put_O(D take_I x[row])``; see ``terms.block_linear``.

    Two launches, also where no adapter has listed rows and the first finds nothing to do: launches must not follow the
    adapters. Raises a KernelError.
    """
    guard.check_linear(y, x, work, tables, members)
    if work.is_empty:
        return
    in_features = x.shape[1]
    splits = form.splits(in_features)
    tiles = row_tiles(work, form.tile_rows)
    for group in groups_of(members):
        if not work.concerns(tables, group.members):
            continue
        plane_stride = len(group.members) * tables.row_capacity
        h = torch.empty(splits, tiles.num_plane_rows, plane_stride, dtype=torch.float32, device=x.device)
        planes = (h, h.stride(0), plane_stride, tables.row_capacity)
        lists = (*tiles.arguments(work), tables.pointers, tables.sizes, tables.num_slots, *group.linears, depth)
        shared: dict[str, Any] = {"TILE_ROWS": form.tile_rows, "num_warps": form.num_warps}
        block_kernels.shrink_blocks[(tiles.capacity, splits, len(group.members))](
            x, x.stride(0), *planes, *lists,
            K=in_features, CHUNK=form.chunk(in_features), BLOCK_K=form.block_k, RANK_TILE=RANK_TILE, **shared,
        )  # fmt: skip
        block_kernels.expand_blocks[(tiles.capacity, group.num_tiles(form.block_n))](
            y, y.stride(0), x, x.stride(0), *planes, *lists,
            SPLITS=splits, BLOCK_N=form.block_n, BLOCK_C=BLOCK_COLUMNS, **shared, **group.place,
        )  # fmt: skip
