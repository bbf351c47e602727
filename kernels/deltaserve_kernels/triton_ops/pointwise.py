"""Launches of what lies between the products of a layer; one each. Definitions: ``deltaserve_kernels.pointwise``."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from deltaserve_kernels import pointwise
from deltaserve_kernels.triton_ops import guard, pointwise_kernels, rotary
from deltaserve_kernels.triton_ops.early import early

# Columns of a gated row that one program computes: 8 numbers of 16 bits, one load, a thread.
GATED_BLOCK = 1024


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (offset + weight)`` by row; see ``pointwise.rms_norm``. Raises a KernelError."""
    pointwise.check_norm(x, weight)
    num_rows, size = x.shape
    out = torch.empty(num_rows, size, dtype=x.dtype, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(size)
        pointwise_kernels.rms_norm_rows[(num_rows,)](
            out,
            x,
            x.stride(0),
            weight,
            eps,
            offset,
            SIZE=size,
            BLOCK=block,
            num_warps=norm_warps(block),
            **early(x.device),
        )
    return out


def norm_warps(block: int) -> int:
    """Warps of a program with one row of ``block`` numbers: two loads of 8 a thread, as long as there are warps."""
    return min(max(block // 512, 1), 16)


def gated_product(both: Tensor, activation: str) -> Tensor:
    """``act(gate) * up`` of ``both`` [T, gate | up]; see ``pointwise.gated_product``. Raises a KernelError."""
    pointwise.check_gated(both, activation)
    num_rows, size = both.shape[0], both.shape[1] // 2
    out = torch.empty(num_rows, size, dtype=both.dtype, device=both.device)
    if num_rows and size:
        pointwise_kernels.gated_rows[(num_rows, triton.cdiv(size, GATED_BLOCK))](
            out,
            both,
            both.stride(0),
            SIZE=size,
            IS_GELU=activation == "gelu_tanh",
            BLOCK=GATED_BLOCK,
            num_warps=4,
            **early(both.device),
        )
    return out


def rotate_and_store(qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, kv_index: Tensor) -> None:
    """Rotate q in place, store rotated k, and v; see ``pointwise.rotate_and_store``. Raises a KernelError."""
    q, k, v = pointwise.split_heads(qkv, k_cache)
    pointwise.check_rotation(q, cos, sin)
    guard.check_write(k, v, k_cache, v_cache, kv_index)
    half = cos.shape[1] // 2
    rotary.launch(q, k, v, cos, sin, k_cache, v_cache, kv_index, half=half, second=half)
