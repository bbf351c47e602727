from __future__ import annotations

import time

import pytest
import torch

from deltabench import machine, rates
from deltabench.timing import GraphClock, QueueClock, WallClock, is_alive, summary


def test_the_wall_clock_tells_the_time_of_one_pass() -> None:
    calls = []

    def work() -> None:
        calls.append(1)
        time.sleep(0.002)

    timing = WallClock().time([work, work], rounds=5)
    assert len(calls) == 12  # one pass before the five
    assert timing.rounds == 5
    assert 4000 <= timing.min_us <= timing.median_us <= timing.max_us
    assert timing.nodes is None


def test_a_summary_is_the_median_not_the_mean() -> None:
    timing = summary([1.0, 2.0, 300.0], "clock")
    assert (timing.median_us, timing.min_us, timing.max_us) == (2.0, 1.0, 300.0)


def test_rates_of_the_host_are_plausible() -> None:
    found = rates.measure(torch.device("cpu"), torch.float32)
    assert 1e8 < found.copy < 1e13
    assert 1e8 < found.gemm < 1e15
    assert found.seconds(found.copy) == pytest.approx(1.0)
    assert found.seconds(0.0, 2 * found.gemm) == pytest.approx(2.0)
    assert rates.launch_us(torch.device("cpu")) is None


def test_the_host_is_alive_and_described() -> None:
    assert is_alive(torch.device("cpu"))
    found = machine.describe(torch.device("cpu"))
    assert found["gpu"] is None
    assert found["processor"]
    assert machine.versions()["torch"] is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("clock", [GraphClock, QueueClock])
def test_device_clocks_agree_on_a_long_copy(clock: type[GraphClock]) -> None:
    device = torch.device("cuda")
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = clock(device).time([lambda: target.copy_(source)] * 4, rounds=10)
    rate = 4 * 2 * source.numel() / (timing.median_us * 1e-6)
    found = rates.measure(device, torch.bfloat16)
    assert rate == pytest.approx(found.copy, rel=0.25)
    if timing.nodes is not None:
        assert timing.nodes == 4
