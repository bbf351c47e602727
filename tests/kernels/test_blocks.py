"""Row and column blocks: both operators against dense matrices, and what they and the tables refuse."""

from __future__ import annotations

import pytest
import torch

from deltaserve_kernels import BlockTables, DtypeMismatch, OutOfRange, ShapeMismatch, block_linear, build_work_list
from deltatest.block_cases import BlockCase
from deltatest.kernel_cases import Parts, randn

BINDINGS: list[Parts] = [
    ((0, 1.0, 3.0),),
    (),
    ((1, -1.0, 1.0), (0, 0.5, 0.5)),
    ((1, 1.0, 1.0),),
    ((2, 0.5, 0.5),),
    ((0, 1.0, 1.0), (2, -1.0, 2.0)),
    ((3, 1.0, 1.0),),
] * 7  # items of 7 rows
BINDINGS += [((0, 1.0, 3.0),)] * 40  # and one of more rows than are taken at once


def case_of(lists: tuple[int | None, int | None], dtype: torch.dtype) -> BlockCase:
    """Slot 0 has blocks of ``lists``, slot 1 rows of one member, slot 2 columns, slot 3 nothing; seas of NaN around."""
    case = BlockCase.of(40, (24, 20), 4, dtype, sea=True)
    case.add(0, *lists)
    case.add(1, 3, None, [1])
    case.add(2, None, 6)
    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lists", [(None, 5), (None, 40), (7, None), (24, None), (9, 11), (1, 1), (17, 8)], ids=str)
def test_blocks_are_the_dense_product(lists: tuple[int | None, int | None], dtype: torch.dtype, backend: str) -> None:
    case = case_of(lists, dtype)
    x, before = randn(len(BINDINGS), 40, dtype=dtype), randn(len(BINDINGS), case.width, dtype=dtype, seed=1)
    y = before.clone()
    block_linear(y, x, build_work_list(BINDINGS), case.tables, case.members, 0.25, backend=backend)
    tolerance = {"rtol": 0.0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-3}
    torch.testing.assert_close(y.double(), case.expected(before, x, BINDINGS, 0.25), **tolerance)
    for row, parts in enumerate(BINDINGS):
        if parts in ((), ((3, 1.0, 1.0),)):
            assert torch.equal(y[row], before[row]), "a row without blocks changed"
    for row in (3, 10):
        assert torch.equal(y[row, :24], before[row, :24]), "a member without a block changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lists", [(None, 5), (7, None), (9, 11)], ids=str)
def test_company_is_not_felt(lists: tuple[int | None, int | None], dtype: torch.dtype, cpu_backend: str) -> None:
    case = case_of(lists, dtype)
    x, before = randn(len(BINDINGS), 40, dtype=dtype), randn(len(BINDINGS), case.width, dtype=dtype, seed=1)
    y = before.clone()
    block_linear(y, x, build_work_list(BINDINGS), case.tables, case.members, 0.25, backend=cpu_backend)
    for row in range(12):
        alone = before[row : row + 1].clone()
        work = build_work_list([BINDINGS[row]])
        block_linear(alone, x[row : row + 1], work, case.tables, case.members, 0.25, backend=cpu_backend)
        assert torch.equal(alone[0], y[row]), row


def test_arguments_that_do_not_fit_are_refused(any_backend: str) -> None:
    case, work = case_of((7, None), torch.float32), build_work_list(BINDINGS)
    x, y = randn(len(BINDINGS), 40), randn(len(BINDINGS), case.width)
    for bad_y, bad_x, members in (
        (y, x[:5], case.members),
        (y, x[:, :39].contiguous(), case.members),
        (y.bfloat16(), x.bfloat16(), case.members),
        (y, x, [(0, 0, 23)]),
        (y, x, [(0, 0, 24), (7, 24, 44)]),
        (y, x, [(0, 40, 64)]),
    ):
        with pytest.raises((ValueError, IndexError)):
            block_linear(bad_y, bad_x, work, case.tables, members, 0.0, backend=any_backend)


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_tables_refuse_what_does_not_fit() -> None:
    tables = BlockTables(1, 2)
    d = torch.ones(2, 8)
    with pytest.raises(ShapeMismatch, match="dense delta"):
        tables.set(0, 0, d, 8, 2)
    with pytest.raises(ShapeMismatch, match=r"\[3, 8\] is needed"):
        tables.set(0, 0, d, 8, 9, out_rows=ints(0, 1, 2))
    with pytest.raises(OutOfRange, match="ascending"):
        tables.set(0, 0, d, 8, 9, out_rows=ints(3, 3))
    with pytest.raises(OutOfRange, match="in_cols run 1"):
        tables.set(0, 0, d, 8, 8, in_cols=ints(1, 9))
    with pytest.raises(OutOfRange, match="out_rows run -1"):
        tables.set(0, 0, d, 8, 8, out_rows=ints(-1, 2))
    with pytest.raises(DtypeMismatch, match="int64"):
        tables.set(0, 0, d, 8, 8, out_rows=ints(1, 2).long())
    assert not tables.has_any(0)
    tables.set(0, 0, d, 8, 9, out_rows=ints(1, 2))
    with pytest.raises(ShapeMismatch, match="in_features 7"):
        tables.set(0, 1, torch.ones(2, 7), 7, 9, out_rows=ints(1, 2))
    with pytest.raises(DtypeMismatch, match="this table holds"):
        tables.set(0, 1, d.half(), 8, 9, out_rows=ints(1, 2))


def test_entries_are_replaced_cleared_and_grown() -> None:
    tables = BlockTables(2, 1)
    tables.set(1, 0, torch.ones(3, 20), 8, 20, in_cols=ints(0, 3, 7))
    assert tables.sizes[1, :, 0].tolist() == [3, 0]
    assert (tables.pointers[1, :, 0] != 0).tolist() == [True, True, False]
    tables.grow(2)
    tables.set(
        1, 1, torch.ones(17, 5), 8, 20, out_rows=torch.arange(17, dtype=torch.int32), in_cols=ints(0, 1, 3, 5, 7)
    )
    assert tables.sizes[1, :, 1].tolist() == [5, 17]
    assert (tables.row_capacity, tables.has_any(1), tables.has_any(0)) == (32, True, False)
    tables.clear(1)
    assert not tables.pointers[1, :, 1].any()
    tables.clear(0)
    assert not tables.has_any(1)
    assert not tables.pointers.any()
