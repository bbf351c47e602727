"""The sparse kernel in Triton's interpreter against the dense float64 oracle; see test_interpreter.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltaserve_kernels import KernelError, PaddedLayout, build_work_list, sparse_linear
from deltaserve_kernels.triton_ops import sparse
from deltatest.kernel_cases import LinearCase, Parts, csr, randn

TOLERANCE = {
    torch.float32: {"rtol": 0.0, "atol": 3e-5},
    torch.float16: {"rtol": 2**-11, "atol": 1e-4},
}
DENSITIES = [0.01, 0.0, 0.3, 1.0]
# Small tiles and steps, so that a few rows meet every path.
DECODE = sparse.SparseForm(tile_rows=4, step=2)
FORMS = {
    "decode": DECODE,
    "gathered": sparse.SparseForm(tile_rows=4, step=2, staged=False),
    "all at once": sparse.SparseForm(step=32),
    "wide": sparse.SparseForm(tile_rows=16, wide=True),
}


def filled(in_features=77, widths=(48, 19, 130), dtype=torch.float32, num_slots=6) -> LinearCase:
    """Four slots from nearly empty to dense, some without some members; the last two slots stay empty."""
    members, start = [], 0
    for linear, width in enumerate(widths):
        members.append((linear, start, start + width))
        start += width + 3
    case = LinearCase(in_features, members, num_slots, dtype)
    for slot, density in enumerate(DENSITIES):
        case.add_sparse(slot, density, [linear for linear in range(len(widths)) if (slot + linear) % 4 != 3])
    return case


BINDINGS: list[Parts] = [(), ((0, 1.0, 0.5),), ((2, 0.5, 2.0), (0, -2.0, 1.0)), ((3, 1.0, 1.0),), ((4, 1.0, 1.0),)]


def bindings_of(num_rows: int) -> list[Parts]:
    return [BINDINGS[(row + 1 + row // 5) % 5] for row in range(num_rows)]


def run(case, bindings, x, y, depth=0.25, form=sparse.DECODE) -> torch.Tensor:
    sparse.sparse_linear(y, x, build_work_list(bindings), case.sparse, case.members, depth, form)
    return y


def check(case, bindings, dtype=torch.float32, form=sparse.DECODE) -> None:
    x = randn(len(bindings), case.in_features, dtype=dtype)
    y = randn(len(bindings), case.width, dtype=dtype, seed=1)
    expected = case.expected("sparse", y, x, bindings, 0.25)
    torch.testing.assert_close(run(case, bindings, x, y, form=form).double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_rows", [0, 1, 63])
def test_mixed_densities_parts_and_members(num_rows, dtype):
    check(filled(dtype=dtype), bindings_of(num_rows), dtype, sparse.DECODE)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_each_way_to_read_x(form):
    """Items of 1, 2, 3 and 17 rows, one of two parts."""
    bindings = [BINDINGS[i] for i in (1, 2, 3, 0, 3, 2, 2)] + [((2, 1.0, 1.0), (3, 0.5, 0.0))] * 17
    check(filled(widths=(130, 19)), bindings, form=form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_where_x_is_read_from_does_not_change_a_bit(dtype):
    case, bindings = filled(widths=(130, 19), dtype=dtype), [BINDINGS[i] for i in (1, 2, 3, 0, 3, 2, 2)]
    x, y = randn(7, 77, dtype=dtype), randn(7, case.width, dtype=dtype, seed=1)
    expected = run(case, bindings, x, y.clone(), form=DECODE)
    assert torch.equal(run(case, bindings, x, y.clone(), form=FORMS["gathered"]), expected)


@pytest.mark.parametrize(
    ("in_features", "widths"), [(1, (1,)), (16, (16,)), (100, (127, 128, 129)), (40, (7, 9, 8, 5)), (30, (300,))]
)
@pytest.mark.parametrize("form", [DECODE, FORMS["wide"]], ids=["decode", "wide"])
def test_awkward_sizes(in_features, widths, form):
    check(filled(in_features, widths), bindings_of(6), form=form)


@pytest.mark.parametrize("binding", [(), ((5, 1.0, 1.0),), ((1, 1.0, 1.0),)], ids=["base", "empty slot", "no nonzero"])
@pytest.mark.parametrize("form", [DECODE, FORMS["wide"]], ids=["decode", "wide"])
def test_rows_without_a_delta_keep_their_bits(binding, form):
    case = filled()
    x, y = randn(5, 77), randn(5, case.width, seed=1)
    x[2], y[3, 7], y[3, 8] = float("nan"), float("nan"), -0.0
    out = run(case, [binding] * 5, x, y.clone(), form=form)
    assert torch.equal(out.view(torch.int32), y.view(torch.int32))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_nan_in_x_reaches_the_outputs_that_read_it_and_no_other(num_rows, form):
    """Lanes that are not there read column 0, and packs are filled up: neither may be multiplied with x there."""
    case = filled(widths=(40,))
    x, y = randn(num_rows, 77), randn(num_rows, case.width, seed=1)
    x[0, 0] = float("nan")
    out = run(case, [((2, 1.0, 1.0),)] * num_rows, x, y, form=form)
    assert torch.equal(out[0, :40].isnan(), case.sparse_dense[0, 2][:, 0] != 0)
    assert not out[1:].isnan().any()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_nothing_around_the_operands_is_read_or_written(form):
    case = filled(in_features=40, widths=(24, 20))
    wide_x, wide_y = torch.full((12, 80), float("nan")), torch.full((12, 120), float("nan"))
    x, y = wide_x[3:9, 8:48], wide_y[3:9, 16 : 16 + case.width]
    x.copy_(randn(6, 40))
    for _, start, stop in case.members:
        y[:, start:stop] = randn(6, stop - start, seed=start + 1)
    bindings: list[Parts] = [((2, 1.0, 1.0),), (), ((2, 1.0, 1.0),), ((2, 1.0, 1.0),), (), ((3, 1.0, 1.0),)]
    expected = torch.full((12, 120), float("nan"), dtype=torch.float64)
    expected[3:9, 16 : 16 + case.width] = case.expected("sparse", y, x, bindings, 0.25)
    run(case, bindings, x, y, form=form)
    torch.testing.assert_close(wide_y.double(), expected, rtol=0.0, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("form", [sparse.DECODE, FORMS["wide"]], ids=["decode", "wide"])
def test_a_row_has_the_same_bits_alone_and_in_company(form):
    case = filled()
    bindings = bindings_of(20)
    x, y = randn(20, 77), randn(20, case.width, seed=1)
    together = run(case, bindings, x, y.clone(), form=form)
    for row in (2, 3):
        alone = run(case, bindings[row : row + 1], x[row : row + 1], y[row : row + 1].clone(), form=form)
        assert torch.equal(alone[0], together[row])


def test_replaced_cleared_and_grown_tables_are_followed():
    case = filled(widths=(30,))
    x = randn(1, 77)
    binding: list[Parts] = [((2, 1.0, 1.0),)]
    before = run(case, binding, x, torch.zeros(1, 30))
    indptr, cols, values = case.sparse.get(0, 2) or pytest.fail("the slot is filled")
    case.sparse.set(0, 2, indptr, cols, values * 2)
    assert torch.equal(run(case, binding, x, torch.zeros(1, 30)), before * 2)
    case.sparse.clear(2)
    assert not run(case, binding, x, torch.zeros(1, 30)).any()
    case.sparse.grow(9)
    case.sparse.set(0, 8, indptr, cols, values)
    assert torch.equal(run(case, [((8, 1.0, 1.0),)], x, torch.zeros(1, 30)), before)


@pytest.mark.parametrize("num_rows", [0, 9])
def test_a_padded_list_gives_the_same_bits(num_rows):
    case = filled()
    bindings = bindings_of(num_rows) + [()] * (12 - num_rows)
    x, y = randn(12, 77), randn(12, case.width, seed=1)
    expected = run(case, bindings, x, y.clone())
    layout = PaddedLayout(12)
    buffer = np.zeros(layout.size, dtype=np.int32)
    layout.fill(buffer, bindings)
    sparse.sparse_linear(y, x, layout.work_list(torch.from_numpy(buffer)), case.sparse, case.members, 0.25)
    assert torch.equal(y, expected)


def test_the_operator_reaches_the_kernel_by_name_and_checks_columns():
    case = filled(widths=(30,))
    x, y = randn(1, 77), randn(1, 30, seed=1)
    expected = case.expected("sparse", y, x, [((2, 1.0, 1.0),)], 0.0)
    work = build_work_list([((2, 1.0, 1.0),)])
    sparse_linear(y, x, work, case.sparse, case.members, backend="triton")
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[torch.float32])
    with pytest.raises(KernelError, match="77 inputs; x has 20"):
        sparse_linear(y, randn(1, 20), work, case.sparse, case.members, backend="triton")


def test_columns_beyond_x_are_refused_before_and_after_x_is_known():
    """A captured launch looks at nothing: once a linear's inputs are known, tables take no entry that has more."""
    case = filled(widths=(30,))
    work = build_work_list([((2, 1.0, 1.0),)])
    with pytest.raises(KernelError, match=r"slot \d: column \d+, x has 20"):
        sparse_linear(randn(1, 30), randn(1, 20), work, case.sparse, case.members, backend="triton")
    sparse_linear(randn(1, 30), randn(1, 77), work, case.sparse, case.members, backend="triton")
    wide = torch.zeros(30, 99, dtype=torch.bool)
    wide[3, 98] = True
    with pytest.raises(KernelError, match="column 98, x has 77"):
        case.sparse.set(0, 4, *csr(wide, torch.ones(1)))
