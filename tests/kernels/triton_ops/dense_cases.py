"""The kernel of dense differences in Triton's interpreter against float64; see test_interpreter.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltaserve_kernels import (
    ApartFamily,
    ApartRows,
    KernelError,
    PaddedLayout,
    build_work_list,
    dense_rows,
    use_backend,
)
from deltaserve_kernels.triton_ops import dense
from deltatest.apart_cases import dense_expected, full, packed
from deltatest.kernel_cases import Parts, randn

TOLERANCE = {
    torch.float32: {"rtol": 0.0, "atol": 3e-5},
    torch.float16: {"rtol": 2**-11, "atol": 1e-4},
}
# Slots: full, packed, one of each, the last is empty.
BINDINGS: list[Parts] = [
    (), ((0, 1.0, 0.5),), ((1, 1.0, 1.0),), ((2, 0.5, 2.0), (0, -2.0, 1.0)), ((3, 1.0, 1.0),), ((1, 0.0, 0.0),),
]  # fmt: skip
DECODE = dense.DenseForm(block_k=64)
FORMS = {"decode": DECODE, "prompts": dense.DenseForm(tile_rows=32, block_k=64)}


def filled(in_features=77, widths=(40, 19), dtype=torch.float32) -> tuple[ApartFamily, list[tuple[int, int, int]]]:
    family = ApartFamily(len(widths), 0, 4)
    starts = [sum(widths[:i]) + 3 * i for i in range(len(widths))]
    members = [(i, start, start + width) for i, (start, width) in enumerate(zip(starts, widths, strict=True))]
    for slot in range(3):
        entries = [
            (
                i,
                full(width, in_features, 10 * slot + i, dtype)
                if (slot + i) % 2 == 0
                else packed(width, in_features, i),
            )
            for i, width in enumerate(widths)
            if slot != 1 or i < 2
        ]
        family.dense.set_all(slot, entries)
    return family, members


def run(case, bindings, x, y, form=DECODE, depth=0.25) -> torch.Tensor:
    family, members = case
    dense.dense_linear(y, x, build_work_list(bindings), family.dense, members, depth, form=form)
    return y


def operands(case, num_rows, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    family, members = case
    in_features, _ = family.dense.shape_of(0)
    return randn(num_rows, in_features, dtype=dtype), randn(num_rows, members[-1][2], dtype=dtype, seed=1)


def check(case, bindings, dtype=torch.float32, form=DECODE) -> None:
    x, y = operands(case, len(bindings), dtype)
    expected = dense_expected(y, x, bindings, case[0].dense, case[1], 0.25)
    torch.testing.assert_close(run(case, bindings, x, y, form).double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize(("form", "dtype"), [("decode", torch.float32), ("prompts", torch.float16)])
def test_full_and_packed_parts_and_members(form, dtype):
    check(filled(dtype=dtype), [BINDINGS[i % 6] for i in range(9)], dtype, FORMS[form])


@pytest.mark.parametrize(("in_features", "widths"), [(1, (1,)), (64, (32, 16)), (129, (33, 7, 9, 5))])
def test_awkward_sizes(in_features, widths):
    check(filled(in_features, widths), BINDINGS)


def test_more_rows_of_one_adapter_than_a_tile_has():
    check(filled(widths=(20,)), [BINDINGS[1]] * 18 + [BINDINGS[2]])


@pytest.mark.parametrize("binding", [BINDINGS[0], BINDINGS[4], BINDINGS[5]], ids=["base", "empty slot", "strength 0"])
def test_rows_without_a_difference_keep_their_bits(binding):
    case = filled()
    x, y = operands(case, 4)
    x[2], y[3, 7], y[3, 8] = float("nan"), float("nan"), -0.0
    out = run(case, [binding] * 4, x, y.clone())
    assert torch.equal(out.view(torch.int32), y.view(torch.int32))


def test_a_row_has_the_same_bits_alone_and_in_company_and_spoils_nobody():
    case = filled()
    bindings = [BINDINGS[i] for i in (1, 2, 3, 1, 2, 3)]
    x, y = operands(case, 6)
    x[5] = float("nan")
    together = run(case, bindings, x, y.clone())
    assert together[:5].isfinite().all()
    for row in range(3):
        alone = run(case, bindings[row : row + 1], x[row : row + 1], y[row : row + 1].clone())
        assert torch.equal(alone[0], together[row])


def test_columns_between_members_are_not_touched():
    case = filled()
    x, y = operands(case, 3)
    y[:, 40:43] = float("nan")
    out = run(case, [BINDINGS[3]] * 3, x, y)
    assert out[:, 40:43].isnan().all()
    assert out[:, :40].isfinite().all()
    assert out[:, 43:].isfinite().all()


@pytest.mark.parametrize("num_rows", [0, 5])
def test_a_padded_list_gives_the_same_bits(num_rows):
    case = filled()
    bindings = BINDINGS[:num_rows] + [()] * (6 - num_rows)
    x, y = operands(case, 6)
    expected = run(case, bindings, x, y.clone(), dense.DECODE)
    layout = PaddedLayout(6)
    buffer = np.zeros(layout.size, dtype=np.int32)
    layout.fill(buffer, bindings)
    dense.dense_linear(y, x, layout.work_list(torch.from_numpy(buffer)), case[0].dense, case[1], 0.25)
    assert torch.equal(y, expected)


def test_the_operator_reaches_the_kernel_and_equals_the_definition():
    family, members = case = filled(widths=(30,))
    x, y = operands(case, 4)
    step = ApartRows(family, build_work_list(BINDINGS[:4]))
    found = []
    for backend in ("reference", "triton"):
        before = use_backend(backend)
        found.append(y.clone())
        dense_rows(found[-1], x, step, members, 0.5)
        use_backend(before)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=3e-5)
    assert not torch.equal(found[1], y)


def test_arguments_that_do_not_fit_are_refused():
    case = filled()
    x, y = operands(case, 1)
    for bad_x, bad_y, match in (
        (x[:, :70].contiguous(), y, r"\[40, 77\]; \[40, 70\]"),
        (x.half(), y.half(), "one dtype"),
        (x.expand(2, -1), y, "float rows"),
    ):
        with pytest.raises(KernelError, match=match):
            run(case, [BINDINGS[1]], bad_x, bad_y)
