"""The sparse kernel of decode: windowed jagged diagonals (``jagged``) times the rows of a work list, row after row.

A program takes one window of 128 outputs and one tile of rows. It reads the window's diagonals wide, up to STEP of them
at once, and keeps them in registers; each row of x then goes through shared memory, where its elements are picked by
column. A row's sum is the same whoever shares its tile or its step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.triton_ops.lora_kernels import pick, scale_of, tile_of
from deltaserve_kernels.triton_ops.lora_programs import place
from deltaserve_kernels.triton_ops.sparse_kernels import VARYING, WINDOW, array, load_diagonals


@triton.jit
def cell_of(pointers, linear, slot, num_slots, window):
    """(first diagonal, end, lanes of the rows) of one window of (linear, slot); nothing where there is no entry."""
    first = array(pointers, 3, linear, slot, num_slots)
    has = first != 0
    at = tl.multiple_of(first.to(tl.pointer_type(tl.int32)), 16)
    begin = tl.load(at + window, mask=has, other=0)
    end = tl.load(at + window + 1, mask=has, other=0)
    lanes = tl.multiple_of(array(pointers, 4, linear, slot, num_slots).to(tl.pointer_type(tl.int16)), 16)
    lane = tl.load(lanes + window * WINDOW + tl.arange(0, WINDOW), mask=has & (tl.arange(0, WINDOW) >= 0), other=0)
    return begin, end, lane.to(tl.int32)


@triton.jit
def piece_of(x, pointers, linear, slot, num_slots, step, end, STEP: tl.constexpr):
    """[STEP, WINDOW] columns, values, and which are there, from diagonal ``step`` on."""
    cols = array(pointers, 0, linear, slot, num_slots).to(tl.pointer_type(tl.int16))
    values = array(pointers, 1, linear, slot, num_slots).to(tl.pointer_type(x.dtype.element_ty))
    diagonals = array(pointers, 2, linear, slot, num_slots).to(tl.pointer_type(tl.int32))
    return load_diagonals(
        tl.multiple_of(cols, 16), tl.multiple_of(values, 16), tl.multiple_of(diagonals, 16), step, end, STEP
    )


@triton.jit(do_not_specialize=VARYING)
def sparse_rows(
    y, y_stride, x, x_stride, rows, records, part_slot, part_scale, pointers, num_slots,
    linear0, linear1, linear2, depth,
    K: tl.constexpr, STAGE: tl.constexpr, STEP: tl.constexpr,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    COLUMN0: tl.constexpr, COLUMN1: tl.constexpr, COLUMN2: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, windows of all members). Reads and writes each element of y once, however many parts a row has.

    STAGE: a power of two from K on, the columns that shared memory takes; 0: x is read element by element.
    """
    num_rows, first, part_begin, part_end, first_slot, _plane, _distance = tile_of(records, tl.program_id(0))
    member, window = place(tl.program_id(1), WIDTH0, WIDTH1, WIDTH2, WINDOW)
    linear = pick(member, linear0, linear1, linear2)
    n = window * WINDOW + tl.arange(0, WINDOW)
    mask = n < pick(member, WIDTH0, WIDTH1, WIDTH2)
    for i in range(num_rows):
        row = tl.load(rows + first + i).to(tl.int64)
        out = y + row * y_stride + pick(member, COLUMN0, COLUMN1, COLUMN2) + n
        x_row = x + row * x_stride
        if STAGE > 0:
            k = tl.arange(0, STAGE)
            stage = tl.load(x_row + k, mask=k < K, other=0.0)
        total = tl.zeros((WINDOW,), dtype=tl.float32)
        count = 0
        slot = first_slot
        for part in range(part_begin, part_end):
            begin, end, lane = cell_of(pointers, linear, slot, num_slots, window)
            sums = tl.zeros((WINDOW,), dtype=tl.float32)
            for step in range(begin, end, STEP):
                col, value, inside = piece_of(x, pointers, linear, slot, num_slots, step, end, STEP)
                if STAGE > 0:
                    at = tl.where(inside, col, 0)
                    x_at = tl.reshape(tl.gather(stage, tl.reshape(at, (STEP * WINDOW,)), 0), (STEP, WINDOW))
                else:
                    x_at = tl.load(x_row + col, mask=inside, other=0.0)
                sums += tl.sum(tl.where(inside, x_at.to(tl.float32) * value.to(tl.float32), 0.0), 0)
            total += tl.gather(sums, lane, 0) * scale_of(part_scale, part, depth)
            count += end - begin
            slot = tl.load(part_slot + part + 1, mask=part + 1 < part_end, other=0)
        if count > 0:
            before = tl.load(out, mask=mask, other=0.0).to(tl.float32)
            tl.store(out, (before + total).to(y.dtype.element_ty), mask=mask)
