"""RMS norm, gated activation and rotary with the KV write, against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from deltaserve_kernels import cpu
from deltatest.kernel_cases import randn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {
    torch.float32: {"rtol": 1e-6, "atol": 1e-5},  # 1 + tanh cancels where GELU falls to zero
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-4},
    torch.float16: {"rtol": 2**-11, "atol": 1e-4},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 16, 77, 576])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(size, offset, dtype, cpu_backend):
    weight = randn(size, dtype=dtype, seed=1)
    for num_rows in (0, 1, 63):
        x = 3 * randn(num_rows, size, dtype=dtype)
        wide = x.double()
        expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * (offset + weight.double())
        torch.testing.assert_close(cpu.rms_norm(x, weight, 1e-5, offset).double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 16, 33, 200])
@pytest.mark.parametrize("activation", cpu.ACTIVATIONS)
def test_gated_product(size, activation, dtype, cpu_backend):
    act = F.silu if activation == "silu" else (lambda x: F.gelu(x, approximate="tanh"))
    for num_rows in (0, 1, 63):
        both = 4 * randn(num_rows, 2 * size, dtype=dtype)
        expected = act(both[:, :size].double()) * both[:, size:].double()
        torch.testing.assert_close(cpu.gated_product(both, activation).double(), expected, **TOLERANCE[dtype])


def test_activations_end_where_they_should(cpu_backend):
    both = torch.tensor([[-200.0, -80.0, 80.0, 200.0, float("nan"), 1.0, 1.0, 1.0, 1.0, 1.0]])
    for activation in cpu.ACTIVATIONS:
        found = cpu.gated_product(both, activation)[0]
        torch.testing.assert_close(found[:4], torch.tensor([0.0, 0.0, 80.0, 200.0]), **TOLERANCE[torch.float32])
        assert found[4].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "rotary"), [(8, 8), (64, 64), (40, 40), (64, 32), (24, 6)])
def test_rotary_and_kv_write(size, rotary, dtype, cpu_backend):
    heads, kv_heads, num_rows, num_blocks = 6, 2, 21, 4
    qkv = randn(num_rows, (heads + 2 * kv_heads) * size, dtype=dtype)
    cos, sin = randn(num_rows, rotary, dtype=dtype, seed=1), randn(num_rows, rotary, dtype=dtype, seed=2)
    pool = torch.full((num_blocks, 2, kv_heads, 16, size), float("nan"), dtype=dtype)
    index = torch.randperm(num_blocks * 16)[:num_rows]
    rotated = qkv.clone()
    cpu.rotate_and_store(rotated, cos, sin, pool[:, 0], pool[:, 1], index)

    def turned(x):
        low, high = x[..., : rotary // 2], x[..., rotary // 2 : rotary]
        both = x[..., :rotary] * cos.double()[:, None] + torch.cat([-high, low], -1) * sin.double()[:, None]
        return torch.cat([both, x[..., rotary:]], -1)

    q, k, v = qkv.double().view(num_rows, -1, size).split([heads, kv_heads, kv_heads], dim=1)
    found = rotated.view(num_rows, -1, size)
    torch.testing.assert_close(found[:, :heads].double(), turned(q), **TOLERANCE[dtype])
    assert torch.equal(found[:, heads:], qkv.view(num_rows, -1, size)[:, heads:])
    stored = pool[index // 16, :, :, index % 16]
    torch.testing.assert_close(stored[:, 0].double(), turned(k), **TOLERANCE[dtype])
    assert torch.equal(stored[:, 1].double(), v)
    assert int(pool.isnan().sum()) == pool.numel() - num_rows * 2 * kv_heads * size


def test_bad_arguments_are_named(cpu_backend):
    x, cache = randn(3, 40), torch.zeros(2, 1, 16, 8)
    cos, index = randn(3, 8), torch.arange(3)
    for wrong, words in (
        (lambda: cpu.rms_norm(x, randn(39), 1e-5), "40 are needed"),
        (lambda: cpu.rms_norm(x, randn(40).half(), 1e-5), "weight must be"),
        (lambda: cpu.gated_product(x[:, :39], "silu"), "as many each"),
        (lambda: cpu.rotate_and_store(x[:, :36], cos, cos, cache, cache, index), "KV heads are needed"),
        (lambda: cpu.rotate_and_store(x, cos[:, :7], cos[:, :7], cache, cache, index), "even"),
        (lambda: cpu.rotate_and_store(x, cos, cos.half(), cache, cache, index), "sin is"),
        (lambda: cpu.rotate_and_store(x, cos, cos, cache, cache, index + 30), "is not in 0..31"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
