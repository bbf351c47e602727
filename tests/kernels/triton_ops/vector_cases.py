"""Vector terms in Triton's interpreter, as the epilogue of low-rank forms and in the norm; see test_interpreter.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltaserve_kernels import build_work_list, lora_vector_linear, rms_norm
from deltaserve_kernels.triton_ops import lora, vectors
from deltatest.kernel_cases import Parts, randn
from deltatest.vector_cases import VectorCase, expected_norm, norm_tables

TOLERANCE = {
    torch.float32: {"rtol": 1e-6, "atol": 3e-5},
    torch.float16: {"rtol": 2**-11, "atol": 2e-4},
}
FORMS = {"by_row": lora.DECODE, "products": lora.PRODUCTS, "one_launch": lora.ONE_LAUNCH, "prefill": lora.PREFILL}
# Slots: low rank alone, with both vectors, scale alone, bias alone (rank 0), nothing.
BINDINGS: list[Parts] = [
    (), ((0, 1.0, 0.5),), ((1, 0.5, 2.0), (2, -2.0, 1.0)), ((3, 1.0, 1.0),), ((2, 1.0, 1.0),), ((4, 1.0, 1.0),),
    ((3, 1.0, 0.0), (0, 2.0, 2.0), (1, 1.0, 1.0)),
]  # fmt: skip


def filled(in_features=77, widths=(48, 19, 130), dtype=torch.float32) -> VectorCase:
    starts = [sum(widths[:i]) + 3 * i for i in range(len(widths))]
    members = [(i, start, start + width) for i, (start, width) in enumerate(zip(starts, widths, strict=True))]
    case = VectorCase(in_features, members, 5, dtype)
    case.add_lora(0, 17)
    case.add_lora(1, 3, list(range(len(widths)))[:2])
    for slot, (has_scale, has_bias) in {1: (True, True), 2: (True, False), 3: (False, True)}.items():
        case.add_vectors(slot, has_scale, has_bias, [linear for linear in range(len(widths)) if linear != slot - 1])
    return case


def bindings_of(num_rows: int) -> list[Parts]:
    return [BINDINGS[(row + 1 + row // 7) % 7] for row in range(num_rows)]


def run(case, bindings, x, y, form, depth=0.25) -> torch.Tensor:
    form = replace(form, block_k=32) if form.fold else replace(form, block_k=32, split_k=32)
    vectors.lora_vector_linear(y, x, build_work_list(bindings), case.lora, case.vectors, case.members, depth, form)
    return y


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("num_rows", [0, 1, 30])
def test_vectors_meet_the_base_and_not_the_delta(num_rows, form):
    case, bindings = filled(), bindings_of(num_rows)
    x, y = randn(num_rows, 77), randn(num_rows, case.width, seed=1)
    expected = case.expected_vectors(y, x, bindings, 0.25)
    torch.testing.assert_close(run(case, bindings, x, y, form).double(), expected, **TOLERANCE[torch.float32])


def test_half_precision_is_rounded_once():
    case, bindings = filled(dtype=torch.float16), bindings_of(9)
    x, y = randn(9, 77, dtype=torch.float16), randn(9, case.width, dtype=torch.float16, seed=1)
    expected = case.expected_vectors(y, x, bindings, 0.25)
    out = run(case, bindings, x, y, lora.DECODE)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[torch.float16])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_adapter_of_vectors_alone_is_an_item_of_rank_0(form):
    """No low-rank entry anywhere; rows of the base alone and of an empty slot keep their bits, NaN in x is not read."""
    case = VectorCase(16, [(0, 0, 20), (1, 23, 40)], 2)
    case.add_vectors(0, True, True)
    bindings: list[Parts] = [((0, 1.0, 1.0),), (), ((1, 1.0, 1.0),), ((0, 0.5, 0.5),)]
    x, y = torch.full((4, 16), float("nan")), randn(4, 40, seed=1)
    expected = case.expected_vectors(y, torch.zeros(4, 16), bindings, 0.0)
    out = run(case, bindings, x, y.clone(), form, depth=0.0)
    torch.testing.assert_close(out.double(), expected, rtol=0.0, atol=1e-5)
    assert torch.equal(out[1:3], y[1:3])
    assert torch.equal(out[:, 20:23], y[:, 20:23])


def test_rows_without_vectors_have_the_bits_of_the_plain_operator():
    case = filled()
    bindings: list[Parts] = [((0, 1.0, 0.5),), (), ((0, 1.0, 0.5),)]
    x, y = randn(3, 77), randn(3, case.width, seed=1)
    plain = y.clone()
    form = replace(lora.DECODE, block_k=32, split_k=32)
    lora.lora_linear(plain, x, build_work_list(bindings), case.lora, case.members, 0.25, form)
    assert torch.equal(run(case, bindings, x, y, lora.DECODE), plain)


def test_one_launch_equals_two_to_the_bit():
    case, bindings = filled(), bindings_of(14)
    x, y = randn(14, 77), randn(14, case.width, seed=1)
    two = run(case, bindings, x, y.clone(), lora.PRODUCTS)
    assert torch.equal(run(case, bindings, x, y.clone(), lora.ONE_LAUNCH), two)


def test_the_operator_reaches_the_kernels_by_name():
    case, bindings = filled(widths=(30,)), BINDINGS[1:4]
    x, y = randn(3, 77), randn(3, 30, seed=1)
    expected = case.expected_vectors(y, x, bindings, 0.0)
    work = build_work_list(bindings)
    lora_vector_linear(y, x, work, case.lora, case.vectors, case.members, backend="triton")
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_rows", "size"), [(0, 8), (1, 1), (63, 40), (20, 130)])
def test_a_norm_has_its_rows_gains(num_rows, size, dtype):
    tables = norm_tables(size, 3, [1, 2], 5)
    bindings = bindings_of(num_rows)
    sea = torch.full((num_rows + 2, size + 9), float("nan"), dtype=dtype)
    x = sea[1 : num_rows + 1, 5 : size + 5]
    x.copy_(randn(num_rows, size, seed=1))
    weight = randn(size, dtype=dtype, seed=2)
    out = rms_norm(x, weight, 1e-5, build_work_list(bindings), tables, 2, 0.25, backend="triton")
    expected = expected_norm(x, weight, 1e-5, tables, 2, bindings, 0.25)
    assert (out.dtype, out.is_contiguous()) == (dtype, True)
    tolerance = {"rtol": 2**-11, "atol": 1e-6} if dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out.double(), expected, **tolerance)


def test_rows_of_the_base_alone_are_torchs_norm_and_do_not_see_the_tables():
    x, weight = randn(6, 48), randn(48, seed=2)
    plain = torch.nn.functional.rms_norm(x, (48,), weight, 1e-6)
    bindings: list[Parts] = [(), ((1, 1.0, 1.0),), (), (), ((0, 1.0, 1.0),), ()]
    work = build_work_list(bindings)
    tables = norm_tables(48, 2, [1], 2)
    out = rms_norm(x, weight, 1e-6, work, tables, 1, backend="triton")
    base = [0, 2, 3, 4, 5]
    torch.testing.assert_close(out[base], plain[base], rtol=3e-7, atol=0.0)
    assert not torch.allclose(out[1], plain[1])
    assert torch.equal(rms_norm(x, weight, 1e-6, work, tables, 0, backend="triton")[base], out[base])
    nobody = build_work_list([()] * 6)
    assert torch.equal(rms_norm(x, weight, 1e-6, nobody, tables, 1, backend="triton")[base], out[base])
