"""Norm, gated activation and rotary with the KV write, in Triton's interpreter; see test_interpreter.py."""

from __future__ import annotations

import pytest
import torch

from deltaserve_kernels import KernelError, pointwise
from deltaserve_kernels.triton_ops import pointwise as by_triton
from deltatest.kernel_cases import randn

DTYPES = (torch.float32, torch.float16)
IMPLEMENTATIONS = {"definition": pointwise, "triton": by_triton}


def near(out, expected, dtype) -> None:
    """``expected`` float64. One rounding; fp32 sums in any order."""
    tolerance = {"rtol": 2**-11, "atol": 1e-6} if dtype == torch.float16 else {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(out.double(), expected, **tolerance)


def in_a_sea(rows: torch.Tensor) -> torch.Tensor:
    """The same rows as a view, NaN all around them."""
    sea = torch.full((rows.shape[0] + 2, rows.shape[1] + 9), float("nan"), dtype=rows.dtype)
    view = sea[1:-1, 5 : rows.shape[1] + 5]
    view.copy_(rows)
    return view


def test_operators_are_those_of_the_backend():
    assert pointwise.operators("cpu", "triton") is by_triton
    assert pointwise.operators("cpu", "reference") is None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("num_rows", "size"), [(0, 8), (1, 1), (1, 4096), (63, 40), (5, 1300)])
def test_norm(num_rows, size, offset, dtype, implementation):
    x, weight = in_a_sea(randn(num_rows, size, dtype=dtype, scale=3.0)), randn(size, dtype=dtype, seed=1)
    out = implementation.rms_norm(x, weight, 1e-3, offset)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * (weight.double() + offset)
    assert (out.dtype, out.is_contiguous()) == (dtype, True)
    near(out, expected, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", pointwise.ACTIVATIONS)
@pytest.mark.parametrize(("num_rows", "size"), [(0, 8), (1, 1), (1, 2500), (63, 40), (3, 1024)])
def test_gated(num_rows, size, activation, dtype, implementation):
    both = in_a_sea(randn(num_rows, 2 * size, dtype=dtype, scale=4.0))
    out = implementation.gated_product(both, activation)
    gate, up = both.double().chunk(2, dim=-1)
    silu = gate * torch.sigmoid(gate)
    acted = silu if activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
    assert (out.dtype, out.is_contiguous()) == (dtype, True)
    near(out, acted * up, dtype)


def test_activations_of_large_numbers_are_finite():
    both = torch.tensor([[-3e4, -200.0, -89.0, 89.0, 200.0, 3e4, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    for activation in pointwise.ACTIVATIONS:
        out = by_triton.gated_product(both, activation)
        near(out, torch.tensor([[0.0, 0.0, 0.0, 89.0, 200.0, 3e4]]).double(), torch.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "heads", "kv_heads", "head_dim", "rotary"),
    [(0, 2, 1, 8, 8), (1, 9, 3, 64, 64), (63, 2, 2, 20, 20), (5, 10, 1, 16, 10), (3, 3, 9, 24, 16), (2, 1, 1, 2, 2)],
)
def test_rotation(num_rows, heads, kv_heads, head_dim, rotary, dtype, implementation):
    """Angles of the two halves differ; nothing but q and the rows' own places in the cache is written."""
    half = rotary // 2
    qkv = in_a_sea(randn(num_rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype))
    cos, sin = (in_a_sea(randn(num_rows, rotary, seed=seed)) for seed in (2, 3))
    pool = torch.full((6, 2, 2, kv_heads, 16, head_dim), float("nan"), dtype=dtype)
    index = torch.randperm(6 * 16, generator=torch.Generator().manual_seed(5))[:num_rows]
    wide = qkv.double().unflatten(1, (-1, head_dim))
    turned, c, s = wide.clone(), cos.double()[:, None], sin.double()[:, None]
    turned[..., :half] = wide[..., :half] * c[..., :half] - wide[..., half:rotary] * s[..., :half]
    turned[..., half:rotary] = wide[..., half:rotary] * c[..., half:] + wide[..., :half] * s[..., half:]
    expected_pool = pool.double()
    expected_pool[index // 16, 0, 1, :, index % 16] = turned[:, heads : heads + kv_heads]
    expected_pool[index // 16, 1, 0, :, index % 16] = wide[:, heads + kv_heads :]
    expected = torch.cat([turned[:, :heads], wide[:, heads:]], dim=1).flatten(1)
    implementation.rotate_and_store(qkv, cos, sin, pool[:, 0, 1], pool[:, 1, 0], index)
    near(qkv, expected, dtype)
    tolerance = {"rtol": 2**-11, "atol": 2e-6} if dtype == torch.float16 else {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(pool.double(), expected_pool, equal_nan=True, **tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_what_does_not_fit_is_refused(implementation):
    x, cache, index = randn(2, 8), torch.zeros(1, 1, 16, 4), torch.tensor([0, 1])
    angle = randn(2, 4)
    cases = [
        ("as wide as x", lambda: implementation.rms_norm(x, randn(7), 1e-5)),
        ("weight torch.float16", lambda: implementation.rms_norm(x, randn(8).half(), 1e-5)),
        ("rows must be contiguous", lambda: implementation.rms_norm(randn(2, 16)[:, ::2], randn(8), 1e-5)),
        ("as many each", lambda: implementation.gated_product(randn(2, 7), "silu")),
        ("unknown", lambda: implementation.gated_product(x, "relu")),
        ("heads of 4 and 1 KV heads", lambda: rotate(implementation, x, angle, cache, index)),
        ("rotates 6 of 4", lambda: rotate(implementation, randn(2, 12), randn(2, 6), cache, index)),
        ("rotates 3 of 4", lambda: rotate(implementation, randn(2, 12), randn(2, 3), cache, index)),
        ("must both be \\[2, R\\]", lambda: rotate(implementation, randn(2, 12), angle[:1], cache, index)),
        ("kv_index runs 0", lambda: rotate(implementation, randn(2, 12), angle, cache, index * 16)),
    ]
    for match, call in cases:
        with pytest.raises(KernelError, match=match):
            call()


def rotate(implementation, qkv, angle, cache, index) -> None:
    implementation.rotate_and_store(qkv, angle, angle, cache, cache.clone(), index)
