"""Root-mean-square norm with gains by row."""

from __future__ import annotations

import triton
import triton.language as tl

VARYING = [
    "eps", "row_item", "item_parts", "part_slot", "part_scale", "pointers", "num_slots", "norm", "depth",
]  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def rms_norm(
    out, x, x_stride, weight, eps, row_item, item_parts, part_slot, part_scale, pointers, num_slots, norm, depth,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (T). A row of the base alone meets the arithmetic of the plain norm and nothing else."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    mask = n < SIZE
    values = tl.load(x + row * x_stride + n, mask=mask, other=0.0).to(tl.float32)
    gain = tl.load(weight + n, mask=mask, other=0.0).to(tl.float32)
    item = tl.load(row_item + row)
    if item >= 0:
        for part in range(tl.load(item_parts + item), tl.load(item_parts + item + 1)):
            address = tl.load(pointers + norm * num_slots + tl.load(part_slot + part))
            if address != 0:
                at_first = tl.load(part_scale + 2 * part)
                scale = at_first + (tl.load(part_scale + 2 * part + 1) - at_first) * depth
                delta = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
                gain += scale * tl.load(delta + n, mask=mask, other=0.0)
    inverse = tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps)
    tl.store(out + row * SIZE + n, (values * inverse * gain).to(out.dtype.element_ty), mask=mask)
