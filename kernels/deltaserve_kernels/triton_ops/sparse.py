"""Launches of the sparse kernel. It reads the jagged form of deltas, which ``SparseTables`` keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from deltaserve_kernels.checks import Member
from deltaserve_kernels.tables import SparseTables
from deltaserve_kernels.triton_ops import guard, jagged, sparse_kernels, sparse_wide
from deltaserve_kernels.triton_ops.early import early
from deltaserve_kernels.triton_ops.members import groups_of
from deltaserve_kernels.triton_ops.tiles import RowTiles, row_tiles
from deltaserve_kernels.worklist import WorkList


@dataclass(frozen=True)
class SparseForm:
    """Tiles, and how x is read. ``tile_rows`` rows share a tile.

    wide:   for many rows an adapter (prefill): every tile reads a transposed copy of x, one line a nonzero, which is a
            launch of its own. Otherwise rows are taken one after another
    staged: a row of x goes through shared memory, where it fits, instead of one load an element
    step:   diagonals that are read at a time, each up to four entries of 128 outputs
    """

    tile_rows: int = 2
    wide: bool = False
    staged: bool = True
    step: int = 4
    num_warps: int = 4

    def stage(self, in_features: int) -> int:
        """Columns shared memory takes; 0 where x is gathered: by choice, or because a row does not fit."""
        columns = triton.next_power_of_2(in_features)
        return columns if self.staged and columns <= MAX_STAGE else 0


DECODE = SparseForm()
PROMPTS = SparseForm(wide=True, tile_rows=32)
MAX_STAGE = 16384  # columns: 32 KB of 16 bits, of the 48 KB that a decode kernel may take
_TRANSPOSE_K = 128


def sparse_linear(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: SparseTables,
    members: Sequence[Member],
    depth: float,
    form: SparseForm | None = None,
) -> None:
    """``y[row, start:stop] += sum over parts of scale * (S x[row])``; see ``operators.sparse_linear``.

    No form: ``PROMPTS`` for a step with prompts, else ``DECODE``. The first call has the tables convert what they hold,
    which blocks. Raises a KernelError.
    """
    if form is None:
        form = PROMPTS if work.has_prompts else DECODE
    guard.check_linear(y, x, work, tables, members)
    if work.is_empty:
        return
    in_features = x.shape[1]
    pointers = tables.keep_jagged()
    for linear, _, _ in members:
        tables.expect_columns(linear, in_features)
    tiles = row_tiles(work, form.tile_rows)
    x_t = _transposed(x, work, tiles) if form.wide else x
    for group in groups_of(members):
        if not work.concerns(tables, group.members):
            continue
        grid = (tiles.capacity, group.num_tiles(jagged.WINDOW))
        last: tuple[Any, ...] = (work.part_slot, work.part_scale, pointers, tables.num_slots, *group.linears, depth)
        if form.wide:
            sparse_wide.sparse_wide[grid](
                y, y.stride(0), x_t, tiles.tile_item, tiles.tile_first, work.rows, work.item_rows, work.item_parts,
                *last, K=in_features, TILE_ROWS=form.tile_rows,
                num_warps=form.num_warps, **group.place,
            )  # fmt: skip
        else:
            sparse_kernels.sparse[grid](
                y, y.stride(0), x, x.stride(0), work.rows, tiles.records, *last,
                K=in_features, STAGE=form.stage(in_features), STEP=form.step,
                num_warps=form.num_warps, **group.place, **early(x.device),
            )  # fmt: skip


def _transposed(x: Tensor, work: WorkList, tiles: RowTiles) -> Tensor:
    """x of every tile, [tiles, K, tile_rows]."""
    in_features = x.shape[1]
    x_t = torch.empty(tiles.capacity, in_features, tiles.tile_rows, dtype=x.dtype, device=x.device)
    sparse_wide.transpose[(tiles.capacity, triton.cdiv(in_features, _TRANSPOSE_K))](
        x_t, x, x.stride(0), tiles.tile_item, tiles.tile_first, work.rows, work.item_rows,
        K=in_features, BLOCK_K=_TRANSPOSE_K, TILE_ROWS=tiles.tile_rows,
    )  # fmt: skip
    return x_t
