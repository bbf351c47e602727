"""Rotations of rows: factors of blocks on a permuted diagonal, a launch each; the last one of a part adds to y.

A factor takes a row in its order, adds ``z @ block`` of each block and puts it back. What the factors before the last
one change goes to a plane, so that the next one reads whole rows. A row has one part that turns it, or none: so a
launch may write where the order says, and nobody else writes there. Widths are given at run time, for everything is
read through lists anyway: a form compiles once, whatever is turned.

``pointers`` int64 [linear][slot]: address of what ``rotation_tables`` tells of an entry, 0 where there is none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.triton_ops.early import wait_then_allow
from deltaserve_kernels.triton_ops.lora_kernels import pick, scale_of, tile_of

VARYING = [
    "planes", "plane_stride", "row_stride", "rows", "row_item", "item_parts", "records", "part_slot", "part_scale",
    "pointers", "num_slots", "linear0", "linear1", "linear2", "width0", "width1", "width2",
    "column0", "column1", "column2", "factor", "depth", "first_tile", "first_row", "num_fanned",
]  # fmt: skip


@triton.jit
def listed_row(row_item, item_parts, rows, position):
    """(1, first part, end of its parts) of a listed row, or nothing where it is the base's."""
    item = tl.load(row_item + tl.load(rows + position))
    known = item >= 0
    begin = tl.load(item_parts + item, mask=known, other=0)
    end = tl.load(item_parts + item + 1, mask=known, other=0)
    return known.to(tl.int32), begin, end


@triton.jit(do_not_specialize=VARYING)
def turn_rows(
    y, y_stride, x, x_stride, planes, plane_stride, row_stride,
    rows, row_item, item_parts, records, part_slot, part_scale, pointers, num_slots,
    linear0, linear1, linear2, width0, width1, width2, column0, column1, column2,
    factor, depth, first_tile, first_row, num_fanned,
    TILE_ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (listed rows, or tiles where TILE_ROWS > 1; blocks of columns; members): factor number ``factor`` of every
    part that has one.

    ``planes`` fp32 [2][rows of the grid][member][``row_stride`` / 3]: what the factors so far change, in turn.
    ``num_fanned`` > 0: member m of listed row i lies in row ``first_row + m * num_fanned + i`` of y.
    """
    wait_then_allow(EARLY)
    if TILE_ROWS == 1:
        first = tl.program_id(0)
        num_rows, part_begin, part_end = listed_row(row_item, item_parts, rows, first)
    else:
        num_rows, first, part_begin, part_end, _slot, _plane, _step = tile_of(records, first_tile + tl.program_id(0))
    member = tl.program_id(2)
    linear = pick(member, linear0, linear1, linear2)
    width = pick(member, width0, width1, width2)
    column = pick(member, column0, column1, column2)
    for part in range(part_begin, part_end):
        scale = scale_of(part_scale, part, depth)
        told = tl.load(pointers + linear * num_slots + tl.load(part_slot + part)).to(tl.pointer_type(tl.int64))
        num_factors = tl.load(told, mask=told.to(tl.int64) != 0, other=0)
        if (factor < num_factors) & (scale != 0.0):
            o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = o < width
            position = tl.arange(0, TILE_ROWS)
            live = position < num_rows
            row = tl.load(rows + first + position, mask=live, other=0).to(tl.int64)
            x_rows = x + row * x_stride + column
            own = (tl.program_id(0) * TILE_ROWS + position).to(tl.int64) * row_stride + member * (row_stride // 3)
            before = planes + (factor + 1) % 2 * plane_stride + own

            of_factor = told + 1 + factor * 5
            order_at = tl.load(of_factor + 1)
            has_order = order_at != 0
            order = order_at.to(tl.pointer_type(tl.int32))
            size = tl.load(of_factor + 3).to(tl.int32)
            block = o // size
            # One block may be shared by all.
            matrix = tl.load(of_factor).to(tl.pointer_type(x.dtype.element_ty))
            matrix += tl.where(tl.load(of_factor + 2) > 1, block.to(tl.int64) * size * size, 0) + o % size
            place = tl.where(has_order, tl.load(order + o, mask=inside & has_order, other=0), o)

            acc = tl.zeros((TILE_ROWS, BLOCK_N), dtype=tl.float32)
            for begin in range(0, size, STEP):
                step = begin + tl.arange(0, STEP)
                known = (step < size)[:, None] & inside[None, :]
                source = block[None, :] * size + step[:, None]
                source = tl.where(has_order, tl.load(order + source, mask=known & has_order, other=0), source)
                turning = tl.load(matrix[None, :] + step[:, None] * size, mask=known, other=0.0).to(tl.float32)
                mask = live[:, None, None] & known[None, :, :]
                z = tl.load(x_rows[:, None, None] + source[None, :, :], mask=mask, other=0.0).to(tl.float32)
                z += tl.load(before[:, None, None] + source[None, :, :], mask=mask & (factor > 0), other=0.0)
                acc += tl.sum(z * turning[None, :, :], 1)
            writes = live[:, None] & inside[None, :]
            acc += tl.load(before[:, None] + place[None, :], mask=writes & (factor > 0), other=0.0)
            if factor == num_factors - 1:
                y_row = tl.where(num_fanned > 0, first_row + member * num_fanned + first + position, row)
                out = y + (y_row.to(tl.int64) * y_stride + column)[:, None] + place[None, :]
                total = tl.load(out, mask=writes, other=0.0).to(tl.float32) + scale * acc
                tl.store(out, total.to(y.dtype.element_ty), mask=writes)
            else:
                after = planes + factor % 2 * plane_stride + own
                tl.store(after[:, None] + place[None, :], acc, mask=writes)
