"""Dense differences: rows of an item times a whole matrix of one adapter, full or packed to one bit a weight, or times
what a mask takes out of the base's own.

Such a matrix has as many bytes as the base's own, so it is read the way a product reads weights: in tiles, ahead of
their use, by matrix products whose rows are those of one item; a row's sums are one chain over the inputs. Full: [N, K]
in x's dtype. Packed: a bit a weight, 32 to a word, set where the sign is +, and a scale for each output. Mask: bits
alike, set where the base's weight, which is read again, is taken out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.triton_ops.lora_kernels import pick, scale_of, tile_of
from deltaserve_kernels.triton_ops.lora_programs import VARYING, place


@triton.jit
def load_x(x_rows, live, k, K: tl.constexpr):
    return tl.load(x_rows[:, None] + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def full_dot(x_rows, live, d, n, width, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows of x times rows n of a full matrix: [rows, n]."""
    acc = tl.zeros((x_rows.shape[0], n.shape[0]), dtype=tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        x_tile = load_x(x_rows, live, k, K)
        d_tile = tl.load(d + n[:, None] * K + k[None, :], mask=(n < width)[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(x_tile, tl.trans(d_tile), acc, input_precision="ieee")
    return acc


@triton.jit
def sign_dot(x_rows, live, signs, n, width, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows of x times rows n of a matrix of signs: [rows, n]. What fills up the last word meets no x."""
    WORDS: tl.constexpr = (K + 31) // 32
    acc = tl.zeros((x_rows.shape[0], n.shape[0]), dtype=tl.float32)
    for begin in range(0, K, BLOCK_K):
        x_tile = load_x(x_rows, live, begin + tl.arange(0, BLOCK_K), K)
        w = begin // 32 + tl.arange(0, BLOCK_K // 32)
        words = tl.load(
            signs + n[:, None] * WORDS + w[None, :], mask=(n < width)[:, None] & (w < WORDS)[None, :], other=0
        )  # fmt: skip
        bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        tile = tl.reshape(tl.where(bits != 0, 1.0, -1.0).to(x_tile.dtype), (n.shape[0], BLOCK_K))
        acc = tl.dot(x_tile, tl.trans(tile), acc, input_precision="ieee")
    return acc


@triton.jit
def mask_dot(x_rows, live, weight, marks, n, width, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows of x times rows n of the weights that are marked: [rows, n]. A word's bits past K meet no weight."""
    WORDS: tl.constexpr = (K + 31) // 32
    acc = tl.zeros((x_rows.shape[0], n.shape[0]), dtype=tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        x_tile = load_x(x_rows, live, k, K)
        w_tile = tl.load(weight + n[:, None] * K + k[None, :], mask=(n < width)[:, None] & (k < K)[None, :], other=0.0)
        w = begin // 32 + tl.arange(0, BLOCK_K // 32)
        words = tl.load(
            marks + n[:, None] * WORDS + w[None, :], mask=(n < width)[:, None] & (w < WORDS)[None, :], other=0
        )  # fmt: skip
        bits = tl.reshape((words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1, (n.shape[0], BLOCK_K))
        tile = tl.where(bits != 0, w_tile, 0.0).to(x_tile.dtype)
        acc = tl.dot(x_tile, tl.trans(tile), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=VARYING)
def dense(
    y, y_stride, x, x_stride, rows, records, part_slot, part_scale, pointers, num_slots, weight,
    linear0, linear1, linear2, depth,
    K: tl.constexpr, BLOCK_K: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    COLUMN0: tl.constexpr, COLUMN1: tl.constexpr, COLUMN2: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, output tiles of all members): programs that read the same piece of a matrix run side by side.

    ``pointers`` int64 [linear][2][slot]: a matrix and 0, signs and their scale, or a mask and 1. ``weight``: the
    group's own [y's columns, K], read by masks alone. A part at scale 0 adds nothing.
    """
    num_rows, first, part_begin, part_end, _slot, _plane, _distance = tile_of(records, tl.program_id(0))
    if num_rows > 0:
        member, tile_n = place(tl.program_id(1), WIDTH0, WIDTH1, WIDTH2, BLOCK_N)
        linear = pick(member, linear0, linear1, linear2)
        width = pick(member, WIDTH0, WIDTH1, WIDTH2)
        position = tl.arange(0, TILE_ROWS)
        live = position < num_rows
        row = tl.load(rows + first + position, mask=live, other=0).to(tl.int64)
        x_rows = x + row * x_stride
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros((TILE_ROWS, BLOCK_N), dtype=tl.float32)
        count = 0
        for part in range(part_begin, part_end):
            slot = tl.load(part_slot + part)
            scale = scale_of(part_scale, part, depth)
            matrix = tl.load(pointers + linear * 2 * num_slots + slot)
            of_rows = tl.load(pointers + (linear * 2 + 1) * num_slots + slot)
            if (matrix != 0) & (scale != 0.0):
                count += 1
                if of_rows == 0:
                    d = tl.multiple_of(matrix.to(tl.pointer_type(x.dtype.element_ty)), 16)
                    total += full_dot(x_rows, live, d, n, width, K, BLOCK_K) * scale
                elif of_rows == 1:
                    marks = tl.multiple_of(matrix.to(tl.pointer_type(tl.int32)), 16)
                    first_row = weight + pick(member, COLUMN0, COLUMN1, COLUMN2).to(tl.int64) * K
                    total -= mask_dot(x_rows, live, first_row, marks, n, width, K, BLOCK_K // 2) * scale
                else:
                    signs = tl.multiple_of(matrix.to(tl.pointer_type(tl.int32)), 16)
                    scales = tl.multiple_of(of_rows.to(tl.pointer_type(tl.float32)), 16)
                    sums = sign_dot(x_rows, live, signs, n, width, K, BLOCK_K)
                    total += sums * (tl.load(scales + n, mask=n < width, other=0.0) * scale)[None, :]
        if count > 0:
            out = y + row[:, None] * y_stride + (pick(member, COLUMN0, COLUMN1, COLUMN2) + n)[None, :]
            mask = live[:, None] & (n < width)[None, :]
            before = tl.load(out, mask=mask, other=0.0).to(tl.float32)
            tl.store(out, (before + total).to(y.dtype.element_ty), mask=mask)
