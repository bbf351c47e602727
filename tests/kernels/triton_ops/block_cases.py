"""The block kernels in Triton's interpreter against the dense float64 oracle; see test_interpreter.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from deltaserve_kernels import PaddedLayout, block_linear, build_work_list, build_work_list_runs
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


# Small tiles and steps, so that a few rows meet every path; tiles with K split in three.
FORMS = {
    "by row": replace(blocks.DECODE, tile_rows=2, chunk=64, group=16),
    "tiles": replace(blocks.PROMPTS, tile_rows=16, block_k=16, split_k=20, max_splits=2),
}
BY_ROW = FORMS["by row"]
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def run(case, bindings, x, y, form=BY_ROW, depth=0.25) -> torch.Tensor:
    """In place."""
    blocks.block_linear(y, x, build_work_list(bindings), case.tables, case.members, depth, form)
    return y


def check(case, bindings, dtype=torch.float32, form=BY_ROW) -> None:
    x = randn(len(bindings), case.in_features, dtype=dtype)
    y = randn(len(bindings), case.width, dtype=dtype, seed=1)
    expected = case.expected(y, x, bindings, 0.25)
    torch.testing.assert_close(run(case, bindings, x, y, form).double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_rows", "form"), [(0, "by row"), (1, "by row"), (7, "by row"), (24, "tiles")])
def test_mixed_lists_parts_and_members(num_rows, form, dtype):
    check(filled(dtype=dtype), bindings_of(num_rows), dtype, FORMS[form])


@pytest.mark.parametrize(("in_features", "widths"), [(1, (1,)), (16, (16,)), (129, (15, 17)), (32, (7, 9, 8, 5))])
@each_form
def test_awkward_sizes(in_features, widths, form):
    check(filled(in_features, widths), bindings_of(7), form=form)


@pytest.mark.parametrize(("form", "num_rows"), [("by row", 1), ("tiles", 16)])
def test_many_listed_columns_and_rows_over_several_tiles(form, num_rows):
    case = BlockCase.of(200, (150,), 2)
    case.add(0, None, 170)
    case.add(1, 140, 190)
    check(case, [((0, 1.0, 1.0), (1, 1.0, 1.0))] * num_rows + [((1, 2.0, 2.0),)], form=FORMS[form])


@pytest.mark.parametrize("binding", [(), ((6, 1.0, 1.0),)], ids=["base", "empty slot"])
@each_form
def test_rows_without_a_delta_keep_their_bits(binding, form):
    case = filled()
    x, y = randn(5, 77), randn(5, case.width, seed=1)
    x[2], y[3, 7], y[3, 8] = float("nan"), float("nan"), -0.0
    out = run(case, [binding] * 5, x, y.clone(), form)
    assert torch.equal(out.view(torch.int32), y.view(torch.int32))


@each_form
def test_only_listed_columns_are_read_and_only_listed_rows_written(form):
    case = BlockCase.of(40, (24,), 1)
    case.add(0, 5, 6)
    x, y = torch.full((3, 40), float("nan")), torch.full((3, 24), -0.0)
    inverse, in_cols, _ = case.tables.get(0, 0) or pytest.fail("the slot is filled")
    x[:, in_cols.long()] = randn(3, 6)
    before = y.clone()
    run(case, [((0, 1.0, 1.0),)] * 3, x, y, form)
    listed = inverse >= 0
    assert y[:, listed].isfinite().all()
    assert (y[:, listed] != 0).all()
    assert torch.equal(y[:, ~listed].view(torch.int32), before[:, ~listed].view(torch.int32))


@each_form
def test_nothing_around_the_operands_is_read_or_written(form):
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
    run(case, bindings, x, y, form)
    torch.testing.assert_close(wide_y.double(), expected, rtol=0.0, atol=1e-4, equal_nan=True)


@each_form
def test_a_row_has_the_same_bits_alone_and_in_company(form):
    case = filled(widths=(48, 19))
    bindings = bindings_of(7)
    x, y = randn(7, 77), randn(7, case.width, seed=1)
    together = run(case, bindings, x, y.clone(), form)
    for row in (1, 2, 4):
        alone = run(case, bindings[row : row + 1], x[row : row + 1], y[row : row + 1].clone(), form)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("num_rows", [0, 5])
def test_a_padded_list_gives_the_same_bits(num_rows):
    case = filled(widths=(30, 19))
    bindings = bindings_of(num_rows) + [()] * (6 - num_rows)
    x, y = randn(6, 77), randn(6, case.width, seed=1)
    expected = run(case, bindings, x, y.clone(), blocks.DECODE)
    layout = PaddedLayout(6)
    buffer = np.zeros(layout.size, dtype=np.int32)
    layout.fill(buffer, bindings)
    blocks.block_linear(y, x, layout.work_list(torch.from_numpy(buffer)), case.tables, case.members, 0.25)
    assert torch.equal(y, expected)


def test_which_form_goes_by_the_step(monkeypatch):
    """A decode row's bits must not depend on who shares its adapter, so rows are never counted."""
    case, parts = filled(widths=(30,)), ((0, 1.0, 1.0), (2, 1.0, 1.0))
    taken: list[str] = []
    monkeypatch.setattr(blocks, "_by_row", lambda *_: taken.append("row"))
    monkeypatch.setattr(blocks, "_by_tile", lambda *_: taken.append("tile"))
    for runs in ([(row, 1, parts) for row in range(17)], [(0, 1, parts), (1, 2, parts)]):
        work = build_work_list_runs(runs, 17)
        blocks.block_linear(randn(17, 30), randn(17, 77), work, case.tables, case.members, 0.0)
    assert taken == ["row", "tile"]


def test_the_operator_reaches_the_kernels_by_name():
    case = filled(widths=(30,))
    x, y = randn(1, 77), randn(1, case.width, seed=1)
    bindings: list[Parts] = [((0, 1.0, 1.0), (2, 1.0, 1.0))]
    expected = case.expected(y, x, bindings, 0.0)
    block_linear(y, x, build_work_list(bindings), case.tables, case.members, backend="triton")
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[torch.float32])
