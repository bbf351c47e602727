"""Row and column blocks for few rows an adapter (decode): rows one after another, plain multiply-adds, one launch.

A program has a window of outputs of one member. Listed rows of a block rise, so those inside the window lie together
in D: each is a dot product over all of its inputs, and its sum goes to its place inside the window. Where columns are
listed alone, D transposed is read as B is by the low-rank kernels. No sum leaves a program, so there are no planes, and
parts that share outputs meet in registers before y is written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.triton_ops.block_kernels import VARYING, block_of
from deltaserve_kernels.triton_ops.early import wait_then_allow
from deltaserve_kernels.triton_ops.lora_kernels import load_b, pick, scale_of, tile_of
from deltaserve_kernels.triton_ops.lora_programs import place


@triton.jit
def whole_sums(x_row, d, r, end, K: tl.constexpr, CHUNK: tl.constexpr):
    """Rows r of D (those before ``end``) times a whole row of x: [r]."""
    acc = tl.zeros((r.shape[0], CHUNK), dtype=tl.float32)
    for begin in range(0, K, CHUNK):
        k = begin + tl.arange(0, CHUNK)
        x_at = tl.load(x_row + k, mask=k < K, other=0.0)
        d_tile = tl.load(d + r[:, None] * K + k[None, :], mask=(r < end)[:, None] & (k < K)[None, :], other=0.0)
        acc += d_tile.to(tl.float32) * x_at.to(tl.float32)[None, :]
    return tl.sum(acc, 1)


@triton.jit
def listed_sums(x_row, cols, num_cols, d, r, end, CHUNK: tl.constexpr):
    """Rows r of D (those before ``end``) times the listed columns of a row of x: [r]."""
    acc = tl.zeros((r.shape[0], CHUNK), dtype=tl.float32)
    pitch = (num_cols + 7) // 8 * 8
    for begin in range(0, num_cols, CHUNK):
        k = begin + tl.arange(0, CHUNK)
        col = tl.load(cols + k, mask=k < num_cols, other=0)
        x_at = tl.load(x_row + col, mask=k < num_cols, other=0.0)
        d_tile = tl.load(d + r[:, None] * pitch + k[None, :], mask=(r < end)[:, None] & (k < pitch)[None, :], other=0.0)
        acc += d_tile.to(tl.float32) * x_at.to(tl.float32)[None, :]
    return tl.sum(acc, 1)


@triton.jit
def column_sums(x_row, cols, num_cols, d, n, width, BLOCK_C: tl.constexpr):
    """The listed columns of a row of x times outputs n of D, which is transposed: [n]."""
    acc = tl.zeros((BLOCK_C, n.shape[0]), dtype=tl.float32)
    for begin in range(0, num_cols, BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        col = tl.load(cols + c, mask=c < num_cols, other=0)
        x_at = tl.load(x_row + col, mask=c < num_cols, other=0.0)
        acc += load_b(d, begin, num_cols, width, n, BLOCK_C).to(tl.float32) * x_at.to(tl.float32)[:, None]
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=VARYING)
def blocks_by_row(
    y, y_stride, x, x_stride, rows, records, part_slot, part_scale, pointers, sizes, num_slots,
    linear0, linear1, linear2, depth,
    K: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    COLUMN0: tl.constexpr, COLUMN1: tl.constexpr, COLUMN2: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, windows of all members). GROUP rows of D are taken at a time. Outputs that no part's block has are
    written as they were read; a window without any is not touched. EARLY: see ``early``."""
    wait_then_allow(EARLY)
    num_rows, first, part_begin, part_end, _slot, _plane, _distance = tile_of(records, tl.program_id(0))
    member, window = place(tl.program_id(1), WIDTH0, WIDTH1, WIDTH2, BLOCK_N)
    linear = pick(member, linear0, linear1, linear2)
    width = pick(member, WIDTH0, WIDTH1, WIDTH2)
    n = window * BLOCK_N + tl.arange(0, BLOCK_N)
    for i in range(num_rows):
        row = tl.load(rows + first + i).to(tl.int64)
        x_row = x + row * x_stride
        out = y + row * y_stride + pick(member, COLUMN0, COLUMN1, COLUMN2) + n
        before = tl.load(out, mask=n < width, other=0.0)
        acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
        touched = n < 0
        for part in range(part_begin, part_end):
            slot = tl.load(part_slot + part)
            scale = scale_of(part_scale, part, depth)
            cols, d, inverse, num_cols, num_listed = block_of(x, pointers, sizes, linear, slot, num_slots)
            if num_listed > 0:
                at = tl.load(inverse + n, mask=n < width, other=-1)
                begin = tl.min(tl.where(at >= 0, at, num_listed), 0)
                end = tl.max(at, 0) + 1
                sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
                for group in range(begin, end, GROUP):
                    r = group + tl.arange(0, GROUP)
                    if num_cols > 0:
                        of_rows = listed_sums(x_row, cols, num_cols, d, r, end, CHUNK)
                    else:
                        of_rows = whole_sums(x_row, d, r, end, K, CHUNK)
                    sums += tl.sum(tl.where(at[:, None] == r[None, :], of_rows[None, :], 0.0), 1)
                acc += sums * scale
                touched = touched | (at >= 0)
            elif num_cols > 0:
                acc += column_sums(x_row, cols, num_cols, d, n, width, BLOCK_C) * scale
                touched = touched | (n < width)
        if tl.max(touched.to(tl.int32), 0) > 0:
            after = (before.to(tl.float32) + acc).to(y.dtype.element_ty)
            tl.store(out, tl.where(touched, after, before), mask=n < width)
