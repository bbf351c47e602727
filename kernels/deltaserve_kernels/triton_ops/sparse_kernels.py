"""The sparse kernel of decode: windowed jagged diagonals (``jagged``) times the rows of a work list, row after row.

A program takes one window of 128 outputs and one tile of rows. It reads some diagonals at a time, wide; a row of x goes
through shared memory, where its elements are picked by column. A thread has whole lanes, so sums cross no thread; at
the end lanes go back into row order, and y is read and written contiguously. A row's bits do not depend on its company.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.triton_ops.early import wait_then_allow
from deltaserve_kernels.triton_ops.lora_kernels import pick, scale_of, tile_of
from deltaserve_kernels.triton_ops.lora_programs import VARYING as LORA_VARYING
from deltaserve_kernels.triton_ops.lora_programs import place

VARYING = [name for name in LORA_VARYING if name not in ("item_plane", "ranks", "vectors")]
WINDOW = tl.constexpr(128)
PACK = tl.constexpr(4)


@triton.jit
def array(pointers, which, linear, slot, num_slots):
    """Address of one array of (linear, slot), or 0. int64 [linear][5][slot]."""
    return tl.load(pointers + (linear * 5 + which) * num_slots + slot)


@triton.jit
def entries_of(x, pointers, linear, slot, num_slots):
    """(columns, values, diagonals) of an entry."""
    cols = array(pointers, 0, linear, slot, num_slots).to(tl.pointer_type(tl.int16))
    values = array(pointers, 1, linear, slot, num_slots).to(tl.pointer_type(x.dtype.element_ty))
    diagonals = array(pointers, 2, linear, slot, num_slots).to(tl.pointer_type(tl.int32))
    return tl.multiple_of(cols, 16), tl.multiple_of(values, 16), tl.multiple_of(diagonals, 16)


@triton.jit
def window_of(pointers, linear, slot, num_slots, window):
    """(first diagonal, end, lanes of the rows) of one window of (linear, slot); nothing where there is no entry."""
    first = array(pointers, 3, linear, slot, num_slots)
    has = first != 0
    at = tl.multiple_of(first.to(tl.pointer_type(tl.int32)), 16)
    begin = tl.load(at + window, mask=has, other=0)
    end = tl.load(at + window + 1, mask=has, other=0)
    lanes = tl.multiple_of(array(pointers, 4, linear, slot, num_slots).to(tl.pointer_type(tl.int16)), 16)
    row = tl.arange(0, WINDOW)
    word = tl.load(lanes + window * WINDOW + row, mask=has & (row >= 0), other=0)
    return begin, end, word.to(tl.int32) & 255


@triton.jit
def load_diagonals(cols, values, diagonals, step, end, COUNT: tl.constexpr):
    """[COUNT, WINDOW, PACK] columns and values, [COUNT, WINDOW] which lanes are there, of diagonals from ``step``."""
    lane = tl.arange(0, WINDOW)
    diagonal = step + tl.arange(0, COUNT)
    word = tl.load(diagonals + diagonal, mask=diagonal < end, other=0)
    inside = lane[None, :] < (word & 255)[:, None]
    pack = (word >> 8)[:, None] + lane[None, :]
    at = pack[:, :, None] * PACK + tl.arange(0, PACK)[None, None, :]
    col = tl.load(cols + at, mask=inside[:, :, None], other=0).to(tl.int32) & 0xFFFF
    return col, tl.load(values + at, mask=inside[:, :, None], other=0.0), inside


@triton.jit
def add_to_y(y, y_stride, row, live, column, n, width, total):
    out = y + row[:, None] * y_stride + (column + n)[None, :]
    mask = live[:, None] & (n < width)[None, :]
    before = tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, (before + total).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def sparse(
    y, y_stride, x, x_stride, rows, records, part_slot, part_scale, pointers, num_slots,
    linear0, linear1, linear2, depth,
    K: tl.constexpr, STAGE: tl.constexpr, STEP: tl.constexpr, EARLY: tl.constexpr,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    COLUMN0: tl.constexpr, COLUMN1: tl.constexpr, COLUMN2: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, windows of all members). Reads and writes each element of y once, however many parts a row has.

    STAGE: a power of two from K on, the columns that shared memory takes; 0: x is read element by element. STEP:
    diagonals at a time.
    """
    wait_then_allow(EARLY)
    num_rows, first, part_begin, part_end, first_slot, _plane, _distance = tile_of(records, tl.program_id(0))
    member, window = place(tl.program_id(1), WIDTH0, WIDTH1, WIDTH2, WINDOW)
    linear = pick(member, linear0, linear1, linear2)
    n = window * WINDOW + tl.arange(0, WINDOW)
    mask = n < pick(member, WIDTH0, WIDTH1, WIDTH2)
    for i in range(num_rows):
        row = tl.load(rows + first + i).to(tl.int64)
        out = y + row * y_stride + pick(member, COLUMN0, COLUMN1, COLUMN2) + n
        before = tl.load(out, mask=mask, other=0.0)
        x_row = x + row * x_stride
        if STAGE > 0:
            k = tl.arange(0, STAGE)
            stage = tl.load(x_row + k, mask=k < K, other=0.0)
        total = tl.zeros((WINDOW,), dtype=tl.float32)
        count = 0
        slot = first_slot
        for part in range(part_begin, part_end):
            begin, end, lane = window_of(pointers, linear, slot, num_slots, window)
            cols, values, diagonals = entries_of(x, pointers, linear, slot, num_slots)
            sums = tl.zeros((WINDOW,), dtype=tl.float32)
            for step in range(begin, end, STEP):
                col, value, inside = load_diagonals(cols, values, diagonals, step, end, STEP)
                if STAGE > 0:
                    picked = tl.gather(stage, tl.reshape(col, (STEP * WINDOW * PACK,)), 0)
                    x_at = tl.reshape(picked, (STEP, WINDOW, PACK))
                else:
                    x_at = tl.load(x_row + col, mask=inside[:, :, None], other=0.0)
                # A lane that is not there must not meet what x has in its first column.
                packs = tl.sum(x_at.to(tl.float32) * value.to(tl.float32), 2)
                sums += tl.sum(tl.where(inside, packs, 0.0), 0)
            total += tl.gather(sums, lane, 0) * scale_of(part_scale, part, depth)
            count += end - begin
            slot = tl.load(part_slot + part + 1, mask=part + 1 < part_end, other=0)
        if count > 0:
            tl.store(out, (before.to(tl.float32) + total).to(y.dtype.element_ty), mask=mask)
