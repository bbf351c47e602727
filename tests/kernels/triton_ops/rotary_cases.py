"""Rotary embedding with the KV write, in Triton's interpreter and by definition; see test_interpreter.py."""

from __future__ import annotations

import pytest
import torch

from deltaserve_kernels import KernelError, rotate_and_write_kv
from deltatest.kernel_cases import randn

TOLERANCE = {
    torch.float32: {"rtol": 0.0, "atol": 2e-6},
    torch.float16: {"rtol": 2**-11, "atol": 1e-6},
}


def turned(x: torch.Tensor, angles: torch.Tensor, half: int) -> torch.Tensor:
    """float64, one pair of numbers at a time as a complex number."""
    out = x.double().clone()
    pairs = torch.complex(out[..., :half], out[..., half : 2 * half]) * torch.exp(1j * angles.double())[:, None]
    out[..., :half], out[..., half : 2 * half] = pairs.real, pairs.imag
    return out


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("num_rows", "heads", "kv_heads", "head_dim", "half"),
    [(0, 2, 1, 8, 4), (1, 9, 3, 64, 32), (63, 2, 2, 20, 10), (5, 10, 1, 16, 5), (3, 3, 9, 24, 8), (2, 1, 1, 2, 1)],
)
def test_pairs_turn_and_the_rest_passes(num_rows, heads, kv_heads, head_dim, half, dtype, backend):
    """Everything around the operands is NaN, and no cache position but the rows' own is written."""
    sea = torch.full((num_rows + 2, heads + 2 * kv_heads + 2, head_dim + 8), float("nan"), dtype=dtype)
    sea[1 : num_rows + 1, 1:-1, 4:-4] = randn(num_rows, heads + 2 * kv_heads, head_dim, dtype=dtype)
    q, k, v = sea[1 : num_rows + 1, 1:-1, 4:-4].split([heads, kv_heads, kv_heads], dim=1)
    angles = randn(num_rows, half, seed=3, scale=3.0)
    around = torch.full((2, num_rows + 1, half + 3), float("nan"))
    around[0, :num_rows, :half], around[1, :num_rows, :half] = angles.cos(), angles.sin()
    pool = torch.full((6, 2, 2, kv_heads, 16, head_dim), float("nan"), dtype=dtype)
    index = torch.randperm(6 * 16, generator=torch.Generator().manual_seed(5))[:num_rows]
    expected_sea, expected_pool = sea.double(), pool.double()
    expected_sea[1 : num_rows + 1, 1 : heads + 1, 4:-4] = turned(q, angles, half)
    expected_pool[index // 16, 0, 1, :, index % 16] = turned(k, angles, half)
    expected_pool[index // 16, 1, 0, :, index % 16] = v.double()
    cos, sin = around[0, :num_rows, :half], around[1, :num_rows, :half]
    rotate_and_write_kv(q, k, v, cos, sin, pool[:, 0, 1], pool[:, 1, 0], index, backend=backend)
    torch.testing.assert_close(sea.double(), expected_sea, equal_nan=True, **TOLERANCE[dtype])
    torch.testing.assert_close(pool.double(), expected_pool, equal_nan=True, **TOLERANCE[dtype])
    if head_dim > 2 * half:
        assert torch.equal(pool[index // 16, 0, 1, :, index % 16, 2 * half :], k[..., 2 * half :])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_what_does_not_fit_is_refused(backend):
    q, k, cache = randn(2, 4, 8), randn(2, 2, 8), torch.zeros(1, 2, 16, 8)
    angle, index = randn(2, 4), torch.tensor([0, 1])
    for cos, sin, match in ((angle[:1], angle[:1], "half of the"), (randn(2, 5), randn(2, 5), "rotates 10 of 8")):
        with pytest.raises(KernelError, match=match):
            rotate_and_write_kv(q, k, k, cos, sin, cache, cache.clone(), index, backend=backend)
    with pytest.raises(KernelError, match="last dimension"):
        rotate_and_write_kv(q, k, k, randn(2, 8)[:, ::2], angle, cache, cache.clone(), index, backend=backend)
    with pytest.raises(KernelError, match="kv_index runs 0"):
        rotate_and_write_kv(q, k, k, angle, angle, cache, cache.clone(), torch.tensor([0, 16]), backend=backend)
