"""Launches of the row and column blocks over a work list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaserve_kernels.block_tables import BlockTables
from deltaserve_kernels.checks import Member
from deltaserve_kernels.tables import RANK_TILE
from deltaserve_kernels.triton_ops import block_kernels, block_rows, guard, lora
from deltaserve_kernels.triton_ops.early import early
from deltaserve_kernels.triton_ops.lora import LoraForm
from deltaserve_kernels.triton_ops.members import MemberGroup, groups_of
from deltaserve_kernels.triton_ops.tiles import row_tiles
from deltaserve_kernels.worklist import WorkList


@dataclass(frozen=True)
class RowForm:
    """Rows one after another, one launch (``block_rows``). A window has ``block_n`` outputs; ``group`` rows of D are
    taken at a time, ``chunk`` inputs of each; of listed columns ``block_c``."""

    tile_rows: int = lora.DECODE.tile_rows
    block_n: int = 64
    group: int = 4
    chunk: int = 512
    block_c: int = 32
    num_warps: int = 4


DECODE = RowForm()
# Narrow output tiles: each of its entries is looked up in every plane. One plane: a step with prompts has rows enough
# to share out, and each plane of it is large.
PROMPTS = LoraForm(block_n=64, tile_rows=32, max_splits=1)
BLOCK_COLUMNS = 32  # listed columns a step of ``PROMPTS``


def block_linear(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: BlockTables,
    members: Sequence[Member],
    depth: float,
    form: RowForm | LoraForm | None = None,
) -> None:
    """``y[row, start:stop] += sum over parts of scale * put_O(D take_I x[row])``; see ``terms.block_linear``.

    No form: ``PROMPTS`` for a step with prompts, else ``DECODE``. The launches of a form are the same whatever the
    adapters list. Raises a KernelError.
    """
    if form is None:
        form = PROMPTS if work.has_prompts else DECODE
    guard.check_linear(y, x, work, tables, members)
    if work.is_empty:
        return
    for group in groups_of(members):
        if not work.concerns(tables, group.members):
            continue
        if isinstance(form, RowForm):
            _by_row(y, x, work, tables, group, depth, form)
        else:
            _by_tile(y, x, work, tables, group, depth, form)


def _by_row(
    y: Tensor, x: Tensor, work: WorkList, tables: BlockTables, group: MemberGroup, depth: float, form: RowForm
) -> None:
    tiles = row_tiles(work, form.tile_rows)
    block_rows.blocks_by_row[(tiles.capacity, group.num_tiles(form.block_n))](
        y, y.stride(0), x, x.stride(0), work.rows, tiles.records, work.part_slot, work.part_scale,
        tables.pointers, tables.sizes, tables.num_slots, *group.linears, depth,
        K=x.shape[1], CHUNK=form.chunk, GROUP=form.group, BLOCK_C=form.block_c, BLOCK_N=form.block_n,
        num_warps=form.num_warps, **group.place, **early(x.device),
    )  # fmt: skip


def _by_tile(
    y: Tensor, x: Tensor, work: WorkList, tables: BlockTables, group: MemberGroup, depth: float, form: LoraForm
) -> None:
    """Two launches, also where no adapter has listed rows and the first finds nothing to do."""
    in_features = x.shape[1]
    splits = form.splits(in_features)
    tiles = row_tiles(work, form.tile_rows)
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
