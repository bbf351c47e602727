"""Low-rank kernels for few rows an adapter (decode): rows one after another, plain multiply-adds, no matrix products.

A matrix product has 16 rows at least, so with one row an adapter fifteen sixteenths of it are padding, and its operands
travel through shared memory. Here an adapter's numbers go from memory into registers and are used there: a thread holds
eight columns of B (or of A) for all ranks of a tile, so that B's sum over ranks crosses no thread, and A's one warp
shuffle at the end. An adapter is read once however many of its rows a tile has.

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
def load_x(x, x_stride, rows, position, k, K: tl.constexpr):
    row = tl.load(rows + position).to(tl.int64)
    return tl.load(x + row * x_stride + k, mask=k < K, other=0.0)


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
                x_row = load_x(x, x_stride, rows, first, k, K)
                for i in range(num_rows):
                    # The next row is asked for before this one is used; after the last one, that one again.
                    x_next = load_x(x, x_stride, rows, first + tl.minimum(i + 1, num_rows - 1), k, K)
                    sums = tl.sum(a_tile.to(tl.float32) * x_row.to(tl.float32)[None, :], 1)
                    tl.store(out + i * plane_stride + r, sums, mask=r < rank)
                    x_row = x_next


@triton.jit
def load_h(h, split_stride, r, rank, SPLITS: tl.constexpr):
    """One shrunk row's entries r, planes added in order."""
    total = tl.load(h + r, mask=r < rank, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(h + split * split_stride + r, mask=r < rank, other=0.0, cache_modifier=".cg")
    return total


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
        for i in range(num_rows):
            row = tl.load(rows + first + i).to(tl.int64)
            out = y + row * y_stride + column + n
            before = tl.load(out, mask=n < width, other=0.0).to(tl.float32)
            acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
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
                    weights = load_h(source, split_stride, rank_begin + r0, rank, SPLITS) * scale
                    acc += tl.sum(b_tile.to(tl.float32) * weights[:, None], 0)
            if VECTORS:
                factor, shift = load_vectors(
                    vectors, part_slot, part_scale, part_begin, part_end, linear, num_slots, n, width, depth
                )  # fmt: skip
                before = before * factor + shift
            acc += before
            tl.store(out, acc.to(y.dtype.element_ty), mask=n < width)
    elif EARLY:
        gdc_wait()  # see ``early``
