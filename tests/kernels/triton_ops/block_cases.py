"""The block kernels in Triton's interpreter against the dense float64 oracle; see test_interpreter.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltaserve_kernels import block_linear, build_work_list
from deltaserve_kernels.triton_ops import blocks
from deltatest.block_cases import BlockCase
from deltatest.kernel_cases import Parts, randn

TOLERANCE = {
    torch.float32: {"rtol": 0.0, "atol": 3e-5},
    torch.float16: {"rtol": 2**-11, "atol": 1e-4},
}
# Slots: listed columns, listed rows, both; one of each; many; the last is empty.
BINDINGS: list[Parts] = [
    (), ((0, 1.0, 0.5),), ((2, 0.5, 2.0), (1, -2.0, 1.0)), ((3, 1.0, 1.0), (4, 1.0, 0.0)), ((1, 1.0, 1.0),),
    ((5, 1.0, 1.0), (0, 2.0, 2.0)), ((6, 1.0, 1.0),),
]  # fmt: skip


def filled(in_features=77, widths=(48, 19, 130), dtype=torch.float32) -> BlockCase:
    case = BlockCase.of(in_features, widths, 7, dtype)
    for slot, (rows, cols) in enumerate([(None, 5), (7, None), (17, 11), (1, None), (None, 1), (19, 77)]):
        case.add(slot, rows, cols, [linear for linear in range(len(widths)) if (slot + linear) % 4 != 3])
    return case


def bindings_of(num_rows: int) -> list[Parts]:
    return [BINDINGS[(row + 1 + row // 7) % 7] for row in range(num_rows)]


def run(case, bindings, x, y, depth=0.25) -> torch.Tensor:
    """In place, with K split in three."""
    form = replace(blocks.FORM, block_k=16, split_k=20, max_splits=2)
    blocks.block_linear(y, x, build_work_list(bindings), case.tables, case.members, depth, form)
    return y


def check(case, bindings, dtype=torch.float32) -> None:
    x = randn(len(bindings), case.in_features, dtype=dtype)
    y = randn(len(bindings), case.width, dtype=dtype, seed=1)
    expected = case.expected(y, x, bindings, 0.25)
    torch.testing.assert_close(run(case, bindings, x, y).double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_rows", [0, 1, 63])
def test_mixed_lists_parts_and_members(num_rows, dtype):
    check(filled(dtype=dtype), bindings_of(num_rows), dtype)


@pytest.mark.parametrize(("in_features", "widths"), [(1, (1,)), (16, (16,)), (129, (15, 17)), (32, (7, 9, 8, 5))])
def test_awkward_sizes(in_features, widths):
    check(filled(in_features, widths), bindings_of(7))


def test_many_listed_columns_and_rows_over_several_tiles():
    case = BlockCase.of(200, (150,), 2)
    case.add(0, None, 170)
    case.add(1, 140, 190)
    check(case, [((0, 1.0, 1.0), (1, 1.0, 1.0))] * 20 + [((1, 2.0, 2.0),)])


@pytest.mark.parametrize("binding", [(), ((6, 1.0, 1.0),)], ids=["base", "empty slot"])
def test_rows_without_a_delta_keep_their_bits(binding):
    case = filled()
    x, y = randn(5, 77), randn(5, case.width, seed=1)
    x[2], y[3, 7], y[3, 8] = float("nan"), float("nan"), -0.0
    out = run(case, [binding] * 5, x, y.clone())
    assert torch.equal(out.view(torch.int32), y.view(torch.int32))


def test_only_listed_columns_are_read_and_only_listed_rows_written():
    case = BlockCase.of(40, (24,), 1)
    case.add(0, 5, 6)
    x, y = torch.full((3, 40), float("nan")), torch.full((3, 24), -0.0)
    inverse, in_cols, _ = case.tables.get(0, 0) or pytest.fail("the slot is filled")
    x[:, in_cols.long()] = randn(3, 6)
    before = y.clone()
    run(case, [((0, 1.0, 1.0),)] * 3, x, y)
    listed = inverse >= 0
    assert y[:, listed].isfinite().all()
    assert (y[:, listed] != 0).all()
    assert torch.equal(y[:, ~listed].view(torch.int32), before[:, ~listed].view(torch.int32))


def test_nothing_around_the_operands_is_read_or_written():
    """Operands and adapters lie in seas of NaN, and lists in seas of wild indices."""
    case = BlockCase.of(40, (24, 20), 3, sea=True)
    case.add(0, 5, 6)
    case.add(1, None, 7)
    case.add(2, 9, None)
    wide_x, wide_y = torch.full((12, 80), float("nan")), torch.full((12, 120), float("nan"))
    x, y = wide_x[3:9, 8:48], wide_y[3:9, 16 : 16 + case.width]
    x.copy_(randn(6, 40))
    for _, start, stop in case.members:
        y[:, start:stop] = randn(6, stop - start, seed=start + 1)
    bindings: list[Parts] = [
        ((1, 1.0, 1.0),), (), ((1, 1.0, 1.0), (2, 1.0, 1.0)), ((0, 1.0, 1.0),), (), ((2, 1.0, 1.0),)
    ]  # fmt: skip
    expected = torch.full((12, 120), float("nan"), dtype=torch.float64)
    expected[3:9, 16 : 16 + case.width] = case.expected(y, x, bindings, 0.25)
    run(case, bindings, x, y)
    torch.testing.assert_close(wide_y.double(), expected, rtol=0.0, atol=1e-4, equal_nan=True)


def test_a_row_has_the_same_bits_alone_and_in_company():
    case = filled()
    bindings = bindings_of(9)
    x, y = randn(9, 77), randn(9, case.width, seed=1)
    together = run(case, bindings, x, y.clone())
    for row in (1, 2, 4):
        alone = run(case, bindings[row : row + 1], x[row : row + 1], y[row : row + 1].clone())
        assert torch.equal(alone[0], together[row])


def test_the_operator_reaches_the_kernels_by_name():
    case = filled(widths=(30,))
    x, y = randn(1, 77), randn(1, case.width, seed=1)
    bindings: list[Parts] = [((0, 1.0, 1.0), (2, 1.0, 1.0))]
    expected = case.expected(y, x, bindings, 0.0)
    block_linear(y, x, build_work_list(bindings), case.tables, case.members, backend="triton")
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[torch.float32])
