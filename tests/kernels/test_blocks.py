"""Row and column blocks: the PyTorch definition against dense matrices, and what the tables refuse."""

from __future__ import annotations

import pytest
import torch

from deltaserve_kernels import BlockTables, DtypeMismatch, OutOfRange, ShapeMismatch, block_linear, build_work_list
from deltatest.block_cases import BlockCase
from deltatest.kernel_cases import Parts, randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lists", [(None, 5), (7, None), (9, 11), (1, 1)], ids=str)
def test_the_definition_is_the_dense_product(lists: tuple[int | None, int | None], dtype: torch.dtype) -> None:
    case = BlockCase.of(40, (24, 20), 2, dtype)
    case.add(0, *lists)
    case.add(1, 3, None, [1])
    bindings: list[Parts] = [((0, 1.0, 3.0),), (), ((1, -1.0, 1.0), (0, 0.5, 0.5))]
    x, y = randn(3, 40, dtype=dtype), randn(3, case.width, dtype=dtype, seed=1)
    expected = case.expected(y, x, bindings, 0.25)
    block_linear(y, x, build_work_list(bindings), case.tables, case.members, 0.25)
    tolerance = {"rtol": 0.0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-3}
    torch.testing.assert_close(y.double(), expected, **tolerance)


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
