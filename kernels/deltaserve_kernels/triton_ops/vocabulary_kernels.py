"""Terms of embedding and head row by row, from pointer tables: low rank and trained rows of the one, trained rows of
the other (a low-rank head is ``lora_linear``).

Trained rows: ``pointers`` int64 [matrix][ids, values][slot] and ``counts`` int32 [matrix][slot]; ids int32, ascending,
values [count, width]. fp32 sums in binding order; a part at scale 0 adds nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.triton_ops.early import wait_then_allow
from deltaserve_kernels.triton_ops.lora_kernels import matrix, vector

VARYING = [
    "ids", "rows", "row_item", "item_parts", "part_slot", "part_scale", "low_rank", "ranks", "pointers", "counts",
    "num_slots",
]  # fmt: skip


@triton.jit
def place_of_token(known, count, token):
    """Where ``token`` stands among ``count`` ascending ids, or ``count``."""
    low = 0
    high = count
    while low < high:
        middle = (low + high) // 2
        if tl.load(known + middle) < token:
            low = middle + 1
        else:
            high = middle
    at = tl.load(known + low, mask=low < count, other=-1)
    return tl.where(at == token, low, count)


@triton.jit(do_not_specialize=VARYING)
def embedding_rows(
    out, touched, weight, ids, rows, row_item, item_parts, part_slot, part_scale, low_rank, ranks, pointers, counts,
    num_slots, VOCAB: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (R listed rows, blocks of the width). ``out`` [R, WIDTH]: the row of the matrix that a row's token has, with
    the terms of matrix 0; ``touched`` int32 [R]: whether there were any."""
    wait_then_allow(EARLY)
    position = tl.program_id(0)
    row = tl.load(rows + position).to(tl.int64)
    token = tl.load(ids + row)
    item = tl.load(row_item + row)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < WIDTH
    has_row = token < VOCAB
    stored = tl.load(weight + token * WIDTH + n, mask=mask & has_row, other=0.0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    hits = 0
    if item >= 0:
        for part in range(tl.load(item_parts + item), tl.load(item_parts + item + 1)):
            slot = tl.load(part_slot + part)
            scale = tl.load(part_scale + 2 * part)
            if scale != 0.0:
                rank = tl.load(ranks + slot)
                hits += rank
                a = matrix(weight, low_rank, 0, 0, slot, num_slots)
                b = matrix(weight, low_rank, 1, 0, slot, num_slots)
                for r in range(0, rank):
                    factor = tl.load(a + r * VOCAB + token, mask=has_row, other=0.0).to(tl.float32) * scale
                    total += factor * tl.load(b + r * WIDTH + n, mask=mask, other=0.0).to(tl.float32)
                count = tl.load(counts + slot)
                known = vector(pointers, 0, 0, slot, num_slots).to(tl.pointer_type(tl.int32))
                place = place_of_token(known, count, token)
                if place < count:
                    hits += 1
                    values = vector(pointers, 1, 0, slot, num_slots).to(tl.pointer_type(weight.dtype.element_ty))
                    values = tl.multiple_of(values, 16)
                    trained = tl.load(values + place * WIDTH + n, mask=mask, other=0.0)
                    total += trained.to(tl.float32) * scale
    result = (stored.to(tl.float32) + total).to(out.dtype.element_ty)
    tl.store(out + position.to(tl.int64) * WIDTH + n, result, mask=mask)
    if tl.program_id(1) == 0:
        tl.store(touched + position, hits)


@triton.jit(do_not_specialize=["rows"])
def put_rows(y, y_stride, values, rows, touched, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Grid (R, blocks of the width): listed rows of y become those of ``values`` [R, WIDTH] that were touched."""
    wait_then_allow(EARLY)
    position = tl.program_id(0)
    if tl.load(touched + position) != 0:
        row = tl.load(rows + position).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        found = tl.load(values + position.to(tl.int64) * WIDTH + n, mask=n < WIDTH, other=0.0)
        tl.store(y + row * y_stride + n, found.to(y.dtype.element_ty), mask=n < WIDTH)


# Tokens that adapters add make rows of logits longer, by any number.
@triton.jit(do_not_specialize=[*VARYING, "y_stride"])
def head_rows(
    y, y_stride, x, x_stride, rows, row_item, item_parts, part_slot, part_scale, pointers, counts, num_slots,
    PROGRAMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (R listed rows, PROGRAMS): ``y[row, token] += scale * (values . x[row])`` of matrix 1, rounded part by part.

    With one part a program takes every PROGRAMS-th trained row. With several, tokens belong to programs, so that one
    that several parts change is summed by one program, in their order.
    """
    wait_then_allow(EARLY)
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    item = tl.load(row_item + row)
    if item >= 0:
        begin = tl.load(item_parts + item)
        end = tl.load(item_parts + item + 1)
        is_one = end - begin == 1
        first = tl.where(is_one, tl.program_id(1), 0)
        step = tl.where(is_one, PROGRAMS, 1)
        k = tl.arange(0, BLOCK)
        mask = k < WIDTH
        own = tl.load(x + row * x_stride + k, mask=mask, other=0.0).to(tl.float32)
        for part in range(begin, end):
            slot = tl.load(part_slot + part)
            scale = tl.load(part_scale + 2 * part + 1)
            if scale != 0.0:
                known = vector(pointers, 0, 1, slot, num_slots).to(tl.pointer_type(tl.int32))
                values = vector(pointers, 1, 1, slot, num_slots).to(tl.pointer_type(x.dtype.element_ty))
                values = tl.multiple_of(values, 16)
                for place in range(first, tl.load(counts + num_slots + slot), step):
                    token = tl.load(known + place)
                    if is_one | (token % PROGRAMS == tl.program_id(1)):
                        trained = tl.load(values + place * WIDTH + k, mask=mask, other=0.0)
                        at = y + row * y_stride + token
                        dot = tl.sum(trained.to(tl.float32) * own, 0)
                        tl.store(at, (tl.load(at).to(tl.float32) + scale * dot).to(y.dtype.element_ty))
            # The next part may read what this one wrote, by other threads.
            tl.debug_barrier()


@triton.jit(do_not_specialize=[*VARYING, "y_stride", "sizes", "vocab_size", "width"])
def hide_added_rows(
    y, y_stride, row_item, item_parts, part_slot, part_scale, sizes, vocab_size, width,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (rows of y, blocks of the columns past ``vocab_size``): minus infinity past the row's own tokens."""
    wait_then_allow(EARLY)
    row = tl.program_id(0)
    item = tl.load(row_item + row)
    own = vocab_size
    if item >= 0:
        for part in range(tl.load(item_parts + item), tl.load(item_parts + item + 1)):
            size = tl.load(sizes + tl.load(part_slot + part))
            own = tl.where(tl.load(part_scale + 2 * part + 1) != 0.0, tl.maximum(own, size), own)
    n = vocab_size + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    hidden = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    tl.store(y + row.to(tl.int64) * y_stride + n, hidden.to(y.dtype.element_ty), mask=(n < width) & (n >= own))
