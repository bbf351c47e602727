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
from deltaserve_kernels.triton_ops import bucketed, guard, jagged, sparse_kernels, sparse_wide
from deltaserve_kernels.triton_ops.members import groups_of
from deltaserve_kernels.triton_ops.tiles import RowTiles, row_tiles
from deltaserve_kernels.worklist import WorkList


@dataclass(frozen=True)
class SparseForm:
    """Tiles, and how x is read. Untuned: no GPU has run them. ``tile_rows`` rows share one reading of a window.

    few:    tiles of at most so many rows read x from its rows; larger ones from a transposed copy, which is a launch of
            its own. ``few`` equal to ``tile_rows``: no copy. The bits of a row do not depend on it
    staged: those rows go through shared memory (a tile's rows one after another) instead of one load an element
    bucket: columns of a bucket, at most 16,384; None: all. Each bucket size in use needs a copy of the adapters
    wide:   for many rows an adapter (prefill): every tile reads the transposed copy, one line a nonzero
    """

    tile_rows: int = 8
    few: int = 2
    staged: bool = False
    bucket: int | None = None
    wide: bool = False
    num_warps: int = 4

    def bucket_of(self, in_features: int) -> int:
        return in_features if self.bucket is None else min(self.bucket, in_features)

    def stage(self, in_features: int) -> int:
        """Columns shared memory takes; 0 where rows are gathered: by choice, or because a bucket does not fit."""
        columns = triton.next_power_of_2(self.bucket_of(in_features))
        return columns if self.staged and columns <= MAX_STAGE else 0


DECODE = SparseForm()
GATHERED = SparseForm(tile_rows=4, few=4)
PREFILL = SparseForm(tile_rows=64, few=0, bucket=2048, wide=True)
MAX_STAGE = 16384  # columns: 32 KB of 16 bits, of the 48 KB that a decode kernel may take
_TRANSPOSE_K = 128
_MIN_TRANSPOSED = 16


def decode_form(num_rows: int) -> SparseForm:
    """By the step's number of rows alone: a few rows are not worth the launch that transposes x. Untuned.

    The two forms compute the same bits, so a row's do not depend on its company.
    """
    return GATHERED if num_rows < _MIN_TRANSPOSED else DECODE


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

    The form is the caller's choice, never the batch's; None: ``decode_form``, which leaves the bits alone. The first
    call has the tables convert what they hold, and a form with buckets converts what it meets first; that blocks.
    Raises a KernelError.
    """
    form = decode_form(work.num_rows) if form is None else form
    guard.check_linear(y, x, work, tables, members)
    if work.is_empty:
        return
    in_features = x.shape[1]
    pointers = tables.keep_jagged()
    for linear, _, _ in members:
        tables.expect_columns(linear, in_features)
    if form.bucket is not None and form.bucket < in_features:
        pointers = bucketed.pointers(tables, [linear for linear, _, _ in members], in_features, form.bucket)
    tiles = row_tiles(work, form.tile_rows)
    x_t = _transposed(x, work, tiles, form)
    for group in groups_of(members):
        if not work.concerns(tables, group.members):
            continue
        grid = (tiles.capacity, group.num_tiles(jagged.WINDOW))
        source: tuple[Any, ...] = (x_t,) if form.wide else (x, x.stride(0), x_t)
        reading = {} if form.wide else {"FEW": form.few, "STAGE": form.stage(in_features)}
        kernel = sparse_wide.sparse_wide if form.wide else sparse_kernels.sparse
        kernel[grid](
            y, y.stride(0), *source,
            tiles.tile_item, tiles.tile_first, work.rows, work.item_rows, work.item_parts, work.part_slot,
            work.part_scale, pointers, tables.num_slots,
            *group.linears, depth,
            K=in_features, BUCKET=form.bucket_of(in_features), TILE_ROWS=form.tile_rows,
            num_warps=form.num_warps, **reading, **group.place,
        )  # fmt: skip


def _transposed(x: Tensor, work: WorkList, tiles: RowTiles, form: SparseForm) -> Tensor:
    """x of the tiles that read it so, [blocks, K, tile_rows]; x itself where none does."""
    if form.few == form.tile_rows:
        return x
    in_features = x.shape[1]
    blocks = work.rows.numel() // (form.few + 1) + 1 if form.few else tiles.capacity
    x_t = torch.empty(blocks, in_features, form.tile_rows, dtype=x.dtype, device=x.device)
    sparse_wide.transpose[(tiles.capacity, triton.cdiv(in_features, _TRANSPOSE_K))](
        x_t, x, x.stride(0), tiles.tile_item, tiles.tile_first, work.rows, work.item_rows,
        K=in_features, BLOCK_K=_TRANSPOSE_K, TILE_ROWS=form.tile_rows, FEW=form.few,
    )  # fmt: skip
    return x_t
