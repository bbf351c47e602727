"""Rotations of rows: factors of blocks on a permuted diagonal, a launch each, then their change is added to y.

A factor takes a row in its order, adds ``z @ block`` of each block and puts it back. What it changes goes to a plane of
its own, so that the next factor reads whole rows; planes are fp32, numbered as in ``lora_kernels``. Widths are given at
run time, for everything is read through lists anyway: the kernels compile once, whatever is turned.

``pointers`` int64 [linear][slot]: address of what ``rotation_tables`` tells of an entry, 0 where there is none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.triton_ops.lora_kernels import pick, scale_of, tile_of

VARYING = [
    "h", "factor_stride", "plane_stride", "y", "y_stride", "x", "x_stride", "rows", "records", "part_slot",
    "part_scale", "pointers", "num_slots", "linear0", "linear1", "linear2", "width0", "width1", "width2",
    "column0", "column1", "column2", "factor", "depth",
]  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def turn_rows(
    h, factor_stride, plane_stride, x, x_stride, rows, records, part_slot, pointers, num_slots,
    linear0, linear1, linear2, width0, width1, width2, column0, column1, column2, factor,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, blocks of columns, members). Plane ``factor`` of h: what the factors up to this one change."""
    num_rows, first, part_begin, part_end, _slot, first_plane, plane_step = tile_of(records, tl.program_id(0))
    member = tl.program_id(2)
    linear = pick(member, linear0, linear1, linear2)
    width = pick(member, width0, width1, width2)
    column = pick(member, column0, column1, column2)
    o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = o < width
    for part in range(part_begin, part_end):
        told = tl.load(pointers + linear * num_slots + tl.load(part_slot + part)).to(tl.pointer_type(tl.int64))
        num_factors = tl.load(told, mask=told.to(tl.int64) != 0, other=0)
        if factor < num_factors:
            of_factor = told + 1 + factor * 5
            blocks = tl.load(of_factor).to(tl.pointer_type(x.dtype.element_ty))
            order_at = tl.load(of_factor + 1)
            order = order_at.to(tl.pointer_type(tl.int32))
            size = tl.load(of_factor + 3).to(tl.int32)
            block = o // size
            # One block may be shared by all.
            own = blocks + tl.where(tl.load(of_factor + 2) > 1, block.to(tl.int64) * size * size, 0) + o % size
            place = tl.where(order_at != 0, tl.load(order + o, mask=live & (order_at != 0), other=0), o)
            for i in range(num_rows):
                x_row = x + tl.load(rows + first + i).to(tl.int64) * x_stride + column
                plane = first_plane + (part - part_begin) * plane_step + i
                out = h + factor * factor_stride + plane.to(tl.int64) * plane_stride + column
                acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
                for step in range(0, size):
                    source = block * size + step
                    source = tl.where(
                        order_at != 0, tl.load(order + source, mask=live & (order_at != 0), other=0), source
                    )  # fmt: skip
                    z = tl.load(x_row + source, mask=live, other=0.0).to(tl.float32)
                    z += tl.load(out - factor_stride + source, mask=live & (factor > 0), other=0.0)
                    acc += z * tl.load(own + step * size, mask=live, other=0.0).to(tl.float32)
                acc += tl.load(out - factor_stride + place, mask=live & (factor > 0), other=0.0)
                tl.store(out + place, acc, mask=live)


@triton.jit(do_not_specialize=VARYING)
def add_turned(
    y, y_stride, h, factor_stride, plane_stride, rows, records, part_slot, part_scale, pointers, num_slots,
    linear0, linear1, linear2, width0, width1, width2, column0, column1, column2, depth,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, blocks of columns, members). Adds the last plane of every part, times its scale."""
    num_rows, first, part_begin, part_end, _slot, first_plane, plane_step = tile_of(records, tl.program_id(0))
    member = tl.program_id(2)
    linear = pick(member, linear0, linear1, linear2)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < pick(member, width0, width1, width2)
    columns = pick(member, column0, column1, column2) + n
    for i in range(num_rows):
        out = y + tl.load(rows + first + i).to(tl.int64) * y_stride + columns
        before = tl.load(out, mask=live, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK_N,), dtype=tl.float32)
        count = 0
        for part in range(part_begin, part_end):
            scale = scale_of(part_scale, part, depth)
            told = tl.load(pointers + linear * num_slots + tl.load(part_slot + part)).to(tl.pointer_type(tl.int64))
            num_factors = tl.load(told, mask=told.to(tl.int64) != 0, other=0)
            if (num_factors > 0) & (scale != 0.0):
                plane = first_plane + (part - part_begin) * plane_step + i
                source = h + (num_factors - 1) * factor_stride + plane.to(tl.int64) * plane_stride
                total += scale * tl.load(source + columns, mask=live, other=0.0)
                count += 1
        if count > 0:
            tl.store(out, (before + total).to(y.dtype.element_ty), mask=live)
