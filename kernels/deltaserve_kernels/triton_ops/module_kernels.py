"""Residual modules at one attach point: ``y += scale * (up(phi(down x + down_bias)) + up_bias)``, two launches.

Rows go one after another over plain multiply-adds, as in ``lora_rows``. A group of ranks belongs to one program, which
goes over the whole row, so that phi is taken where the sum is. A binding has at most one module at a point.

``pointers`` int64 [point][4][slot]: down, up transposed, down_bias, up_bias, 0 where there is none. ``sizes`` int32
[point][3][slot]: rank, activation (its place in ``module_tables.ACTIVATIONS``), 1 + the point that is read or 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.triton_ops.early import wait_then_allow
from deltaserve_kernels.triton_ops.lora_kernels import load_b, scale_of, tile_of

VARYING = ["rows", "records", "part_slot", "part_scale", "pointers", "sizes", "num_slots", "point", "depth"]


@triton.jit
def module_of(part_slot, part_scale, pointers, num_slots, point, part_begin, part_end):
    """(slot, part) of the module at a point among an item's parts, (-1, -1) for none. At scale 0 throughout is none."""
    slot = -1
    place = -1
    for part in range(part_begin, part_end):
        of_part = tl.load(part_slot + part)
        acts = (tl.load(part_scale + 2 * part) != 0.0) | (tl.load(part_scale + 2 * part + 1) != 0.0)
        has = acts & (tl.load(pointers + point * 4 * num_slots + of_part) != 0)
        slot = tl.where(has, of_part, slot)
        place = tl.where(has, part, place)
    return slot, place


@triton.jit
def vector_at(pointers, which, num_slots, point, slot, index, mask):
    """fp32 numbers of a bias, zeros where there is none."""
    address = tl.load(pointers + (point * 4 + which) * num_slots + slot)
    at = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
    return tl.load(at + index, mask=mask & (address != 0), other=0.0)


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def activate(x, which):
    result = x
    if which == 0:
        result = tl.where(x > 0.0, x, tl.where(x == x, 0.0, x))
    elif which == 1:
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif which == 2:
        result = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif which == 3:
        result = x / (1.0 + tl.exp(-x))
    elif which == 4:
        result = tanh(x)
    return result


@triton.jit(do_not_specialize=VARYING)
def module_down(
    h, max_rank, y, y_stride, other, other_stride, rows, records, part_slot, part_scale, pointers, sizes, num_slots,
    point, depth,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (programs that share out the ranks, tiles). ``phi(down x + down_bias)`` into h fp32 [position, max_rank].

    x is the row of y, or of ``other`` where the module reads another point.
    """
    wait_then_allow(EARLY)
    num_rows, first, part_begin, part_end, _slot, _plane, _distance = tile_of(records, tl.program_id(1))
    slot, _part = module_of(part_slot, part_scale, pointers, num_slots, point, part_begin, part_end)
    if (num_rows > 0) & (slot >= 0):
        rank = tl.load(sizes + point * 3 * num_slots + slot)
        which = tl.load(sizes + (point * 3 + 1) * num_slots + slot)
        reads = tl.load(sizes + (point * 3 + 2) * num_slots + slot)
        address = tl.load(pointers + point * 4 * num_slots + slot)
        down = tl.multiple_of(address.to(tl.pointer_type(y.dtype.element_ty)), 16)
        source = y
        stride = y_stride
        if reads != 0:
            source = other
            stride = other_stride
        for begin in range(tl.program_id(0) * GROUP, rank, tl.num_programs(0) * GROUP):
            r = begin + tl.arange(0, GROUP)
            bias = vector_at(pointers, 2, num_slots, point, slot, r, r < rank)
            for i in range(num_rows):
                x_row = source + tl.load(rows + first + i).to(tl.int64) * stride
                acc = tl.zeros((GROUP, CHUNK), dtype=tl.float32)
                for step in range(0, SIZE, CHUNK):
                    k = step + tl.arange(0, CHUNK)
                    x_at = tl.load(x_row + k, mask=k < SIZE, other=0.0).to(tl.float32)
                    tile = tl.load(
                        down + r[:, None] * SIZE + k[None, :], mask=(r < rank)[:, None] & (k < SIZE)[None, :], other=0.0
                    )
                    acc += tile.to(tl.float32) * x_at[None, :]
                tl.store(h + (first + i) * max_rank + r, activate(tl.sum(acc, 1) + bias, which), mask=r < rank)


@triton.jit(do_not_specialize=VARYING)
def module_up(
    y, y_stride, h, max_rank, rows, records, part_slot, part_scale, pointers, sizes, num_slots, point, depth,
    SIZE: tl.constexpr, RANK_TILE: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, output tiles). ``y += scale * (up h + up_bias)``."""
    wait_then_allow(EARLY)
    num_rows, first, part_begin, part_end, _slot, _plane, _distance = tile_of(records, tl.program_id(0))
    slot, part = module_of(part_slot, part_scale, pointers, num_slots, point, part_begin, part_end)
    if (num_rows > 0) & (slot >= 0):
        scale = scale_of(part_scale, part, depth)
        if scale != 0.0:
            n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
            rank = tl.load(sizes + point * 3 * num_slots + slot)
            address = tl.load(pointers + (point * 4 + 1) * num_slots + slot)
            up = tl.multiple_of(address.to(tl.pointer_type(y.dtype.element_ty)), 16)
            bias = vector_at(pointers, 3, num_slots, point, slot, n, n < SIZE)
            for i in range(num_rows):
                row = tl.load(rows + first + i).to(tl.int64)
                out = y + row * y_stride + n
                before = tl.load(out, mask=n < SIZE, other=0.0).to(tl.float32)
                acc = bias
                for begin in range(0, rank, RANK_TILE):
                    r = begin + tl.arange(0, RANK_TILE)
                    weights = tl.load(h + (first + i) * max_rank + r, mask=r < rank, other=0.0)
                    acc += tl.sum(load_b(up, begin, rank, SIZE, n, RANK_TILE).to(tl.float32) * weights[:, None], 0)
                tl.store(out, (before + scale * acc).to(y.dtype.element_ty), mask=n < SIZE)


@triton.jit(do_not_specialize=VARYING)
def set_module_rows_aside(
    y, y_stride, kept, rows, records, part_slot, part_scale, pointers, num_slots, point,
    SIZE: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, output tiles). Rows with a module at the point go to ``kept`` [position, SIZE] and become 0."""
    wait_then_allow(EARLY)
    num_rows, first, part_begin, part_end, _slot, _plane, _distance = tile_of(records, tl.program_id(0))
    slot, _part = module_of(part_slot, part_scale, pointers, num_slots, point, part_begin, part_end)
    if slot >= 0:
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        for i in range(num_rows):
            at = y + tl.load(rows + first + i).to(tl.int64) * y_stride + n
            values = tl.load(at, mask=n < SIZE, other=0.0)
            tl.store(kept + (first + i) * SIZE + n, values, mask=n < SIZE)
            tl.store(at, tl.zeros((BLOCK_N,), dtype=y.dtype.element_ty), mask=n < SIZE)


@triton.jit(do_not_specialize=VARYING)
def put_module_rows_back(
    y, y_stride, kept, rows, records, part_slot, part_scale, pointers, num_slots, point,
    SIZE: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, output tiles). What ``set_module_rows_aside`` kept is added, rounded once."""
    wait_then_allow(EARLY)
    num_rows, first, part_begin, part_end, _slot, _plane, _distance = tile_of(records, tl.program_id(0))
    slot, _part = module_of(part_slot, part_scale, pointers, num_slots, point, part_begin, part_end)
    if slot >= 0:
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        for i in range(num_rows):
            at = y + tl.load(rows + first + i).to(tl.int64) * y_stride + n
            own = tl.load(at, mask=n < SIZE, other=0.0).to(tl.float32)
            before = tl.load(kept + (first + i) * SIZE + n, mask=n < SIZE, other=0.0).to(tl.float32)
            tl.store(at, (before + own).to(y.dtype.element_ty), mask=n < SIZE)
