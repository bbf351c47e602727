"""Vector terms row by row: a program has a piece of one row, finds the row's parts and leaves where none has an entry.

``pointers`` int64 [linear or norm][scale, bias][slot]: addresses of fp32 vectors, 0 where there is none. A part whose
scale is 0 at the first layer and at the last has no entry. Sums are fp32 in binding order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.triton_ops.early import wait_then_allow
from deltaserve_kernels.triton_ops.lora_kernels import pick, scale_of, vector
from deltaserve_kernels.triton_ops.lora_programs import place

# Not specialised: what differs from step to step or layer to layer, and pointers into packed buffers.
VARYING = [
    "rows", "row_item", "item_parts", "part_slot", "part_scale", "pointers", "num_slots", "depth", "unit",
    "linear0", "linear1", "linear2", "num_listed", "first_row", "eps", "offset", "flags", "turns",
]  # fmt: skip


@triton.jit
def has_entry(
    item, item_parts, part_slot, part_scale, pointers, linear, num_slots, ZEROS_COUNT: tl.constexpr = False
):  # fmt: skip
    """Parts of an item (-1: none) that have a vector; ZEROS_COUNT: those whose scale is 0 throughout too."""
    found = 0
    if item >= 0:
        for part in range(tl.load(item_parts + item), tl.load(item_parts + item + 1)):
            slot = tl.load(part_slot + part)
            some = vector(pointers, 0, linear, slot, num_slots) | vector(pointers, 1, linear, slot, num_slots)
            acts = some != 0
            if not ZEROS_COUNT:
                acts = acts & (
                    (tl.load(part_scale + 2 * part) != 0.0) | (tl.load(part_scale + 2 * part + 1) != 0.0)
                )  # fmt: skip
            found += acts.to(tl.int32)
    return found


@triton.jit
def turned(item, item_parts, part_slot, part_scale, turns, linear, num_slots):
    """Parts of an item that turn the linear's input; ``turns`` int64 [linear][slot], 0: nothing is turned."""
    found = 0
    if item >= 0:
        for part in range(tl.load(item_parts + item), tl.load(item_parts + item + 1)):
            acts = tl.load(turns + linear * num_slots + tl.load(part_slot + part)) != 0
            acts = acts & (
                (tl.load(part_scale + 2 * part) != 0.0) | (tl.load(part_scale + 2 * part + 1) != 0.0)
            )  # fmt: skip
            found += acts.to(tl.int32)
    return found


@triton.jit
def add_vectors(
    factor, shift, item, item_parts, part_slot, part_scale, pointers, linear, num_slots, n, width, depth, unit
):
    """(factor + sum of scale * (s - unit), shift + sum of scale * b) of columns n over the parts of an item."""
    for part in range(tl.load(item_parts + item), tl.load(item_parts + item + 1)):
        slot = tl.load(part_slot + part)
        scale = scale_of(part_scale, part, depth)
        s = vector(pointers, 0, linear, slot, num_slots)
        b = vector(pointers, 1, linear, slot, num_slots)
        s_at = tl.multiple_of(s.to(tl.pointer_type(tl.float32)), 16)
        b_at = tl.multiple_of(b.to(tl.pointer_type(tl.float32)), 16)
        factor += scale * (tl.load(s_at + n, mask=(n < width) & (s != 0), other=unit) - unit)
        shift += scale * tl.load(b_at + n, mask=(n < width) & (b != 0), other=0.0)
    return factor, shift


@triton.jit(do_not_specialize=VARYING)
def scale_rows(
    y, y_stride, gain, shift, rows, row_item, item_parts, part_slot, part_scale, pointers, num_slots,
    linear0, linear1, linear2, depth, unit,
    HAS_GAIN: tl.constexpr, HAS_SHIFT: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    COLUMN0: tl.constexpr, COLUMN1: tl.constexpr, COLUMN2: tl.constexpr,
):  # fmt: skip
    """Grid (R listed rows, output tiles of all members): ``y = y * f + t``."""
    wait_then_allow(EARLY)
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    item = tl.load(row_item + row)
    member, tile_n = place(tl.program_id(1), WIDTH0, WIDTH1, WIDTH2, BLOCK_N)
    linear = pick(member, linear0, linear1, linear2)
    width = pick(member, WIDTH0, WIDTH1, WIDTH2)
    column = pick(member, COLUMN0, COLUMN1, COLUMN2)
    # With a gain or shift of the base's, even a part at 0 has it met its row, as in the definition.
    zeros_count: tl.constexpr = HAS_GAIN or HAS_SHIFT
    if has_entry(item, item_parts, part_slot, part_scale, pointers, linear, num_slots, zeros_count) > 0:
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        out = y + row * y_stride + column + n
        before = tl.load(out, mask=n < width, other=0.0).to(tl.float32)
        factor = tl.full((BLOCK_N,), 1.0, dtype=tl.float32)
        total = tl.zeros((BLOCK_N,), dtype=tl.float32)
        if HAS_GAIN:
            factor = tl.load(gain + n, mask=n < width, other=0.0)
        if HAS_SHIFT:
            total = tl.load(shift + n, mask=n < width, other=0.0)
        factor, total = add_vectors(
            factor, total, item, item_parts, part_slot, part_scale, pointers, linear, num_slots, n, width, depth, unit
        )
        tl.store(out, (before * factor + total).to(y.dtype.element_ty), mask=n < width)


@triton.jit(do_not_specialize=VARYING)
def feed_rows(
    out, x, x_stride, rows, row_item, item_parts, part_slot, part_scale, pointers, num_slots,
    linear0, linear1, linear2, depth, num_listed, first_row,
    K: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (members * R, blocks of K): row ``first_row + i`` of ``out`` [*, K] is one listed, as a member is fed it."""
    wait_then_allow(EARLY)
    position = tl.program_id(0)
    row = tl.load(rows + position % num_listed).to(tl.int64)
    item = tl.load(row_item + row)
    linear = pick(position // num_listed, linear0, linear1, linear2)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    values = tl.load(x + row * x_stride + k, mask=k < K, other=0.0)
    if has_entry(item, item_parts, part_slot, part_scale, pointers, linear, num_slots) > 0:
        factor = tl.full((BLOCK_K,), 1.0, dtype=tl.float32)
        total = tl.zeros((BLOCK_K,), dtype=tl.float32)
        factor, total = add_vectors(
            factor, total, item, item_parts, part_slot, part_scale, pointers, linear, num_slots, k, K, depth, 1.0
        )
        values = (values.to(tl.float32) * factor).to(x.dtype.element_ty)
    tl.store(out + (first_row + position).to(tl.int64) * K + k, values, mask=k < K)


@triton.jit(do_not_specialize=VARYING)
def gather_rows(
    y, y_stride, rows, row_item, item_parts, part_slot, part_scale, pointers, num_slots, turns,
    linear0, linear1, linear2, num_listed, first_row,
    BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    COLUMN0: tl.constexpr, COLUMN1: tl.constexpr, COLUMN2: tl.constexpr,
):  # fmt: skip
    """Grid (R, output tiles of all members): columns of a member come from the row that was made for it."""
    wait_then_allow(EARLY)
    position = tl.program_id(0)
    row = tl.load(rows + position).to(tl.int64)
    item = tl.load(row_item + row)
    member, tile_n = place(tl.program_id(1), WIDTH0, WIDTH1, WIDTH2, BLOCK_N)
    linear = pick(member, linear0, linear1, linear2)
    found = has_entry(item, item_parts, part_slot, part_scale, pointers, linear, num_slots)
    if found == 0:
        found = turned(item, item_parts, part_slot, part_scale, turns, linear, num_slots)
    if found > 0:
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = n < pick(member, WIDTH0, WIDTH1, WIDTH2)
        columns = pick(member, COLUMN0, COLUMN1, COLUMN2) + n
        source = (first_row + member * num_listed + position).to(tl.int64)
        tl.store(y + row * y_stride + columns, tl.load(y + source * y_stride + columns, mask=mask), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def set_rows_aside(y, y_stride, kept, rows, flags, N: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr):
    """Grid (R, blocks of N). ``flags`` int32 [T]: which rows to keep in ``kept`` [R, N] and make 0."""
    wait_then_allow(EARLY)
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    if tl.load(flags + row) != 0:
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        at = y + row * y_stride + n
        values = tl.load(at, mask=n < N, other=0.0)
        tl.store(kept + tl.program_id(0).to(tl.int64) * N + n, values, mask=n < N)
        tl.store(at, tl.zeros((BLOCK_N,), dtype=y.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=VARYING)
def put_rows_back(y, y_stride, kept, rows, flags, N: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr):
    """Grid (R, blocks of N): what ``set_rows_aside`` kept is added, rounded once."""
    wait_then_allow(EARLY)
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    if tl.load(flags + row) != 0:
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        at = y + row * y_stride + n
        before = tl.load(kept + tl.program_id(0).to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)
        own = tl.load(at, mask=n < N, other=0.0).to(tl.float32)
        tl.store(at, (before + own).to(y.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=VARYING)
def changed_norm_rows(
    out, x, x_stride, weight, gain, eps, offset,
    row_item, item_parts, part_slot, part_scale, pointers, num_slots, linear0, depth,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (T): ``rms_norm_rows``, its arithmetic for rows without a difference; ``linear0`` is the norm's number."""
    wait_then_allow(EARLY)
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    mask = n < SIZE
    values = tl.load(x + row * x_stride + n, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(weight + n, mask=mask, other=0.0).to(tl.float32) + offset
    item = tl.load(row_item + row)
    inverse = tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps)
    result = values * inverse * factor
    if has_entry(item, item_parts, part_slot, part_scale, pointers, linear0, num_slots) > 0:
        factor = tl.load(gain + n, mask=mask, other=0.0)
        shift = tl.zeros((BLOCK,), dtype=tl.float32)
        factor, shift = add_vectors(
            factor, shift, item, item_parts, part_slot, part_scale, pointers, linear0, num_slots, n, SIZE, depth, 0.0
        )
        result = values * inverse * factor + shift
    tl.store(out + row * SIZE + n, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def change_norm_rows(
    y, normalised, gain, shift, rows, row_item, item_parts, part_slot, part_scale, pointers, num_slots, linear0, depth,
    HAS_SHIFT: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (R, blocks of SIZE): ``y = n * f + t`` where a row has a difference; all rows are [*, SIZE], contiguous."""
    wait_then_allow(EARLY)
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    item = tl.load(row_item + row)
    if has_entry(item, item_parts, part_slot, part_scale, pointers, linear0, num_slots) > 0:
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = n < SIZE
        factor = tl.load(gain + n, mask=mask, other=0.0)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        if HAS_SHIFT:
            total = tl.load(shift + n, mask=mask, other=0.0)
        factor, total = add_vectors(
            factor, total, item, item_parts, part_slot, part_scale, pointers, linear0, num_slots, n, SIZE, depth, 0.0
        )
        values = tl.load(normalised + row * SIZE + n, mask=mask, other=0.0)
        tl.store(y + row * SIZE + n, (values * factor + total).to(y.dtype.element_ty), mask=mask)
