"""RMS norm and gated activation of rows, one reading of each operand; numbers are fp32 and rounded once."""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve_kernels.triton_ops.early import wait_then_allow


@triton.jit(do_not_specialize=["eps", "offset"])
def rms_norm_rows(out, x, x_stride, weight, eps, offset, SIZE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Grid (T)."""
    wait_then_allow(EARLY)
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    mask = n < SIZE
    values = tl.load(x + row * x_stride + n, mask=mask, other=0.0).to(tl.float32)
    # Asked for before the sum is waited for.
    gain = tl.load(weight + n, mask=mask, other=0.0).to(tl.float32) + offset
    inverse = tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps)
    tl.store(out + row * SIZE + n, (values * inverse * gain).to(out.dtype.element_ty), mask=mask)


@triton.jit
def gated_rows(
    out, both, both_stride, SIZE: tl.constexpr, IS_GELU: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """Grid (T, blocks of columns): one row alone is spread over many programs."""
    wait_then_allow(EARLY)
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < SIZE
    source = both + row * both_stride + n
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + SIZE, mask=mask, other=0.0).to(tl.float32)
    if IS_GELU:  # 0.5 * (1 + tanh(z)) = 1 / (1 + exp(-2 z))
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    else:
        inner = gate
    acted = gate / (1.0 + tl.exp(-inner))
    tl.store(out + row * SIZE + n, (acted * up).to(out.dtype.element_ty), mask=mask)
