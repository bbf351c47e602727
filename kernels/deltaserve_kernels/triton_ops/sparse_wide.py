"""Sparse kernels for many rows an adapter (prefill), and the transposed copies of x that they and decode read.

A program takes one window of 128 outputs and a tile of 64 rows. One nonzero reads one line of x transposed, all rows of
the tile at once; columns come bucket by bucket, so that the lines in use stay in the first-level cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.triton_ops.lora_kernels import pick
from deltaserve_kernels.triton_ops.lora_programs import place
from deltaserve_kernels.triton_ops.sparse_kernels import (
    UNROLL,
    VARYING,
    WINDOW,
    add_to_y,
    array,
    delta_of,
    halves,
    load_diagonals,
    scale_of,
    transposed_block,
)


@triton.jit(do_not_specialize=["tile_item", "tile_first", "rows", "item_rows"])
def transpose(
    x_t, x, x_stride, tile_item, tile_first, rows, item_rows,
    K: tl.constexpr, BLOCK_K: tl.constexpr, TILE_ROWS: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, blocks of K). x of each tile of more than FEW rows, as [K, TILE_ROWS]; zeros past its rows."""
    tile = tl.program_id(0)
    item = tl.load(tile_item + tile)
    if item >= 0:
        first = tl.load(tile_first + tile)
        stop = tl.load(item_rows + item + 1)
        if tl.minimum(stop - first, TILE_ROWS) > FEW:
            r = tl.arange(0, TILE_ROWS)
            live = first + r < stop
            row = tl.load(rows + first + r, mask=live, other=0).to(tl.int64)
            k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
            x_tile = tl.load(x + row[:, None] * x_stride + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
            out = transposed_block(x_t, tile, first, K, TILE_ROWS, FEW) + k[:, None] * TILE_ROWS + r[None, :]
            tl.store(out, tl.trans(x_tile), mask=(k < K)[:, None])


@triton.jit
def eighths(tile):
    """The eight rows of an [8, WINDOW] tile, each [WINDOW]."""
    even, odd = halves(tl.reshape(tile, (UNROLL, 1, WINDOW)), 4, 1, WINDOW)
    t04, t26 = halves(even, 2, 1, WINDOW)
    t15, t37 = halves(odd, 2, 1, WINDOW)
    t0, t4 = halves(t04, 1, 1, WINDOW)
    t1, t5 = halves(t15, 1, 1, WINDOW)
    t2, t6 = halves(t26, 1, 1, WINDOW)
    t3, t7 = halves(t37, 1, 1, WINDOW)
    return t0, t1, t2, t3, t4, t5, t6, t7


@triton.jit
def add_diagonal(acc, block, col, value, length, TILE_ROWS: tl.constexpr):
    """``acc + value * x`` over one diagonal: [WINDOW, TILE_ROWS]."""
    inside = tl.arange(0, WINDOW) < length
    lines = block + tl.reshape(col, (WINDOW, 1)) * TILE_ROWS + tl.arange(0, TILE_ROWS)[None, :]
    x_at = tl.load(lines, mask=inside[:, None], other=0.0).to(tl.float32)
    return tl.fma(x_at, tl.broadcast_to(tl.reshape(value, (WINDOW, 1)), acc.shape).to(tl.float32), acc)


@triton.jit
def length_of(diagonals, step, end):
    return tl.load(diagonals + step, mask=step < end, other=0) & 255


@triton.jit(do_not_specialize=VARYING)
def sparse_wide(
    y, y_stride, x_t,
    tile_item, tile_first, rows, item_rows, item_parts, part_slot, part_scale, pointers, num_slots,
    linear0, linear1, linear2, depth,
    K: tl.constexpr, BUCKET: tl.constexpr, TILE_ROWS: tl.constexpr,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    COLUMN0: tl.constexpr, COLUMN1: tl.constexpr, COLUMN2: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, windows of all members). One sum over the diagonals in order: not the bits of ``sparse``."""
    BUCKETS: tl.constexpr = (K + BUCKET - 1) // BUCKET
    tile = tl.program_id(0)
    item = tl.load(tile_item + tile)
    if item >= 0:
        member, window = place(tl.program_id(1), WIDTH0, WIDTH1, WIDTH2, WINDOW)
        linear = pick(member, linear0, linear1, linear2)
        first = tl.load(tile_first + tile)
        block = transposed_block(x_t, tile, first, K, TILE_ROWS, 0)
        total = tl.zeros((WINDOW, TILE_ROWS), dtype=tl.float32)
        count = 0
        for part in range(tl.load(item_parts + item), tl.load(item_parts + item + 1)):
            slot = tl.load(part_slot + part)
            if array(pointers, 3, linear, slot, num_slots) != 0:
                cols, values, diagonals, cell_first, lanes = delta_of(x_t, pointers, linear, slot, num_slots)
                scale = scale_of(part_scale, part, depth)
                for bucket in range(BUCKETS):
                    cell = window * BUCKETS + bucket
                    begin = tl.load(cell_first + cell)
                    end = tl.load(cell_first + cell + 1)
                    acc = tl.zeros((WINDOW, TILE_ROWS), dtype=tl.float32)
                    for step in range(begin, end, UNROLL):
                        col, value, _ = load_diagonals(cols, values, diagonals, step, end, UNROLL)
                        c0, c1, c2, c3, c4, c5, c6, c7 = eighths(col)
                        v0, v1, v2, v3, v4, v5, v6, v7 = eighths(value)
                        acc = add_diagonal(acc, block, c0, v0, length_of(diagonals, step, end), TILE_ROWS)
                        acc = add_diagonal(acc, block, c1, v1, length_of(diagonals, step + 1, end), TILE_ROWS)
                        acc = add_diagonal(acc, block, c2, v2, length_of(diagonals, step + 2, end), TILE_ROWS)
                        acc = add_diagonal(acc, block, c3, v3, length_of(diagonals, step + 3, end), TILE_ROWS)
                        acc = add_diagonal(acc, block, c4, v4, length_of(diagonals, step + 4, end), TILE_ROWS)
                        acc = add_diagonal(acc, block, c5, v5, length_of(diagonals, step + 5, end), TILE_ROWS)
                        acc = add_diagonal(acc, block, c6, v6, length_of(diagonals, step + 6, end), TILE_ROWS)
                        acc = add_diagonal(acc, block, c7, v7, length_of(diagonals, step + 7, end), TILE_ROWS)
                    lane = tl.load(lanes + cell * WINDOW + tl.arange(0, WINDOW)).to(tl.int32)
                    total += tl.gather(acc, tl.broadcast_to(lane[:, None], (WINDOW, TILE_ROWS)), 0) * scale
                    count += end - begin
        if count > 0:
            position = first + tl.arange(0, TILE_ROWS)
            live = position < tl.load(item_rows + item + 1)
            row = tl.load(rows + position, mask=live, other=0).to(tl.int64)
            n = window * WINDOW + tl.arange(0, WINDOW)
            column = pick(member, COLUMN0, COLUMN1, COLUMN2)
            add_to_y(y, y_stride, row, live, column, n, pick(member, WIDTH0, WIDTH1, WIDTH2), tl.trans(total))
