"""Low-rank kernels: shrink (``A x``), expand (``+= B h``), and both in one launch.

Shapes: x [T, K]; A [r, K] and B transposed [r, N] at true rank, found through pointer tables; h, the shrunk rows,
[split, plane row, member, max_rank] with ``max_rank`` a multiple of the rank tile. K is cut into splits, each writes a
plane of its own and the reader adds the planes in order: no float atomics, so the same bits whoever shares the batch.

The rank is never the contiguous axis of a masked load, every pointer out of a table is declared 16-byte aligned, and
widths and column starts are constants: otherwise adapters would be read 2 bytes at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from deltaserve_kernels.triton_ops.tile_kernels import RECORD


@triton.jit
def pick(member, first, second, third):
    """The member's value of three scalars."""
    return tl.where(member == 0, first, tl.where(member == 1, second, third))


@triton.jit
def matrix(x, pointers, side, linear, slot, num_slots):
    """Address of A (side 0) or B (side 1) of (linear, slot), in x's dtype. int64 [linear][side][slot]."""
    address = tl.load(pointers + (linear * 2 + side) * num_slots + slot)
    return tl.multiple_of(address.to(tl.pointer_type(x.dtype.element_ty)), 16)


@triton.jit
def dot_wide(left, right, acc):
    """``acc + left @ right`` with ``left`` fp32: halves of it, high and low, where ``right`` has 16 bits, so that the
    shrunk row loses nothing that matters (one dot of 16 bits would lose 2^-9 of it)."""
    if right.dtype == tl.float32:
        acc = tl.dot(left, right, acc, input_precision="ieee")
    else:
        high = left.to(right.dtype)
        low = (left - high.to(tl.float32)).to(right.dtype)
        acc = tl.dot(low, right, acc)
        acc = tl.dot(high, right, acc)
    return acc


@triton.jit
def room(rank):
    """Entries of a shrunk row that are written and read: the rank, up to a multiple of 16."""
    return (rank + 15) // 16 * 16


@triton.jit
def tile_of(records, tile):
    """(rows of the tile, first position, first part, end of its parts, slot of the first part, plane row for the first
    part, distance to the next part's): one sector of memory, so one wait; see ``tiles.RowTiles.records``."""
    at = records + tile * RECORD
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
        tl.load(at + 6),
    )  # fmt: skip


@triton.jit
def scale_of(part_scale, part, depth):
    at_first = tl.load(part_scale + 2 * part)
    return at_first + (tl.load(part_scale + 2 * part + 1) - at_first) * depth


@triton.jit
def shrink_tile(
    x, x_stride, h, split_stride, plane_stride, max_rank,
    rows, records, part_slot, part_scale, pointers, ranks, num_slots,
    tile, split, member, linear, depth,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_ROWS: tl.constexpr, RANK_TILE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Write ``A x`` over one split of K, for the rows of one tile, every part and every rank of one member.

    FOLD: multiply by the part's scale and store in h's 16-bit dtype (prefill, one split).
    """
    num_rows, first, part_begin, part_end, slot, first_plane, plane_step = tile_of(records, tile)
    if num_rows > 0:
        position = tl.arange(0, TILE_ROWS)
        live = position < num_rows
        row = tl.load(rows + first + position, mask=live, other=0).to(tl.int64)
        for part in range(part_begin, part_end):
            rank = tl.load(ranks + linear * num_slots + slot)
            a = matrix(x, pointers, 0, linear, slot, num_slots)
            slot = tl.load(part_slot + part + 1, mask=part + 1 < part_end, other=0)
            plane = first_plane + (part - part_begin) * plane_step + position
            out = h + split * split_stride + plane.to(tl.int64) * plane_stride + member * max_rank
            for rank_begin in range(0, rank, RANK_TILE):
                r = rank_begin + tl.arange(0, RANK_TILE)
                acc = tl.zeros((TILE_ROWS, RANK_TILE), dtype=tl.float32)
                for step in range(0, CHUNK, BLOCK_K):
                    k = split * CHUNK + step + tl.arange(0, BLOCK_K)
                    x_tile = tl.load(
                        x + row[:, None] * x_stride + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0
                    )
                    a_tile = tl.load(
                        a + r[:, None] * K + k[None, :], mask=(r < rank)[:, None] & (k < K)[None, :], other=0.0
                    )
                    acc = tl.dot(x_tile, tl.trans(a_tile), acc, input_precision="ieee")
                if FOLD:
                    acc *= scale_of(part_scale, part, depth)
                # Groups of 16 make wide stores. Past the rank A is zero, so h is, in a row without inf or NaN.
                tl.store(
                    out[:, None] + r[None, :], acc.to(h.dtype.element_ty),
                    mask=live[:, None] & (r < room(rank))[None, :],
                )  # fmt: skip


@triton.jit
def load_b(b, rank_begin, rank, width, n, RANK_TILE: tl.constexpr):
    """[RANK_TILE, BLOCK_N] of B transposed, zeros past the rank and the width."""
    r = rank_begin + tl.arange(0, RANK_TILE)
    return tl.load(b + r[:, None] * width + n[None, :], mask=(r < rank)[:, None] & (n < width)[None, :], other=0.0)


@triton.jit
def add_rank_tile(
    acc, b_tile, h, split_stride, plane_stride, plane, member_offset, live, rank_begin, rank, scale,
    SPLITS: tl.constexpr, RANK_TILE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """``acc + scale * h @ b_tile`` over one rank tile, planes added in order."""
    r = rank_begin + tl.arange(0, RANK_TILE)
    source = h + (plane.to(tl.int64) * plane_stride + member_offset)[:, None] + r[None, :]
    mask = live[:, None] & (r < room(rank))[None, :]
    # .cg: another program of this launch may just have written it, so the first-level cache is no place to look.
    total = tl.load(source, mask=mask, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(source + split * split_stride, mask=mask, other=0.0, cache_modifier=".cg")
    if FOLD:
        # Scaled and rounded already, one split. Nothing may touch it between the load and the dot: ptxas before 13.3
        # may reuse registers that a 64-row warpgroup product still reads.
        acc = tl.dot(total, b_tile, acc, input_precision="ieee")
    else:
        acc = dot_wide(total * scale, b_tile, acc)
    return acc


@triton.jit
def vector(vectors, which, linear, slot, num_slots):
    """Address of an output scale (0) or bias (1) of (linear, slot), fp32; 0 where there is none."""
    return tl.load(vectors + (linear * 2 + which) * num_slots + slot)


@triton.jit
def load_vectors(vectors, part_slot, part_scale, part_begin, part_end, linear, num_slots, n, width, depth):
    """(factor, shift) of columns n: ``1 + sum of scale * (s - 1)`` and the sum of ``scale * b`` over parts."""
    factor = tl.full(n.shape, 1.0, dtype=tl.float32)
    shift = tl.zeros(n.shape, dtype=tl.float32)
    for part in range(part_begin, part_end):
        slot = tl.load(part_slot + part)
        at_first = tl.load(part_scale + 2 * part)
        scale = at_first + (tl.load(part_scale + 2 * part + 1) - at_first) * depth
        s = vector(vectors, 0, linear, slot, num_slots)
        b = vector(vectors, 1, linear, slot, num_slots)
        s_at = tl.multiple_of(s.to(tl.pointer_type(tl.float32)), 16)
        b_at = tl.multiple_of(b.to(tl.pointer_type(tl.float32)), 16)
        factor += scale * (tl.load(s_at + n, mask=(n < width) & (s != 0), other=1.0) - 1.0)
        shift += scale * tl.load(b_at + n, mask=(n < width) & (b != 0), other=0.0)
    return factor, shift


@triton.jit
def expand_tile(
    y, y_stride, h, split_stride, plane_stride, max_rank,
    rows, records, part_slot, part_scale, pointers, ranks, vectors, num_slots,
    flag, tile, member, linear, width, column, tile_n, depth,
    SPLITS: tl.constexpr, TILE_ROWS: tl.constexpr, RANK_TILE: tl.constexpr, BLOCK_N: tl.constexpr,
    FOLD: tl.constexpr, VECTORS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Add every part's ``B h`` to one tile of y: [TILE_ROWS, BLOCK_N] of one member, read and written once.

    The first B tile and y are asked for before h is looked at. VECTORS: y is scaled and shifted by the parts' vectors
    first; an item of rank 0 may have nothing else. WAIT: h comes from others that may still be at work. "flag":
    programs of this launch, until ``flag`` counts all SPLITS of them; "launch": the launch before this one.
    """
    num_rows, first, part_begin, part_end, first_slot, first_plane, plane_step = tile_of(records, tile)
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
        position = tl.arange(0, TILE_ROWS)
        live = position < num_rows
        row = tl.load(rows + first + position, mask=live, other=0).to(tl.int64)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        out = y + row[:, None] * y_stride + (column + n)[None, :]
        out_mask = live[:, None] & (n < width)[None, :]
        slot = first_slot
        rank = tl.load(ranks + linear * num_slots + slot)
        b_tile = load_b(matrix(y, pointers, 1, linear, slot, num_slots), 0, rank, width, n, RANK_TILE)
        before = tl.load(out, mask=out_mask, other=0.0)
        if WAIT == "flag":
            while tl.atomic_add(flag, 0, sem="acquire") < SPLITS:
                pass
        if WAIT == "launch":
            gdc_wait()
        acc = tl.zeros((TILE_ROWS, BLOCK_N), dtype=tl.float32)
        for part in range(part_begin, part_end):
            if part > part_begin:
                slot = tl.load(part_slot + part)
                rank = tl.load(ranks + linear * num_slots + slot)
            scale = scale_of(part_scale, part, depth)
            plane = first_plane + (part - part_begin) * plane_step + position
            b = matrix(y, pointers, 1, linear, slot, num_slots)
            if part > part_begin:
                b_tile = load_b(b, 0, rank, width, n, RANK_TILE)
            # Not pipelined by the compiler, which would stage h's planes in shared memory: B is what comes from afar,
            # and the next tile of it is asked for before this one is used.
            for rank_begin in tl.range(0, rank, RANK_TILE, num_stages=1):
                b_next = load_b(b, rank_begin + RANK_TILE, rank, width, n, RANK_TILE)
                acc = add_rank_tile(
                    acc, b_tile, h, split_stride, plane_stride, plane, member * max_rank, live, rank_begin, rank, scale,
                    SPLITS, RANK_TILE, FOLD,
                )  # fmt: skip
                b_tile = b_next
        base = before.to(tl.float32)
        if VECTORS:
            # Not before the wait: held across the loop they would push other registers out to memory.
            factor, shift = load_vectors(
                vectors, part_slot, part_scale, part_begin, part_end, linear, num_slots, n, width, depth
            )  # fmt: skip
            base = base * factor[None, :] + shift[None, :]
        tl.store(out, (base + acc).to(y.dtype.element_ty), mask=out_mask)
    elif WAIT == "launch":
        gdc_wait()  # see ``early``
