"""The rates that floors are made of, measured on this device in this run."""

from __future__ import annotations

import time

import torch

from deltabench.floors import Rates
from deltabench.timing import Call, GraphClock, timed_passes

GPU_COPY_BYTES = 4 * 2**30
GPU_GEMM_SIZE = 8192
HOST_COPY_BYTES = 16 * 2**20
HOST_GEMM_SIZE = 256
PASSES = 10
CHAIN = 200  # launches


def measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """Best of several passes: a rate is what the device can do, not what it did on average.

    Copies bytes on the device, read and written both counted; multiplies square matrices of random numbers (zeros
    would draw less power and clock higher).
    """
    is_gpu = device.type == "cuda"
    copy = _copy_rate(GPU_COPY_BYTES if is_gpu else HOST_COPY_BYTES, device)
    return Rates(copy=copy, gemm=_gemm_rate(GPU_GEMM_SIZE if is_gpu else HOST_GEMM_SIZE, device, dtype))


def launch_us(device: torch.device) -> float | None:
    """Microseconds that one more small kernel costs in a captured chain, whatever it does. None on the host."""
    if device.type != "cuda":
        return None
    number = torch.zeros(1, device=device)
    return GraphClock(device).time([lambda: number.add_(1)] * CHAIN).median_us / CHAIN


def _copy_rate(num_bytes: int, device: torch.device) -> float:
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * num_bytes / _fastest(lambda: target.copy_(source), device)


def _gemm_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2.0 * size**3 / _fastest(lambda: torch.mm(left, right, out=out), device)


def _fastest(call: Call, device: torch.device) -> float:
    """Seconds of the fastest of several calls."""
    for _ in range(3):
        call()
    if device.type == "cuda":
        return min(timed_passes(call, PASSES, device)) * 1e-6
    samples = []
    for _ in range(PASSES):
        started = time.perf_counter()
        call()
        samples.append(time.perf_counter() - started)
    return min(samples)
