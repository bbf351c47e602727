"""The sparse kernel of decode: windowed jagged diagonals (``jagged``) times the rows of a work list.

A program takes one window of 128 outputs and one tile of rows: it reads 8 diagonals at a time, wide, reads x at their
columns, sums in fp32, and at the end brings lanes back into row order, so that y is read and written contiguously.

How x is read goes by the tile's number of rows, which the device alone knows: up to FEW rows, element by element from
the rows themselves, or out of shared memory, where the row was put first (STAGE); more, from a transposed copy, where
one load serves all rows of the tile. A row's bits do not depend on which it was: each form computes the same fused
multiply-adds in the same order, eight sums over the diagonals j, j + 8, ..., added as one fixed tree.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.triton_ops.lora_kernels import pick, scale_of
from deltaserve_kernels.triton_ops.lora_programs import VARYING as LORA_VARYING
from deltaserve_kernels.triton_ops.lora_programs import place

VARYING = [name for name in LORA_VARYING if name not in ("item_plane", "ranks", "vectors")]
UNROLL = tl.constexpr(8)
WINDOW = tl.constexpr(128)


@triton.jit
def array(pointers, which, linear, slot, num_slots):
    """Address of one array of (linear, slot), or 0. int64 [linear][5][slot]."""
    return tl.load(pointers + (linear * 5 + which) * num_slots + slot)


@triton.jit
def delta_of(x, pointers, linear, slot, num_slots):
    """(columns, values, diagonals, first diagonals of cells, lanes) of an entry that is there."""
    cols = array(pointers, 0, linear, slot, num_slots).to(tl.pointer_type(tl.int16))
    values = array(pointers, 1, linear, slot, num_slots).to(tl.pointer_type(x.dtype.element_ty))
    diagonals = array(pointers, 2, linear, slot, num_slots).to(tl.pointer_type(tl.int32))
    cell_first = array(pointers, 3, linear, slot, num_slots).to(tl.pointer_type(tl.int32))
    lanes = array(pointers, 4, linear, slot, num_slots).to(tl.pointer_type(tl.int16))
    return (
        tl.multiple_of(cols, 16), tl.multiple_of(values, 16), tl.multiple_of(diagonals, 16),
        tl.multiple_of(cell_first, 16), tl.multiple_of(lanes, 16),
    )  # fmt: skip


@triton.jit
def load_diagonals(cols, values, diagonals, step, end, COUNT: tl.constexpr):
    """[COUNT, WINDOW] columns, values and which of them are there, of the diagonals step, step + 1, ..."""
    lane = tl.arange(0, WINDOW)
    diagonal = step + tl.arange(0, COUNT)
    word = tl.load(diagonals + diagonal, mask=diagonal < end, other=0)
    length = word & 255
    at = (word >> 8)[:, None] * 8 + lane[None, :]
    # Whole groups of 8 are there, and a mask that changes inside one would break up the load.
    padded = lane[None, :] < ((length + 7) // 8 * 8)[:, None]
    col = tl.load(cols + at, mask=padded, other=0).to(tl.int32) & 0xFFFF
    value = tl.load(values + at, mask=padded, other=0.0)
    return col, value, lane[None, :] < length[:, None]


@triton.jit
def halves(tile, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """Even and odd rows of a [2 * A, B, C] tile, each [A, B, C]."""
    return tl.split(tl.permute(tl.reshape(tile, (A, 2, B, C)), (0, 2, 3, 1)))


@triton.jit
def tree(acc, B: tl.constexpr, C: tl.constexpr):
    """[UNROLL, B, C] to [B, C]: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), whatever the layout in registers."""
    even, odd = halves(acc, 4, B, C)
    even, odd = halves(even + odd, 2, B, C)
    even, odd = halves(even + odd, 1, B, C)
    return tl.reshape(even + odd, (B, C))


@triton.jit
def gathered_sums(x, x_stride, row, live, cols, values, diagonals, begin, end, ROWS: tl.constexpr):
    """[ROWS, WINDOW] sums over the diagonals [begin, end), by lane; x element by element from its rows."""
    acc = tl.zeros((UNROLL, ROWS, WINDOW), dtype=tl.float32)
    for step in range(begin, end, UNROLL):
        col, value, inside = load_diagonals(cols, values, diagonals, step, end, UNROLL)
        x_at = tl.load(
            x + (row * x_stride)[None, :, None] + col[:, None, :],
            mask=live[None, :, None] & inside[:, None, :],
            other=0.0,
        )
        acc = tl.fma(x_at.to(tl.float32), tl.broadcast_to(value[:, None, :], acc.shape).to(tl.float32), acc)
    return tree(acc, ROWS, WINDOW)


@triton.jit
def staged_sums(
    x, x_stride, row, live, first_column, num_columns, cols, values, diagonals, begin, end,
    ROWS: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    """The same; x's columns of this cell, at most STAGE of them, go through shared memory, one row at a time."""
    total = tl.zeros((ROWS, WINDOW), dtype=tl.float32)
    column = tl.arange(0, STAGE)
    for index in tl.static_range(ROWS):
        mine = tl.arange(0, ROWS) == index
        if tl.max((mine & live).to(tl.int32), 0) > 0:
            x_row = x + tl.sum(tl.where(mine, row, 0), 0) * x_stride + first_column
            stage = tl.load(x_row + column, mask=column < num_columns, other=0.0)
            acc = tl.zeros((UNROLL, 1, WINDOW), dtype=tl.float32)
            for step in range(begin, end, 4 * UNROLL):
                col, value, inside = load_diagonals(cols, values, diagonals, step, end, 4 * UNROLL)
                at = tl.where(inside, col - first_column, 0)
                x_at = tl.reshape(tl.gather(stage, tl.reshape(at, (4 * UNROLL * WINDOW,)), 0), (4 * UNROLL, WINDOW))
                x_at = tl.where(inside, x_at, 0.0)
                # Diagonals step + 8 i + j: quarter i is [UNROLL, 1, WINDOW], and quarters are added in order.
                even, odd = tl.split(tl.permute(tl.reshape(x_at, (2, 2, UNROLL, 1, WINDOW)), (2, 3, 4, 0, 1)))
                x0, x2 = tl.split(even)
                x1, x3 = tl.split(odd)
                even, odd = tl.split(tl.permute(tl.reshape(value, (2, 2, UNROLL, 1, WINDOW)), (2, 3, 4, 0, 1)))
                v0, v2 = tl.split(even)
                v1, v3 = tl.split(odd)
                acc = tl.fma(x0.to(tl.float32), v0.to(tl.float32), acc)
                acc = tl.fma(x1.to(tl.float32), v1.to(tl.float32), acc)
                acc = tl.fma(x2.to(tl.float32), v2.to(tl.float32), acc)
                acc = tl.fma(x3.to(tl.float32), v3.to(tl.float32), acc)
            total = tl.where(mine[:, None], tree(acc, 1, WINDOW), total)
    return total


@triton.jit
def transposed_sums(block, cols, values, diagonals, begin, end, ROWS: tl.constexpr):
    """[WINDOW, ROWS]: the same by lane and row; ``block`` is x transposed, [K, ROWS], zero in rows that are not."""
    r = tl.arange(0, ROWS)
    acc = tl.zeros((UNROLL, WINDOW, ROWS), dtype=tl.float32)
    for step in range(begin, end, UNROLL):
        col, value, inside = load_diagonals(cols, values, diagonals, step, end, UNROLL)
        x_at = tl.load(block + col[:, :, None] * ROWS + r[None, None, :], mask=inside[:, :, None], other=0.0)
        acc = tl.fma(x_at.to(tl.float32), tl.broadcast_to(value[:, :, None], acc.shape).to(tl.float32), acc)
    return tree(acc, WINDOW, ROWS)


@triton.jit
def transposed_block(x_t, tile, first, K: tl.constexpr, TILE_ROWS: tl.constexpr, FEW: tl.constexpr):
    """Where a tile of more than FEW rows has its [K, TILE_ROWS] of x. Such tiles begin FEW + 1 positions apart."""
    index = tile
    if FEW > 0:
        index = first // (FEW + 1)
    return x_t + index.to(tl.int64) * (K * TILE_ROWS)


@triton.jit
def add_to_y(y, y_stride, row, live, column, n, width, total):
    out = y + row[:, None] * y_stride + (column + n)[None, :]
    mask = live[:, None] & (n < width)[None, :]
    before = tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, (before + total).to(y.dtype.element_ty), mask=mask)


@triton.jit
def few_rows(
    y, y_stride, x, x_stride, rows, part_slot, part_scale, pointers, num_slots,
    linear, window, column, width, first, stop, part_begin, part_end, depth,
    K: tl.constexpr, BUCKET: tl.constexpr, ROWS: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    """One window of a tile whose rows are read where they are."""
    BUCKETS: tl.constexpr = (K + BUCKET - 1) // BUCKET
    position = first + tl.arange(0, ROWS)
    live = position < stop
    row = tl.load(rows + position, mask=live, other=0).to(tl.int64)
    total = tl.zeros((ROWS, WINDOW), dtype=tl.float32)
    count = 0
    for part in range(part_begin, part_end):
        slot = tl.load(part_slot + part)
        if array(pointers, 3, linear, slot, num_slots) != 0:
            cols, values, diagonals, cell_first, lanes = delta_of(x, pointers, linear, slot, num_slots)
            scale = tl.full((ROWS, WINDOW), 1.0, dtype=tl.float32) * scale_of(part_scale, part, depth)
            for bucket in range(BUCKETS):
                cell = window * BUCKETS + bucket
                begin = tl.load(cell_first + cell)
                end = tl.load(cell_first + cell + 1)
                lane = tl.load(lanes + cell * WINDOW + tl.arange(0, WINDOW)).to(tl.int32)
                if STAGE > 0:
                    sums = staged_sums(
                        x, x_stride, row, live, bucket * BUCKET, tl.minimum(K - bucket * BUCKET, BUCKET),
                        cols, values, diagonals, begin, end, ROWS, STAGE,
                    )  # fmt: skip
                else:
                    sums = gathered_sums(x, x_stride, row, live, cols, values, diagonals, begin, end, ROWS)
                by_row = tl.gather(sums, tl.broadcast_to(lane[None, :], (ROWS, WINDOW)), 1)
                total = tl.fma(by_row, scale, total)
                count += end - begin
    if count > 0:
        add_to_y(y, y_stride, row, live, column, window * WINDOW + tl.arange(0, WINDOW), width, total)


@triton.jit
def many_rows(
    y, y_stride, block, rows, part_slot, part_scale, pointers, num_slots,
    linear, window, column, width, first, stop, part_begin, part_end, depth,
    K: tl.constexpr, BUCKET: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One window of a tile whose rows are read transposed, from ``block``."""
    BUCKETS: tl.constexpr = (K + BUCKET - 1) // BUCKET
    total = tl.zeros((WINDOW, ROWS), dtype=tl.float32)
    count = 0
    for part in range(part_begin, part_end):
        slot = tl.load(part_slot + part)
        if array(pointers, 3, linear, slot, num_slots) != 0:
            cols, values, diagonals, cell_first, lanes = delta_of(block, pointers, linear, slot, num_slots)
            scale = tl.full((WINDOW, ROWS), 1.0, dtype=tl.float32) * scale_of(part_scale, part, depth)
            for bucket in range(BUCKETS):
                cell = window * BUCKETS + bucket
                begin = tl.load(cell_first + cell)
                end = tl.load(cell_first + cell + 1)
                lane = tl.load(lanes + cell * WINDOW + tl.arange(0, WINDOW)).to(tl.int32)
                sums = transposed_sums(block, cols, values, diagonals, begin, end, ROWS)
                by_row = tl.gather(sums, tl.broadcast_to(lane[:, None], (WINDOW, ROWS)), 0)
                total = tl.fma(by_row, scale, total)
                count += end - begin
    if count > 0:
        position = first + tl.arange(0, ROWS)
        live = position < stop
        row = tl.load(rows + position, mask=live, other=0).to(tl.int64)
        add_to_y(y, y_stride, row, live, column, window * WINDOW + tl.arange(0, WINDOW), width, tl.trans(total))


@triton.jit(do_not_specialize=VARYING)
def sparse(
    y, y_stride, x, x_stride, x_t,
    tile_item, tile_first, rows, item_rows, item_parts, part_slot, part_scale, pointers, num_slots,
    linear0, linear1, linear2, depth,
    K: tl.constexpr, BUCKET: tl.constexpr, TILE_ROWS: tl.constexpr, FEW: tl.constexpr, STAGE: tl.constexpr,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    COLUMN0: tl.constexpr, COLUMN1: tl.constexpr, COLUMN2: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, windows of all members). Reads and writes each element of y once, however many parts a row has.

    STAGE: columns of x that shared memory takes, a power of two, at least a bucket; 0: rows are gathered. FEW equal to
    TILE_ROWS: x_t is not read.
    """
    tile = tl.program_id(0)
    item = tl.load(tile_item + tile)
    if item >= 0:
        member, window = place(tl.program_id(1), WIDTH0, WIDTH1, WIDTH2, WINDOW)
        linear = pick(member, linear0, linear1, linear2)
        width = pick(member, WIDTH0, WIDTH1, WIDTH2)
        column = pick(member, COLUMN0, COLUMN1, COLUMN2)
        first = tl.load(tile_first + tile)
        stop = tl.load(item_rows + item + 1)
        part_begin = tl.load(item_parts + item)
        part_end = tl.load(item_parts + item + 1)
        if tl.minimum(stop - first, TILE_ROWS) <= FEW:
            few_rows(
                y, y_stride, x, x_stride, rows, part_slot, part_scale, pointers, num_slots,
                linear, window, column, width, first, stop, part_begin, part_end, depth, K, BUCKET, FEW, STAGE,
            )  # fmt: skip
        elif FEW < TILE_ROWS:
            many_rows(
                y, y_stride, transposed_block(x_t, tile, first, K, TILE_ROWS, FEW), rows,
                part_slot, part_scale, pointers, num_slots,
                linear, window, column, width, first, stop, part_begin, part_end, depth, K, BUCKET, TILE_ROWS,
            )  # fmt: skip
