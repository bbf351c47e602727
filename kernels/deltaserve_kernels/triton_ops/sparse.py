"""Launches of the sparse kernel. It reads the jagged copies that ``SparseTables`` keeps of its CSR deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
from torch import Tensor

from deltaserve_kernels.checks import Member
from deltaserve_kernels.tables import SparseTables
from deltaserve_kernels.triton_ops import guard, jagged, sparse_kernels
from deltaserve_kernels.triton_ops.lora import MAX_MEMBERS, place_of
from deltaserve_kernels.triton_ops.tiles import row_tiles
from deltaserve_kernels.worklist import WorkList


@dataclass(frozen=True)
class SparseForm:
    """Tiles. Untuned: no GPU has run them. ``tile_rows`` rows share one reading of a window; x is gathered from its
    rows, element by element, which suits few rows an adapter."""

    tile_rows: int = 4
    unroll: int = 8
    num_warps: int = 4


DEFAULT = SparseForm()


def sparse_linear(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: SparseTables,
    members: Sequence[Member],
    depth: float,
    form: SparseForm = DEFAULT,
) -> None:
    """``y[row, start:stop] += sum over parts of scale * (S x[row])``; see ``operators.sparse_linear``.

    The first call has the tables convert what they hold, which blocks. Raises a KernelError.
    """
    guard.check_linear(y, x, work, tables, members)
    if work.is_empty:
        return
    pointers = tables.keep_jagged()
    for linear, _, _ in members:
        tables.expect_columns(linear, x.shape[1])
    tiles = row_tiles(work, form.tile_rows)
    for begin in range(0, len(members), MAX_MEMBERS):
        group = members[begin : begin + MAX_MEMBERS]
        if not work.concerns(tables, group):
            continue
        padded = [*group, *[(0, 0, 0)] * (MAX_MEMBERS - len(group))]
        widths = [stop - start for _, start, stop in padded]
        columns = [start for _, start, _ in padded]
        windows = sum(triton.cdiv(width, jagged.WINDOW) for width in widths)
        sparse_kernels.sparse[(tiles.capacity, windows)](
            y, y.stride(0), x, x.stride(0),
            tiles.tile_item, tiles.tile_first, work.rows, work.item_rows, work.item_parts, work.part_slot,
            work.part_scale, pointers, tables.num_slots,
            *[linear for linear, _, _ in padded], depth,
            TILE_ROWS=form.tile_rows, WINDOW=jagged.WINDOW, UNROLL=form.unroll,
            num_warps=form.num_warps, **place_of(widths, columns),
        )  # fmt: skip
