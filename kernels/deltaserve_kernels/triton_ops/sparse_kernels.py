"""The sparse kernel: windowed jagged diagonals (``jagged``) times the rows of a work list.

A program takes one window of 128 outputs and one tile of rows: it reads 8 diagonals at a time, wide, gathers x at their
columns, sums in fp32, and at the end brings lanes back into row order, so that y is read and written contiguously.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.triton_ops.lora_kernels import pick
from deltaserve_kernels.triton_ops.lora_programs import VARYING as LORA_VARYING
from deltaserve_kernels.triton_ops.lora_programs import place

VARYING = [name for name in LORA_VARYING if name not in ("item_plane", "ranks")]


@triton.jit
def array(pointers, which, linear, slot, num_slots):
    """Address of one array of (linear, slot), or 0. int64 [linear][5][slot]."""
    return tl.load(pointers + (linear * 5 + which) * num_slots + slot)


@triton.jit
def window_sums(
    x, x_stride, row, live, cols, values, diagonals, begin, end,
    TILE_ROWS: tl.constexpr, WINDOW: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """[TILE_ROWS, WINDOW] sums over the diagonals [begin, end) of one window, by lane."""
    lane = tl.arange(0, WINDOW)
    acc = tl.zeros((TILE_ROWS, UNROLL, WINDOW), dtype=tl.float32)
    for step in range(begin, end, UNROLL):
        diagonal = step + tl.arange(0, UNROLL)
        word = tl.load(diagonals + diagonal, mask=diagonal < end, other=0)
        length = word & 255
        place = (word >> 8)[:, None] * 8 + lane[None, :]
        # Whole groups of 8 are there, and a mask that changes inside one would break up the load.
        padded = lane[None, :] < ((length + 7) // 8 * 8)[:, None]
        col = tl.load(cols + place, mask=padded, other=0).to(tl.int32) & 0xFFFF
        value = tl.load(values + place, mask=padded, other=0.0).to(tl.float32)
        inside = lane[None, :] < length[:, None]
        x_at = tl.load(
            x + row[:, None, None] * x_stride + col[None, :, :],
            mask=live[:, None, None] & inside[None, :, :],
            other=0.0,
        )
        acc += x_at.to(tl.float32) * value[None, :, :]
    return tl.sum(acc, 1)


@triton.jit(do_not_specialize=VARYING)
def sparse(
    y, y_stride, x, x_stride,
    tile_item, tile_first, rows, item_rows, item_parts, part_slot, part_scale, pointers, num_slots,
    linear0, linear1, linear2, depth,
    TILE_ROWS: tl.constexpr, WINDOW: tl.constexpr, UNROLL: tl.constexpr,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    COLUMN0: tl.constexpr, COLUMN1: tl.constexpr, COLUMN2: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, windows of all members). Reads and writes each element of y once, however many parts a row has."""
    tile = tl.program_id(0)
    item = tl.load(tile_item + tile)
    if item >= 0:
        member, window = place(tl.program_id(1), WIDTH0, WIDTH1, WIDTH2, WINDOW)
        linear = pick(member, linear0, linear1, linear2)
        width = pick(member, WIDTH0, WIDTH1, WIDTH2)
        column = pick(member, COLUMN0, COLUMN1, COLUMN2)
        position = tl.load(tile_first + tile) + tl.arange(0, TILE_ROWS)
        live = position < tl.load(item_rows + item + 1)
        row = tl.load(rows + position, mask=live, other=0).to(tl.int64)
        total = tl.zeros((TILE_ROWS, WINDOW), dtype=tl.float32)
        count = 0
        for part in range(tl.load(item_parts + item), tl.load(item_parts + item + 1)):
            slot = tl.load(part_slot + part)
            first = array(pointers, 3, linear, slot, num_slots)
            if first != 0:
                window_first = tl.multiple_of(first.to(tl.pointer_type(tl.int32)), 16)
                begin = tl.load(window_first + window)
                end = tl.load(window_first + window + 1)
                cols = tl.multiple_of(array(pointers, 0, linear, slot, num_slots).to(tl.pointer_type(tl.int16)), 16)
                values = array(pointers, 1, linear, slot, num_slots).to(tl.pointer_type(x.dtype.element_ty))
                diagonals = array(pointers, 2, linear, slot, num_slots).to(tl.pointer_type(tl.int32))
                lanes = array(pointers, 4, linear, slot, num_slots).to(tl.pointer_type(tl.int16))
                lane = tl.load(tl.multiple_of(lanes, 16) + window * WINDOW + tl.arange(0, WINDOW)).to(tl.int32)
                sums = window_sums(
                    x, x_stride, row, live, cols, tl.multiple_of(values, 16), tl.multiple_of(diagonals, 16), begin, end,
                    TILE_ROWS, WINDOW, UNROLL,
                )  # fmt: skip
                at_first = tl.load(part_scale + 2 * part)
                scale = at_first + (tl.load(part_scale + 2 * part + 1) - at_first) * depth
                total += tl.gather(sums, tl.broadcast_to(lane[None, :], (TILE_ROWS, WINDOW)), 1) * scale
                count += end - begin
        if count > 0:
            n = window * WINDOW + tl.arange(0, WINDOW)
            out = y + row[:, None] * y_stride + (column + n)[None, :]
            mask = live[:, None] & (n < width)[None, :]
            before = tl.load(out, mask=mask, other=0.0).to(tl.float32)
            tl.store(out, (before + total).to(y.dtype.element_ty), mask=mask)
