"""What lies between the products of a layer, in plain PyTorch: RMS norm, gated activation, rotary with the KV write.

fp32, rounded once. ``operators`` tells whose twins of these functions a device has: the C++ library's, Triton's.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaserve_kernels.backend import select
from deltaserve_kernels.checks import check_write
from deltaserve_kernels.errors import DeviceMismatch, DtypeMismatch, NotContiguous, OutOfRange, ShapeMismatch
from deltaserve_kernels.reference import write_kv
from deltaserve_kernels.tables import FLOAT_DTYPES

ACTIVATIONS = ("silu", "gelu_tanh")


def operators(device: torch.device | str, backend: str | None = None) -> ModuleType | None:
    """The module with fast twins of the functions below for what ``select`` chooses, None where PyTorch runs.

    Raises BackendUnavailable as ``select``.
    """
    selected = select(device, backend)
    if selected == "triton":
        from deltaserve_kernels.triton_ops import pointwise

        return pointwise
    if selected == "cpu":
        from deltaserve_kernels import cpu

        return cpu
    return None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (offset + weight)`` by row: ``x`` [T, H], ``weight`` [H] -> contiguous [T, H].

    Rows contiguous, any row stride. Raises a KernelError.
    """
    check_norm(x, weight)
    rows = x.float()
    inverse = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    return (rows * inverse * (weight.float() + offset)).to(x.dtype)


def gated_product(both: Tensor, activation: str) -> Tensor:
    """``act(gate) * up`` of ``both`` [T, gate | up] -> contiguous [T, N]; activation "silu" or "gelu_tanh".

    Rows contiguous, any row stride. Raises a KernelError.
    """
    check_gated(both, activation)
    gate, up = both.float().chunk(2, dim=-1)
    acted = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return (acted * up).to(both.dtype)


def rotate_and_store(qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, kv_index: Tensor) -> None:
    """Rotary position embedding of halves, and the KV write: ``qkv`` [T, q heads | k heads | v heads].

    ``cos`` and ``sin`` [T, R] hold the angles of both halves, R the rotary size. q is rotated in place; k, rotated, and
    v go to ``kv_index`` of the caches [num_blocks, kv_heads, 16, D], as in ``write_kv``. Raises a KernelError.
    """
    q, k, v = split_heads(qkv, k_cache)
    check_rotation(q, cos, sin)
    check_write(k, v, k_cache, v_cache, kv_index)
    q.copy_(_rotated(q, cos, sin))
    write_kv(_rotated(k, cos, sin), v, k_cache, v_cache, kv_index)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[1]
    turning = x[..., :size].float()
    low, high = turning.chunk(2, dim=-1)
    turned = turning * cos.float()[:, None] + torch.cat([-high, low], dim=-1) * sin.float()[:, None]
    return torch.cat([turned.to(x.dtype), x[..., size:]], dim=-1)


# ---------------------------------------------------------------- checks, of shapes and dtypes: nothing waits


def check_norm(x: Tensor, weight: Tensor) -> None:
    """Raise a KernelError unless ``rms_norm`` arguments fit together."""
    _check_rows("x", x)
    if weight.shape != x.shape[1:] or not weight.is_contiguous():
        raise ShapeMismatch(f"weight {list(weight.shape)} must be contiguous [{x.shape[1]}], as wide as x")
    if weight.dtype != x.dtype:
        raise DtypeMismatch(f"x is {x.dtype} and weight {weight.dtype}; one float dtype is needed")
    if weight.device != x.device:
        raise DeviceMismatch(f"x is on {x.device}, weight on {weight.device}")


def check_gated(both: Tensor, activation: str) -> None:
    """Raise a KernelError unless ``gated_product`` arguments fit together."""
    _check_rows("both", both)
    if both.shape[1] % 2:
        raise ShapeMismatch(f"both has {both.shape[1]} columns; gate and up need as many each")
    if activation not in ACTIVATIONS:
        raise OutOfRange(f"activation {activation!r} is unknown; allowed: {', '.join(ACTIVATIONS)}")


def split_heads(qkv: Tensor, k_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, heads, D], k and v [T, kv_heads, D], views of ``qkv`` by the caches' shape. Raises a KernelError."""
    _check_rows("qkv", qkv)
    if k_cache.dim() != 4:
        raise ShapeMismatch(f"k_cache {list(k_cache.shape)} must be [num_blocks, kv_heads, 16, D]")
    kv_heads, size = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.shape[1] // size - 2 * kv_heads
    if heads < 1 or qkv.shape[1] != (heads + 2 * kv_heads) * size:
        raise ShapeMismatch(f"qkv has {qkv.shape[1]} columns; heads of {size} and {kv_heads} KV heads are needed")
    q, k, v = qkv.unflatten(1, (-1, size)).split([heads, kv_heads, kv_heads], dim=1)
    return q, k, v


def check_rotation(q: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise a KernelError unless the angles of ``rotate_and_store`` fit ``q`` [T, heads, D]."""
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[0] != q.shape[0]:
        raise ShapeMismatch(f"cos {list(cos.shape)} and sin {list(sin.shape)} must both be [{q.shape[0]}, R]")
    if cos.shape[1] % 2 or not 2 <= cos.shape[1] <= q.shape[2]:
        raise ShapeMismatch(f"cos {list(cos.shape)} rotates {cos.shape[1]} of {q.shape[2]}; an even number of them can")
    if cos.dtype not in FLOAT_DTYPES or sin.dtype != cos.dtype:
        raise DtypeMismatch(f"cos is {cos.dtype} and sin {sin.dtype}; one float dtype is needed")
    if not q.device == cos.device == sin.device:
        raise DeviceMismatch(f"qkv {q.device}, cos {cos.device} and sin {sin.device} must agree")
    if cos.stride(1) != 1 or sin.stride(1) != 1:
        raise NotContiguous(f"cos has strides {cos.stride()}, sin {sin.stride()}; rows must be contiguous")


def _check_rows(name: str, rows: Tensor) -> None:
    if rows.dim() != 2 or rows.dtype not in FLOAT_DTYPES:
        raise ShapeMismatch(f"{name} is {rows.dtype} {list(rows.shape)}; rows of fp32, bf16 or fp16 are needed")
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        raise NotContiguous(f"{name} has strides {rows.stride()}; rows must be contiguous")
