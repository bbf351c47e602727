"""The operators' own threads: the same bits with any number of them, from several callers at once, and after a fork."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from deltaserve_kernels import cpu
from deltatest.kernel_cases import randn

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the C++ library alone has threads of its own")

ROWS, OUTPUTS, INPUTS = 64, 480, 256  # large enough to be split


def test_any_number_of_threads_gives_the_same_bits() -> None:
    x, weight = randn(ROWS, INPUTS, dtype=torch.bfloat16), cpu.pack_weight(randn(OUTPUTS, INPUTS, dtype=torch.bfloat16))
    alone = cpu.packed_linear(x, weight, OUTPUTS, None)
    for threads in (2, 5, 1, 3):
        torch.set_num_threads(threads)
        for _ in range(50):
            assert torch.equal(cpu.packed_linear(x, weight, OUTPUTS, None), alone)


def test_callers_at_once_do_not_disturb_each_other() -> None:
    weight = cpu.pack_weight(randn(OUTPUTS, INPUTS, dtype=torch.bfloat16))
    inputs = [randn(ROWS, INPUTS, dtype=torch.bfloat16, seed=seed) for seed in range(4)]
    wanted = [cpu.packed_linear(x, weight, OUTPUTS, None) for x in inputs]

    def many(index: int) -> bool:
        torch.set_num_threads(2)
        found = (cpu.packed_linear(inputs[index], weight, OUTPUTS, None) for _ in range(100))
        return all(torch.equal(each, wanted[index]) for each in found)

    with ThreadPoolExecutor(len(inputs)) as callers:
        assert all(callers.map(many, range(len(inputs))))


FORKED = f"""
import os, sys, torch
from deltaserve_kernels import cpu
assert cpu.is_available()
torch.set_num_threads(2)
x = torch.randn({ROWS}, {INPUTS}).bfloat16()
weight = cpu.pack_weight(torch.randn({OUTPUTS}, {INPUTS}).bfloat16())
before = cpu.packed_linear(x, weight, {OUTPUTS}, None)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(cpu.packed_linear(x, weight, {OUTPUTS}, None), before) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_does_the_work_itself() -> None:
    """Threads do not survive a fork; whoever waited for them would wait for ever."""
    assert subprocess.run([sys.executable, "-c", FORKED], timeout=120, check=False).returncode == 0
