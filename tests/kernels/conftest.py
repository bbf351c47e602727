"""Each operator test runs on the PyTorch definition and on the C++ version at every level this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from deltaserve_kernels import cpu


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _at_level(name: str) -> Iterator[str]:
    if not cpu.is_available():
        pytest.skip(f"no C++ library: {cpu.unavailable_reason()}")
    if name not in cpu.available_levels():
        pytest.skip(f"this processor has no {name}; the levels it has are tested")
    before = cpu.level()
    cpu.set_level(name)
    yield "cpu"
    cpu.set_level(before)


@pytest.fixture(params=["reference", *cpu.LEVELS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A value for the operators' ``backend``: the definition, and C++ with each instruction set."""
    if request.param == "reference":
        yield "reference"
    else:
        yield from _at_level(request.param)


@pytest.fixture(params=cpu.LEVELS)
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """``cpu`` with each instruction set."""
    yield from _at_level(request.param)


@pytest.fixture(params=["reference", "cpu"])
def any_backend(request: pytest.FixtureRequest) -> str:
    """The two implementations, C++ at the machine's best level."""
    if request.param == "cpu" and not cpu.is_available():
        pytest.skip(f"no C++ library: {cpu.unavailable_reason()}")
    return str(request.param)
