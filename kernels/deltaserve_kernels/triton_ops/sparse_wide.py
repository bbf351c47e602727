"""Sparse kernels for many rows an adapter (prefill), and the transposed copy of x that they read.

A program takes one window of 128 outputs and a tile of 64 rows. One nonzero reads one line of x transposed, all rows of
the tile at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.triton_ops.lora_kernels import pick, scale_of
from deltaserve_kernels.triton_ops.lora_programs import place
from deltaserve_kernels.triton_ops.sparse_kernels import (
    VARYING,
    WINDOW,
    add_to_y,
    array,
    entries_of,
    load_diagonals,
    window_of,
)


@triton.jit(do_not_specialize=["tile_item", "tile_first", "rows", "item_rows"])
def transpose(
    x_t, x, x_stride, tile_item, tile_first, rows, item_rows,
    K: tl.constexpr, BLOCK_K: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, blocks of K). x of each tile, as [K, TILE_ROWS]; zeros past its rows."""
    tile = tl.program_id(0)
    item = tl.load(tile_item + tile)
    if item >= 0:
        first = tl.load(tile_first + tile)
        stop = tl.load(item_rows + item + 1)
        r = tl.arange(0, TILE_ROWS)
        live = first + r < stop
        row = tl.load(rows + first + r, mask=live, other=0).to(tl.int64)
        k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x + row[:, None] * x_stride + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
        out = x_t + tile.to(tl.int64) * (K * TILE_ROWS) + k[:, None] * TILE_ROWS + r[None, :]
        tl.store(out, tl.trans(x_tile), mask=(k < K)[:, None])


@triton.jit
def add_entry(acc, block, col, value, inside, TILE_ROWS: tl.constexpr):
    """``acc + value * x`` over one entry of each lane: [WINDOW, TILE_ROWS]."""
    lines = block + tl.reshape(col, (WINDOW, 1)) * TILE_ROWS + tl.arange(0, TILE_ROWS)[None, :]
    x_at = tl.load(lines, mask=tl.reshape(inside, (WINDOW, 1)), other=0.0).to(tl.float32)
    return tl.fma(x_at, tl.broadcast_to(tl.reshape(value, (WINDOW, 1)), acc.shape).to(tl.float32), acc)


@triton.jit
def quarters(pack):
    """The four entries of [1, WINDOW, PACK] packs, each [1, WINDOW]."""
    even, odd = tl.split(tl.reshape(pack, (1, WINDOW, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit(do_not_specialize=VARYING)
def sparse_wide(
    y, y_stride, x_t,
    tile_item, tile_first, rows, item_rows, item_parts, part_slot, part_scale, pointers, num_slots,
    linear0, linear1, linear2, depth,
    K: tl.constexpr, TILE_ROWS: tl.constexpr,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    COLUMN0: tl.constexpr, COLUMN1: tl.constexpr, COLUMN2: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, windows of all members). One sum over a lane's entries in order: not the bits of ``sparse``."""
    tile = tl.program_id(0)
    item = tl.load(tile_item + tile)
    if item >= 0:
        member, window = place(tl.program_id(1), WIDTH0, WIDTH1, WIDTH2, WINDOW)
        linear = pick(member, linear0, linear1, linear2)
        first = tl.load(tile_first + tile)
        block = x_t + tile.to(tl.int64) * (K * TILE_ROWS)
        total = tl.zeros((WINDOW, TILE_ROWS), dtype=tl.float32)
        count = 0
        for part in range(tl.load(item_parts + item), tl.load(item_parts + item + 1)):
            slot = tl.load(part_slot + part)
            if array(pointers, 3, linear, slot, num_slots) != 0:
                cols, values, diagonals = entries_of(x_t, pointers, linear, slot, num_slots)
                scale = scale_of(part_scale, part, depth)
                begin, end, lane = window_of(pointers, linear, slot, num_slots, window)
                acc = tl.zeros((WINDOW, TILE_ROWS), dtype=tl.float32)
                for step in range(begin, end):
                    col, value, inside = load_diagonals(cols, values, diagonals, step, end, 1)
                    c0, c1, c2, c3 = quarters(col)
                    v0, v1, v2, v3 = quarters(value)
                    acc = add_entry(acc, block, c0, v0, inside, TILE_ROWS)
                    acc = add_entry(acc, block, c1, v1, inside, TILE_ROWS)
                    acc = add_entry(acc, block, c2, v2, inside, TILE_ROWS)
                    acc = add_entry(acc, block, c3, v3, inside, TILE_ROWS)
                total += tl.gather(acc, tl.broadcast_to(lane[:, None], (WINDOW, TILE_ROWS)), 0) * scale
                count += end - begin
        if count > 0:
            position = first + tl.arange(0, TILE_ROWS)
            live = position < tl.load(item_rows + item + 1)
            row = tl.load(rows + position, mask=live, other=0).to(tl.int64)
            n = window * WINDOW + tl.arange(0, WINDOW)
            column = pick(member, COLUMN0, COLUMN1, COLUMN2)
            add_to_y(y, y_stride, row, live, column, n, pick(member, WIDTH0, WIDTH1, WIDTH2), tl.trans(total))
