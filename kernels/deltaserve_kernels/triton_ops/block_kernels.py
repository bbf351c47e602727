"""Row and column blocks as low-rank kernels with index lists.

Listed columns: the shrunk row is ``x[cols]``, read through the list, and D is B. Listed rows: D is A, and the expansion
puts the shrunk row's entries where the inverse list says, so that parts that share outputs meet in registers and y is
written once. Both: the shrink reads x through the list. Splits and planes as in ``lora_kernels``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.triton_ops.lora_kernels import load_b, pick, scale_of
from deltaserve_kernels.triton_ops.lora_programs import VARYING as LORA_VARYING
from deltaserve_kernels.triton_ops.lora_programs import place

VARYING = [*(name for name in LORA_VARYING if name != "ranks"), "sizes"]


@triton.jit
def block_of(x, pointers, sizes, linear, slot, num_slots):
    """(columns, D, inverse, number of listed columns, of listed rows) of (linear, slot); all 0 where it is empty."""
    cols = tl.load(pointers + linear * 3 * num_slots + slot).to(tl.pointer_type(tl.int32))
    d = tl.load(pointers + (linear * 3 + 1) * num_slots + slot).to(tl.pointer_type(x.dtype.element_ty))
    inverse = tl.load(pointers + (linear * 3 + 2) * num_slots + slot).to(tl.pointer_type(tl.int32))
    num_cols = tl.load(sizes + linear * 2 * num_slots + slot)
    num_rows = tl.load(sizes + (linear * 2 + 1) * num_slots + slot)
    return tl.multiple_of(cols, 16), tl.multiple_of(d, 16), tl.multiple_of(inverse, 16), num_cols, num_rows


@triton.jit
def listed_dot(x, x_stride, row, live, cols, num_cols, d, r, num_rows, begin, end, BLOCK_K: tl.constexpr):
    """``x[cols] D^T`` over the listed columns [begin, end): [rows, r]."""
    acc = tl.zeros((row.shape[0], r.shape[0]), dtype=tl.float32)
    pitch = (num_cols + 7) // 8 * 8
    for step in range(begin, end, BLOCK_K):
        k = step + tl.arange(0, BLOCK_K)
        col = tl.load(cols + k, mask=k < num_cols, other=0)
        x_tile = tl.load(
            x + (row * x_stride)[:, None] + col[None, :], mask=live[:, None] & (k < num_cols)[None, :], other=0.0
        )
        d_tile = tl.load(
            d + r[:, None] * pitch + k[None, :], mask=(r < num_rows)[:, None] & (k < pitch)[None, :], other=0.0
        )
        acc = tl.dot(x_tile, tl.trans(d_tile), acc, input_precision="ieee")
    return acc


@triton.jit
def whole_dot(
    x, x_stride, row, live, d, r, num_rows, begin, K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """``x D^T`` over the columns from ``begin``, one chunk of them: [rows, r]."""
    acc = tl.zeros((row.shape[0], r.shape[0]), dtype=tl.float32)
    for step in range(0, CHUNK, BLOCK_K):
        k = begin + step + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x + row[:, None] * x_stride + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
        d_tile = tl.load(d + r[:, None] * K + k[None, :], mask=(r < num_rows)[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(x_tile, tl.trans(d_tile), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=VARYING)
def shrink_blocks(
    x, x_stride, h, split_stride, plane_stride, row_capacity,
    tile_item, tile_first, rows, item_rows, item_parts, item_plane, part_slot, part_scale, pointers, sizes, num_slots,
    linear0, linear1, linear2, depth,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, TILE_ROWS: tl.constexpr, RANK_TILE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, splits, members). ``D take_I x`` of blocks with listed rows into h, as ``lora_kernels`` has it."""
    tile = tl.program_id(0)
    item = tl.load(tile_item + tile)
    if item >= 0:
        split = tl.program_id(1)
        member = tl.program_id(2)
        linear = pick(member, linear0, linear1, linear2)
        start = tl.load(item_rows + item)
        item_size = tl.load(item_rows + item + 1) - start
        position = tl.load(tile_first + tile) - start + tl.arange(0, TILE_ROWS)
        live = position < item_size
        row = tl.load(rows + start + position, mask=live, other=0).to(tl.int64)
        part_begin = tl.load(item_parts + item)
        for part in range(part_begin, tl.load(item_parts + item + 1)):
            slot = tl.load(part_slot + part)
            cols, d, _, num_cols, num_rows = block_of(x, pointers, sizes, linear, slot, num_slots)
            plane = tl.load(item_plane + item) + (part - part_begin) * item_size + position
            out = h + split * split_stride + plane.to(tl.int64) * plane_stride + member * row_capacity
            if num_cols > 0:
                end = tl.minimum(num_cols, (split + 1) * CHUNK)
                for begin in range(0, num_rows, RANK_TILE):
                    r = begin + tl.arange(0, RANK_TILE)
                    acc = listed_dot(
                        x, x_stride, row, live, cols, num_cols, d, r, num_rows, split * CHUNK, end, BLOCK_K
                    )  # fmt: skip
                    tl.store(out[:, None] + r[None, :], acc, mask=live[:, None])
            else:
                for begin in range(0, num_rows, RANK_TILE):
                    r = begin + tl.arange(0, RANK_TILE)
                    acc = whole_dot(x, x_stride, row, live, d, r, num_rows, split * CHUNK, K, CHUNK, BLOCK_K)
                    tl.store(out[:, None] + r[None, :], acc, mask=live[:, None])


@triton.jit
def take_columns(
    x, x_stride, row, live, cols, num_cols, d, n, width, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """``x[cols] D^T`` for columns n of the output, D transposed being [cols, width]: [rows, n]."""
    acc = tl.zeros((row.shape[0], BLOCK_N), dtype=tl.float32)
    for begin in range(0, num_cols, BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        col = tl.load(cols + c, mask=c < num_cols, other=0)
        x_tile = tl.load(
            x + (row * x_stride)[:, None] + col[None, :], mask=live[:, None] & (c < num_cols)[None, :], other=0.0
        )
        acc = tl.dot(x_tile, load_b(d, begin, num_cols, width, n, BLOCK_C), acc, input_precision="ieee")
    return acc


@triton.jit
def put_rows(source, split_stride, at, mask, SPLITS: tl.constexpr):
    """Shrunk entries at places ``at`` of each row, planes added in order: [rows, n]."""
    total = tl.load(source[:, None] + at[None, :], mask=mask, other=0.0)
    for split in tl.range(1, SPLITS, loop_unroll_factor=4):
        total += tl.load(source[:, None] + split * split_stride + at[None, :], mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=VARYING)
def expand_blocks(
    y, y_stride, x, x_stride, h, split_stride, plane_stride, row_capacity,
    tile_item, tile_first, rows, item_rows, item_parts, item_plane, part_slot, part_scale, pointers, sizes, num_slots,
    linear0, linear1, linear2, depth,
    SPLITS: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    COLUMN0: tl.constexpr, COLUMN1: tl.constexpr, COLUMN2: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, output tiles of all members). Outputs that no part's block has are not touched."""
    tile = tl.program_id(0)
    item = tl.load(tile_item + tile)
    if item >= 0:
        member, tile_n = place(tl.program_id(1), WIDTH0, WIDTH1, WIDTH2, BLOCK_N)
        linear = pick(member, linear0, linear1, linear2)
        width = pick(member, WIDTH0, WIDTH1, WIDTH2)
        column = pick(member, COLUMN0, COLUMN1, COLUMN2)
        start = tl.load(item_rows + item)
        item_size = tl.load(item_rows + item + 1) - start
        position = tl.load(tile_first + tile) - start + tl.arange(0, TILE_ROWS)
        live = position < item_size
        row = tl.load(rows + start + position, mask=live, other=0).to(tl.int64)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((TILE_ROWS, BLOCK_N), dtype=tl.float32)
        touched = n < 0
        part_begin = tl.load(item_parts + item)
        for part in range(part_begin, tl.load(item_parts + item + 1)):
            slot = tl.load(part_slot + part)
            cols, d, inverse, num_cols, num_rows = block_of(x, pointers, sizes, linear, slot, num_slots)
            scale = scale_of(part_scale, part, depth)
            if num_rows > 0:
                at = tl.load(inverse + n, mask=n < width, other=-1)
                plane = tl.load(item_plane + item) + (part - part_begin) * item_size + position
                source = h + plane.to(tl.int64) * plane_stride + member * row_capacity
                acc += put_rows(source, split_stride, at, live[:, None] & (at >= 0)[None, :], SPLITS) * scale
                touched = touched | (at >= 0)
            elif num_cols > 0:
                acc += take_columns(x, x_stride, row, live, cols, num_cols, d, n, width, BLOCK_N, BLOCK_C) * scale
                touched = touched | (n < width)
        if tl.max(touched.to(tl.int32), 0) > 0:
            out = y + row[:, None] * y_stride + (column + n)[None, :]
            # Whole lines of this tile, which no other program writes: a mask with holes would break up the accesses.
            mask = live[:, None] & (n < width)[None, :]
            before = tl.load(out, mask=mask, other=0.0)
            after = (before.to(tl.float32) + acc).to(y.dtype.element_ty)
            tl.store(out, tl.where(touched[None, :], after, before), mask=mask)
