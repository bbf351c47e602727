"""Low-rank kernels for few rows an adapter (decode): some rows at a time, plain multiply-adds, no products.

A matrix product has 16 rows at least, so with one row an adapter fifteen sixteenths of it are padding, and its operands
travel through shared memory. Here an adapter's numbers go from memory into registers and are used there: a thread holds
eight columns of B (or of A) for all ranks of a tile, so that B's sum over ranks crosses no thread, and A's only at its
end. An adapter is read once however many of its rows a tile has; several rows are under way at once, each summed as if
it were alone.

Shapes, planes and pointer tables as in ``lora_kernels``; K is cut into chunks of a fixed size, a plane each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from deltaserve_kernels.triton_ops.early import wait_then_allow
from deltaserve_kernels.triton_ops.lora_kernels import (
    load_b,
    load_vectors,
    matrix,
    pick,
    scale_of,
    tile_of,
    vector,
)
from deltaserve_kernels.triton_ops.lora_programs import VARYING, place


@triton.jit
def load_x(x, x_stride, rows, position, live, k, K: tl.constexpr):
    row = tl.load(rows + position, mask=live, other=0).to(tl.int64)
    return tl.load(x + row * x_stride + k, mask=live & (k < K), other=0.0)


@triton.jit
def store_h(out, plane_stride, i, a_tile, x_row, r, rank, live):
    sums = tl.sum(a_tile.to(tl.float32) * x_row.to(tl.float32)[None, :], 1)
    tl.store(out + i * plane_stride + r, sums, mask=live & (r < rank))


@triton.jit(do_not_specialize=VARYING)
def shrink_rows(
    x, x_stride, h, split_stride, plane_stride, max_rank,
    rows, records, part_slot, part_scale, pointers, ranks, num_slots,
    linear0, linear1, linear2, depth,
    K: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (members * PROGRAMS, chunks of K, tiles). Each of PROGRAMS takes every PROGRAMS-th group of GROUP ranks.

    EARLY: see ``early``.
    """
    wait_then_allow(EARLY)
    member = tl.program_id(0) // PROGRAMS
    split = tl.program_id(1)
    linear = pick(member, linear0, linear1, linear2)
    num_rows, first, part_begin, part_end, slot, first_plane, plane_step = tile_of(records, tl.program_id(2))
    if num_rows > 0:
        k = split * CHUNK + tl.arange(0, CHUNK)
        for part in range(part_begin, part_end):
            rank = tl.load(ranks + linear * num_slots + slot)
            a = matrix(x, pointers, 0, linear, slot, num_slots)
            slot = tl.load(part_slot + part + 1, mask=part + 1 < part_end, other=0)
            plane = first_plane + (part - part_begin) * plane_step
            out = h + split * split_stride + plane.to(tl.int64) * plane_stride + member * max_rank
            for rank_begin in range(tl.program_id(0) % PROGRAMS * GROUP, rank, PROGRAMS * GROUP):
                r = rank_begin + tl.arange(0, GROUP)
                a_tile = tl.load(
                    a + r[:, None] * K + k[None, :], mask=(r < rank)[:, None] & (k < K)[None, :], other=0.0
                )
                for i in range(0, num_rows, 2):
                    has_second = i + 1 < num_rows
                    x0 = load_x(x, x_stride, rows, first + i, True, k, K)
                    x1 = load_x(x, x_stride, rows, first + i + 1, has_second, k, K)
                    store_h(out, plane_stride, i, a_tile, x0, r, rank, True)
                    store_h(out, plane_stride, i + 1, a_tile, x1, r, rank, has_second)


@triton.jit
def load_h(h, split_stride, mask, SPLITS: tl.constexpr):
    """Entries of one shrunk row at ``h``, planes added in order."""
    total = tl.load(h, mask=mask, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(h + split * split_stride, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def add_ranks(acc, b_tile, h, split_stride, mask, scale, SPLITS: tl.constexpr):
    """``acc + scale * h @ b_tile`` for one row."""
    return acc + tl.sum(b_tile.to(tl.float32) * (load_h(h, split_stride, mask, SPLITS) * scale)[:, None], 0)


@triton.jit
def store_y(out, before, acc, factor, shift, mask, VECTORS: tl.constexpr):
    acc = before.to(tl.float32) + acc
    if VECTORS:
        acc = acc * factor + shift
    tl.store(out, acc.to(before.dtype), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def expand_rows(
    y, y_stride, h, split_stride, plane_stride, max_rank,
    rows, records, part_slot, part_scale, pointers, ranks, vectors, num_slots,
    linear0, linear1, linear2, depth,
    SPLITS: tl.constexpr, RANK_TILE: tl.constexpr, BLOCK_N: tl.constexpr, VECTORS: tl.constexpr, EARLY: tl.constexpr,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    COLUMN0: tl.constexpr, COLUMN1: tl.constexpr, COLUMN2: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, output tiles of all members). The first piece of B and y are asked for before h is looked at."""
    if EARLY:
        gdc_launch_dependents()
    member, tile_n = place(tl.program_id(1), WIDTH0, WIDTH1, WIDTH2, BLOCK_N)
    linear = pick(member, linear0, linear1, linear2)
    width = pick(member, WIDTH0, WIDTH1, WIDTH2)
    column = pick(member, COLUMN0, COLUMN1, COLUMN2)
    num_rows, first, part_begin, part_end, first_slot, first_plane, plane_step = tile_of(records, tl.program_id(0))
    work = 0
    for part in range(part_begin, part_end):
        slot = first_slot
        if part > part_begin:
            slot = tl.load(part_slot + part)
        work += tl.load(ranks + linear * num_slots + slot)
        if VECTORS:
            for which in tl.static_range(2):
                work += (vector(vectors, which, linear, slot, num_slots) != 0).to(tl.int32)
    if (num_rows > 0) & (work > 0):
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        r0 = tl.arange(0, RANK_TILE)
        first_rank = tl.load(ranks + linear * num_slots + first_slot)
        # The only piece of B that is there at a time; with one piece in all, the rows after the first find it still.
        b_tile = load_b(matrix(y, pointers, 1, linear, first_slot, num_slots), 0, first_rank, width, n, RANK_TILE)
        several = (part_end - part_begin > 1) | (first_rank > RANK_TILE)
        if EARLY:
            gdc_wait()
        factor = n
        shift = n
        if VECTORS:
            factor, shift = load_vectors(
                vectors, part_slot, part_scale, part_begin, part_end, linear, num_slots, n, width, depth
            )  # fmt: skip
        for i in range(0, num_rows, 2):
            # Two rows at once, the second perhaps not there: to have both under way costs less than to ask.
            inside = n < width
            has_second = i + 1 < num_rows
            out0 = y + tl.load(rows + first + i).to(tl.int64) * y_stride + column + n
            out1 = y + tl.load(rows + first + i + 1, mask=has_second, other=0).to(tl.int64) * y_stride + column + n
            before0 = tl.load(out0, mask=inside, other=0.0)
            before1 = tl.load(out1, mask=inside & has_second, other=0.0)
            acc0 = tl.zeros((BLOCK_N,), dtype=tl.float32)
            acc1 = tl.zeros((BLOCK_N,), dtype=tl.float32)
            for part in range(part_begin, part_end):
                slot = first_slot
                if part > part_begin:
                    slot = tl.load(part_slot + part)
                rank = tl.load(ranks + linear * num_slots + slot)
                b = matrix(y, pointers, 1, linear, slot, num_slots)
                scale = scale_of(part_scale, part, depth)
                plane = first_plane + (part - part_begin) * plane_step + i
                source = h + plane.to(tl.int64) * plane_stride + member * max_rank
                for rank_begin in range(0, rank, RANK_TILE):
                    if (rank_begin > 0) | (part > part_begin) | (several & (i > 0)):
                        b_tile = load_b(b, rank_begin, rank, width, n, RANK_TILE)
                    r = rank_begin + r0
                    at = source + r
                    acc0 = add_ranks(acc0, b_tile, at, split_stride, r < rank, scale, SPLITS)
                    second = (r < rank) & has_second
                    acc1 = add_ranks(acc1, b_tile, at + plane_stride, split_stride, second, scale, SPLITS)
            store_y(out0, before0, acc0, factor, shift, inside, VECTORS)
            store_y(out1, before1, acc1, factor, shift, inside & has_second, VECTORS)
    elif EARLY:
        gdc_wait()  # see ``early``
