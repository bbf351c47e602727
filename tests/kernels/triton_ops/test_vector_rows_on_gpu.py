"""Vector terms by row on a GPU: bf16, real widths, in a captured graph; see test_on_gpu.py."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

# DELTASERVE_TEST_DEVICE=cpu with TRITON_INTERPRET=1 tries these tests themselves, small, without a GPU.
if "DELTASERVE_TEST_DEVICE" not in os.environ and not torch.cuda.is_available():
    pytest.skip("no CUDA device; test_interpreter and test_aot cover the host", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed, and it compiles the kernels", allow_module_level=True)

from deltaserve_kernels import (
    PaddedLayout,
    VectorEntries,
    VectorEntry,
    VectorFamily,
    VectorRows,
    change_norm,
    changed_rms_norm,
    fan_out,
    gather_members,
    put_back,
    scale_shift,
    scaled_input,
    set_aside,
    use_backend,
)
from deltaserve_kernels.triton_ops import pointwise
from deltatest.kernel_cases import Parts, randn

pytestmark = pytest.mark.gpu
DEVICE = torch.device(os.environ.get("DELTASERVE_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
NUM_ROWS, IN_FEATURES, WIDTHS = (64, 4096, (4096, 1024, 1024)) if ON_GPU else (7, 96, (64, 32, 16))
MEMBERS = [(i, sum(WIDTHS[:i]), sum(WIDTHS[: i + 1])) for i in range(len(WIDTHS))]
TOTAL = sum(WIDTHS)
ROW_BINDINGS: list[Parts] = [(), ((0, 1.0, 0.5),), ((1, 0.5, 2.0), (0, -1.0, 1.0)), ((2, 1.0, 1.0),), ((1, 0.0, 0.0),)]
BINDINGS = [ROW_BINDINGS[row % len(ROW_BINDINGS)] for row in range(NUM_ROWS - 2)]
PLAIN = [row for row in range(NUM_ROWS) if row >= len(BINDINGS) or row % len(ROW_BINDINGS) in (0, 3, 4)]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    before = use_backend("triton")
    yield
    use_backend(before)


def vector(size: int, seed: int, mean: float = 0.0) -> torch.Tensor:
    return (mean + randn(size, seed=seed, scale=0.3)).to(DEVICE)


def fill(family: VectorFamily, seed: int) -> None:
    for slot in range(2):
        at = seed + 20 * slot
        family.set_all(
            slot,
            VectorEntries(
                tuple((i, VectorEntry(vector(w, at + i, 1.0), vector(w, at + 5 + i))) for i, w in enumerate(WIDTHS)),
                tuple((i, VectorEntry(vector(IN_FEATURES, at + 10 + i, 1.0), None)) for i in range(slot, 3)),
                ((0, VectorEntry(vector(IN_FEATURES, at + 15), vector(IN_FEATURES, at + 16))),),
            ),
        )


def new_step() -> VectorRows:
    layout = PaddedLayout(NUM_ROWS)
    packed = np.empty(layout.size, dtype=np.int32)
    layout.fill(packed, BINDINGS)
    family = VectorFamily(3, 1, 3, DEVICE)
    fill(family, 1)
    return VectorRows(family, layout.work_list(torch.from_numpy(packed).to(DEVICE)))


X = randn(NUM_ROWS, IN_FEATURES, dtype=DTYPE).to(DEVICE)
Y = randn(NUM_ROWS, TOTAL, dtype=DTYPE, seed=1).to(DEVICE)
FANNED = randn(NUM_ROWS * 4, TOTAL, dtype=DTYPE, seed=2).to(DEVICE)
WEIGHT = randn(IN_FEATURES, dtype=DTYPE, seed=3).to(DEVICE)
GAIN, SHIFT = WEIGHT.float() + 1.0, randn(IN_FEATURES, seed=4).to(DEVICE)


def scaled(step: VectorRows) -> torch.Tensor:
    y = Y.clone()
    scale_shift(y, step.work, step.family.outputs, MEMBERS, 0.3)
    return y


def aside_and_back(step: VectorRows) -> torch.Tensor:
    y = Y.clone()
    kept = set_aside(y, step)
    y += 0.5
    put_back(y, kept, step)
    return y


def any_norm(step: VectorRows) -> torch.Tensor:
    y = X.clone()
    change_norm(y, X.float(), GAIN, SHIFT, step, 0, 0.3)
    return y


OPERATORS: dict[str, Callable[[VectorRows], torch.Tensor]] = {
    "scales": scaled,
    "input": lambda step: scaled_input(X, step, 1, 0.3),
    "fan_out": lambda step: fan_out(X, step, MEMBERS, 0.3),
    "gather": lambda step: gather_members(FANNED.clone(), step, MEMBERS),
    "aside": aside_and_back,
    "rms_norm": lambda step: changed_rms_norm(X, WEIGHT, 1e-5, 1.0, GAIN, step, 0, 0.3),
    "any_norm": any_norm,
}


@pytest.mark.parametrize("run", OPERATORS.values(), ids=OPERATORS)
def test_an_operator_equals_the_definition(run: Callable[[VectorRows], torch.Tensor]) -> None:
    step = new_step()
    found = run(step)
    use_backend("reference")
    wanted = run(step)
    torch.testing.assert_close(found.float(), wanted.float(), rtol=2**-7, atol=1e-5)


def test_rows_without_vectors_keep_their_bits() -> None:
    step = new_step()
    assert torch.equal(scaled(step)[PLAIN], Y[PLAIN])
    assert torch.equal(scaled_input(X, step, 1, 0.3)[PLAIN], X[PLAIN])
    assert torch.equal(any_norm(step)[PLAIN], X[PLAIN])
    plain = pointwise.rms_norm(X, WEIGHT, 1e-5, 1.0)
    found = changed_rms_norm(X, WEIGHT, 1e-5, 1.0, GAIN, step, 0, 0.3)
    assert torch.equal(found[PLAIN], plain[PLAIN])
    assert not torch.equal(found, plain)


@pytest.mark.skipif(not ON_GPU, reason="graphs are captured on CUDA only")
@pytest.mark.parametrize("run", OPERATORS.values(), ids=OPERATORS)
def test_a_captured_launch_follows_the_tables(run: Callable[[VectorRows], torch.Tensor]) -> None:
    step = new_step()
    first = run(step).clone()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # A list object of its own: what is derived from it belongs into the graph.
        found = run(VectorRows(step.family, PaddedLayout(NUM_ROWS).work_list(packed_of(step))))
    graph.replay()
    assert torch.equal(found, first)
    fill(step.family, 100)
    graph.replay()
    assert torch.equal(found, run(step))
    for slot in range(2):
        step.family.clear(slot)
    graph.replay()
    assert torch.equal(found, run(step))


def packed_of(step: VectorRows) -> torch.Tensor:
    """The buffer that the step's list lies in."""
    rows = step.work.rows
    return torch.as_strided(rows, (PaddedLayout(NUM_ROWS).size,), (1,), rows.storage_offset())
