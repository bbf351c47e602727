"""Vector terms: the PyTorch definitions against float64, and what the tables and operators refuse."""

from __future__ import annotations

import pytest
import torch

from deltaserve_kernels import (
    DtypeMismatch,
    LoraTables,
    NormTables,
    NotContiguous,
    OutOfRange,
    ShapeMismatch,
    VectorFamily,
    VectorTables,
    build_work_list,
    lora_vector_linear,
    rms_norm,
)
from deltaserve_kernels.triton_ops import guard
from deltatest.kernel_cases import Parts, randn
from deltatest.vector_cases import VectorCase, expected_norm, norm_tables

BINDINGS: list[Parts] = [
    ((0, 1.0, 3.0),),
    (),
    ((1, -1.0, 1.0), (0, 0.5, 0.5), (3, 2.0, 1.0)),
    ((1, 1.0, 1.0),),
    ((2, 1.0, 1.0),),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_bias_meet_the_base_and_not_the_delta(dtype: torch.dtype) -> None:
    case = VectorCase(40, [(0, 0, 24), (1, 24, 30)], 4, dtype)
    case.add_lora(0, 5)
    case.add_vectors(0, True, True, [0])
    case.add_vectors(1, True, True)
    case.add_vectors(3, False, True)
    x, y = randn(5, 40, dtype=dtype), randn(5, 30, dtype=dtype, seed=1)
    expected = case.expected_vectors(y, x, BINDINGS, 0.25)
    out = y.clone()
    lora_vector_linear(out, x, build_work_list(BINDINGS), case.lora, case.vectors, case.members, 0.25)
    tolerance = {"rtol": 0.0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-3}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    assert torch.equal(out[[1, 4]], y[[1, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_base_rows_is_torchs_to_the_bit(dtype: torch.dtype) -> None:
    x, weight = randn(5, 48, dtype=dtype), randn(48, dtype=dtype, seed=2)
    tables = norm_tables(48, 2, [1], 4)
    out = rms_norm(x, weight, 1e-6, build_work_list(BINDINGS), tables, 1, 0.25)
    plain = torch.nn.functional.rms_norm(x, (48,), weight, 1e-6)
    assert torch.equal(out[[0, 1, 4]], plain[[0, 1, 4]])
    expected = expected_norm(x, weight, 1e-6, tables, 1, BINDINGS, 0.25)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    assert not torch.equal(out[2], plain[2])


def test_vector_tables_refuse_what_does_not_fit() -> None:
    tables = VectorTables(2, 2, takes_narrow=True)
    with pytest.raises(ShapeMismatch, match="a bias or both"):
        tables.set(0, 0)
    with pytest.raises(ShapeMismatch, match="of one size"):
        tables.set(0, 0, torch.ones(8), torch.ones(7))
    with pytest.raises(DtypeMismatch, match="float16"):
        tables.set(0, 0, torch.ones(8).half())
    with pytest.raises(DtypeMismatch, match=r"scale is torch\.float32, bias torch\.bfloat16"):
        tables.set(0, 0, torch.ones(8), torch.ones(8).bfloat16())
    for wide in (VectorTables(2, 2, "meta", takes_narrow=True), VectorTables(2, 2), VectorFamily(2, 2, 2).norms):
        with pytest.raises(DtypeMismatch, match=r"allowed: torch\.float32$"):
            wide.set(0, 0, torch.ones(8).bfloat16())
    with pytest.raises(NotContiguous, match="strides"):
        tables.set(0, 0, torch.ones(16)[::2])
    with pytest.raises(OutOfRange, match="slot 2"):
        tables.set(0, 2, torch.ones(8))
    assert not tables.has_any(0)
    tables.set(0, 0, torch.ones(8))
    with pytest.raises(ShapeMismatch, match="differs from the 8"):
        tables.set(0, 1, None, torch.ones(9))
    assert (tables.pointers[0, :, 0] != 0).tolist() == [True, False]
    tables.grow(3)
    tables.clear(0)
    assert not tables.pointers.any()


def test_kernels_that_read_fp32_alone_refuse_other_vectors() -> None:
    tables = VectorTables(2, 2, takes_narrow=True)
    tables.set(0, 0, torch.ones(8))
    guard.check_wide(tables)
    tables.set(1, 0, None, torch.ones(8).bfloat16())
    with pytest.raises(DtypeMismatch, match="read fp32"):
        guard.check_wide(tables)


def test_norm_tables_refuse_what_does_not_fit() -> None:
    tables = NormTables(2, 2)
    with pytest.raises(OutOfRange, match="norm 2"):
        tables.set(2, 0, torch.ones(8))
    with pytest.raises(DtypeMismatch, match="float16"):
        tables.set(1, 0, torch.ones(8).half())
    tables.set(1, 0, torch.ones(8))
    with pytest.raises(ShapeMismatch, match="earlier entries have 8"):
        tables.set(1, 1, torch.ones(9))
    with pytest.raises(OutOfRange, match="given twice"):
        tables.set_all(1, [(0, torch.ones(8)), (0, torch.ones(8))])
    assert (tables.pointers != 0).tolist() == [[False, False], [True, False]]
    tables.clear(0)
    assert not tables.pointers.any()


def test_operators_refuse_what_does_not_fit() -> None:
    work, x = build_work_list([((0, 1.0, 1.0),)]), randn(1, 8)
    vectors, norms = VectorTables(1, 1), NormTables(1, 1)
    vectors.set(0, 0, torch.ones(8))
    with pytest.raises(ShapeMismatch, match="vectors have 1 linears and 1 slots"):
        lora_vector_linear(x, x, work, LoraTables(1, 2), vectors, [(0, 0, 8)])
    with pytest.raises(ShapeMismatch, match="vectors of 8"):
        lora_vector_linear(x, x, work, LoraTables(1, 1), vectors, [(0, 0, 7)])
    with pytest.raises(DtypeMismatch, match="weight"):
        rms_norm(x, torch.ones(8).half(), 1e-6, work, norms, 0)
    with pytest.raises(ShapeMismatch, match=r"\[H\]"):
        rms_norm(x, torch.ones(7), 1e-6, work, norms, 0)
    with pytest.raises(OutOfRange, match="norm 1"):
        rms_norm(x, torch.ones(8), 1e-6, work, norms, 1)
    with pytest.raises(OutOfRange, match="slots run 3"):
        rms_norm(x, torch.ones(8), 1e-6, build_work_list([((3, 1.0, 1.0),)]), norms, 0)
