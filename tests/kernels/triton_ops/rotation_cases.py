"""The rotation kernels in Triton's interpreter against the definition; see test_interpreter.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltaserve_kernels import (
    KernelError,
    PaddedLayout,
    RotationFactor,
    RotationTables,
    build_work_list,
    build_work_list_runs,
    rotate_blocks,
    rotations,
)
from deltaserve_kernels.triton_ops import rotations as by_triton
from deltatest.kernel_cases import Parts, randn

MEMBERS = [(0, 0, 24), (1, 27, 39), (2, 39, 41), (3, 41, 47)]
# Slot 0 turns members 0, 1 and 3, slot 1 all but 0, member 1 by two factors; slot 2 nothing.
BINDINGS: list[Parts] = [
    (), ((0, 1.0, 3.0),), ((1, -1.0, 1.0), (0, 0.5, 0.5)), ((1, 1.0, 1.0),), ((2, 1.0, 1.0),), ((0, 0.0, 0.0),),
    ((0, 1.0, 3.0),),
]  # fmt: skip
TOLERANCE = {
    torch.float32: {"rtol": 0.0, "atol": 1e-5},
    torch.float16: {"rtol": 2**-10, "atol": 1e-4},
}


def factor(count: int, size: int, seed: int, dtype: torch.dtype, width: int = 0) -> RotationFactor:
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed)).int() if width else None
    return RotationFactor(randn(count, size, size, dtype=dtype, seed=seed, scale=0.3), order)


def filled(dtype=torch.float32) -> RotationTables:
    tables = RotationTables(4, 3)
    given = {
        0: {0: (factor(6, 4, 1, dtype),), 1: (factor(1, 3, 2, dtype),), 3: (factor(1, 6, 5, dtype, 6),)},
        1: {
            1: (factor(6, 2, 3, dtype, 12), factor(1, 6, 4, dtype, 12)),
            2: (factor(1, 2, 6, dtype),),
            3: (factor(3, 2, 7, dtype), factor(1, 1, 8, dtype), factor(2, 3, 9, dtype, 6)),
        },
    }
    for slot, of_slot in given.items():
        tables.set_all(slot, list(of_slot.items()))
    return tables


def operands(num_rows: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    wide_y, wide_x = (randn(num_rows, 60, dtype=dtype, seed=seed) for seed in (7, 8))
    return wide_y[:, 5:52], wide_x[:, 3:50]


def run(tables, bindings, y, x) -> torch.Tensor:
    by_triton.rotate_blocks(y, x, build_work_list(bindings), tables, MEMBERS, 0.25)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rotations_equal_the_definition(dtype):
    tables, (y, x) = filled(dtype), operands(len(BINDINGS), dtype)
    expected, before = y.clone(), y.clone()
    rotate_blocks(expected, x, build_work_list(BINDINGS), tables, MEMBERS, 0.25, backend="reference")
    run(tables, BINDINGS, y, x)
    torch.testing.assert_close(y, expected, **TOLERANCE[dtype])
    for row in (0, 4, 5):
        assert torch.equal(y[row], before[row]), "a row without a rotation changed"
    assert torch.equal(y[1, 39:41], before[1, 39:41]), "a member without a rotation changed"
    assert torch.equal(y[:, 24:27], before[:, 24:27])
    assert (y[1, :24] != before[1, :24]).any()


def test_a_row_has_the_same_bits_alone_and_in_company_and_spoils_nobody():
    tables, (y, x) = filled(), operands(len(BINDINGS))
    x[6], y[4, 2] = float("nan"), -0.0
    together = run(tables, BINDINGS, y.clone(), x)
    assert together[:6].isfinite().all()
    for row in (1, 2, 3):
        alone = run(tables, BINDINGS[row : row + 1], y[row : row + 1].clone(), x[row : row + 1])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("num_rows", [0, 5])
def test_a_padded_list_gives_the_same_bits(num_rows):
    tables, (y, x) = filled(), operands(6)
    bindings = BINDINGS[:num_rows] + [()] * (6 - num_rows)
    expected = run(tables, bindings, y.clone(), x)
    layout = PaddedLayout(6)
    buffer = np.zeros(layout.size, dtype=np.int32)
    layout.fill(buffer, bindings)
    by_triton.rotate_blocks(y, x, layout.work_list(torch.from_numpy(buffer)), tables, MEMBERS, 0.25)
    assert torch.equal(y, expected)


def test_which_way_goes_by_the_step(monkeypatch):
    tables, (y, x) = filled(), operands(3)
    taken: list[str] = []
    monkeypatch.setattr(by_triton, "rotate_blocks", lambda *_: taken.append("kernels"))
    monkeypatch.setattr(rotations, "_definition", lambda *_: taken.append("definition"))
    for runs in ([(row, 1, BINDINGS[1]) for row in range(3)], [(0, 1, BINDINGS[1]), (1, 2, BINDINGS[1])]):
        rotate_blocks(y, x, build_work_list_runs(runs, 3), tables, MEMBERS, backend="triton")
    assert taken == ["kernels", "definition"]


def test_blocks_that_do_not_cut_the_columns_are_refused():
    tables, (y, x) = filled(), operands(1)
    for members in ([(0, 0, 22)], [(2, 0, 3)]):
        with pytest.raises(KernelError, match="columns"):
            by_triton.rotate_blocks(y, x, build_work_list([BINDINGS[1]]), tables, members, 0.0)
