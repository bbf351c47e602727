"""Masks over the base's weight in the kernel of dense differences, in Triton's interpreter; see test_interpreter.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltaserve_kernels import (
    ApartRows,
    KernelError,
    PaddedLayout,
    WeightView,
    build_work_list,
    dense_rows,
    use_backend,
)
from deltaserve_kernels.triton_ops import dense
from deltatest.kernel_cases import Parts, randn
from deltatest.mask_cases import expected, filled, weight_of

TOLERANCE = {
    torch.float32: {"rtol": 0.0, "atol": 3e-5},
    torch.float16: {"rtol": 2**-11, "atol": 2e-3},
}
BINDINGS: list[Parts] = [
    (), ((0, 1.0, 0.5),), ((1, 1.0, 1.0),), ((2, 0.5, 2.0), (0, -2.0, 1.0)), ((3, 1.0, 1.0),), ((1, 0.0, 0.0),),
]  # fmt: skip
FORMS = {
    "decode": dense.DenseForm(block_k=64),
    "prompts": dense.DenseForm(tile_rows=32, block_k=64),
}


def operands(members, inputs: int, num_rows: int, dtype=torch.float32):
    outputs = members[-1][2] + 3
    x = randn(num_rows, inputs, dtype=dtype, scale=inputs**-0.5)
    return x, randn(num_rows, outputs, dtype=dtype, seed=1), weight_of(outputs, inputs, dtype)


def run(family, members, bindings, x, y, weight, form=FORMS["decode"]):
    work = build_work_list(bindings)
    dense.dense_linear(y, x, work, family.dense, members, 0.25, lambda: weight, form)
    return y


@pytest.mark.parametrize(
    ("inputs", "widths", "form", "dtype"),
    [
        (77, (40, 19, 9), "decode", torch.float32),
        (77, (40, 19), "prompts", torch.float16),
        (1, (1,), "decode", torch.float32),
        (129, (33, 7, 9, 5), "decode", torch.float32),
    ],
)
def test_masks_equal_float64(inputs, widths, form, dtype):
    family, members = filled(widths, inputs, 2, dtype)
    bindings = [BINDINGS[i % 6] for i in range(9)]
    x, y, weight = operands(members, inputs, len(bindings), dtype)
    wanted = expected(y, x, bindings, family, members, 0.25, weight.data)
    found = run(family, members, bindings, x, y.clone(), weight, FORMS[form])
    torch.testing.assert_close(found.double(), wanted, **TOLERANCE[dtype])
    for row in (0, 4, 5):  # the base, an empty slot, strength 0
        assert torch.equal(found[row], y[row])
    assert torch.equal(found[:, :2], y[:, :2])
    assert torch.equal(found[:, -3:], y[:, -3:])


def test_a_row_has_the_same_bits_alone_and_in_company_and_in_a_padded_list():
    family, members = filled((40, 19), 77)
    bindings = [BINDINGS[i] for i in (1, 2, 3, 1, 2, 3)]
    x, y, weight = operands(members, 77, 6)
    x[5] = float("nan")
    together = run(family, members, bindings, x, y.clone(), weight, dense.DECODE)
    assert together[:5].isfinite().all()
    for row in range(3):
        some = slice(row, row + 1)
        alone = run(family, members, bindings[some], x[some], y[some].clone(), weight, dense.DECODE)
        assert torch.equal(alone[0], together[row])
    layout = PaddedLayout(8)
    buffer = np.zeros(layout.size, dtype=np.int32)
    layout.fill(buffer, bindings[:5])
    padded, more = torch.cat([y[:5], y[:3]]), torch.cat([x[:5], x[:3]])
    work = layout.work_list(torch.from_numpy(buffer))
    dense.dense_linear(padded, more, work, family.dense, members, 0.25, lambda: weight)
    assert torch.equal(padded[:5], together[:5])
    assert torch.equal(padded[5:], y[:3])


def test_the_operator_reaches_the_kernel_and_equals_the_definition():
    family, members = filled((30,), 77)
    x, y, weight = operands(members, 77, 4)
    step = ApartRows(family, build_work_list(BINDINGS[:4]))
    found = []
    for backend in ("reference", "triton"):
        before = use_backend(backend)
        found.append(y.clone())
        dense_rows(found[-1], x, step, members, 0.5, lambda: weight)
        use_backend(before)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=3e-5)
    assert not torch.equal(found[1], y)


def test_weights_that_do_not_fit_are_refused():
    family, members = filled((30,), 77)
    x, y, weight = operands(members, 77, 1)
    with pytest.raises(KernelError, match="give it"):
        dense.dense_linear(y, x, build_work_list(BINDINGS[1:2]), family.dense, members, 0.25)
    for bad in (weight.data[:-1], weight.data.half(), weight.data.t().contiguous().t(), torch.zeros(3, 77, 16)):
        with pytest.raises(KernelError, match="weight"):
            run(family, members, BINDINGS[1:2], x, y, WeightView(bad, len(y[0])))
