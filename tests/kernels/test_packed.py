"""The base product with a packed 16-bit weight: exact packing, fp32 sums, and rows that do not feel their company."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from deltaserve_kernels import build_work_list, cpu, lora_linear
from deltatest.kernel_cases import LinearCase, randn

DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-4},
    torch.float16: {"rtol": 2**-11, "atol": 1e-4},
}
# (outputs, inputs): one element, a part of a panel, several panels with a rest, and more depth than one block.
SHAPES = [(1, 1), (5, 3), (16, 16), (40, 77), (130, 300), (64, 513)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_packing_can_be_undone(outputs, inputs, dtype, cpu_backend):
    weight = randn(outputs, inputs, dtype=dtype)
    packed = cpu.pack_weight(weight)
    assert packed.shape == (-(-outputs // 16), inputs, 16)
    assert torch.equal(cpu.unpack_weight(packed, outputs), weight)
    assert torch.equal(cpu.unpack_weight(cpu.pack_weight(weight.t().contiguous().t()), outputs), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_product_equals_float64(outputs, inputs, with_bias, dtype, cpu_backend):
    weight, packed_rows = randn(outputs, inputs, dtype=dtype), (0, 1, 2, 5, 6, 7, 13, 63, 200)
    bias = randn(outputs, dtype=dtype, seed=2) if with_bias else None
    packed = cpu.pack_weight(weight)
    for num_rows in packed_rows:
        x = randn(num_rows, inputs, dtype=dtype, seed=1)
        expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
        found = cpu.packed_linear(x, packed, outputs, bias)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_whoever_is_beside_it(dtype, cpu_backend):
    weight = cpu.pack_weight(randn(72, 600, dtype=dtype))
    x = randn(211, 600, dtype=dtype, seed=1)
    together = cpu.packed_linear(x, weight, 72, None)
    for first, last in ((0, 1), (7, 9), (100, 105), (50, 71), (3, 160)):
        assert torch.equal(cpu.packed_linear(x[first:last], weight, 72, None), together[first:last])
    torch.set_num_threads(2)
    assert torch.equal(cpu.packed_linear(x, weight, 72, None), together)


def test_rows_may_be_a_slice_of_wider_ones(cpu_backend):
    wide = randn(9, 100, dtype=torch.bfloat16)
    packed = cpu.pack_weight(randn(20, 60, dtype=torch.bfloat16, seed=1))
    part = wide[:, 10:70]
    assert torch.equal(
        cpu.packed_linear(part, packed, 20, None), cpu.packed_linear(part.contiguous(), packed, 20, None)
    )


def adapted(num_rows, members):
    """Product with adapters, the case, and its arguments: ranks 3, 8 and 64, compositions, rows of the base alone."""
    case = LinearCase(300, members, 4, torch.bfloat16)
    for slot, rank in enumerate((3, 8, 64)):
        case.add_lora(slot, rank, [0, 2] if slot == 1 else None)
    weight = randn(case.width, 300, dtype=torch.bfloat16, seed=4, scale=0.1)
    bias, x = randn(case.width, dtype=torch.bfloat16, seed=5), randn(num_rows, 300, dtype=torch.bfloat16)
    parts = ((0, 1.0, 0.5), (1, 0.25, 1.0), (2, -1.0, 1.0))
    bindings = [((), parts[:1], parts[1:], parts[2:])[row % 4] for row in range(num_rows)]
    packed = cpu.pack_weight(weight)

    def run(first=0, last=num_rows):
        work = build_work_list(bindings[first:last])
        arguments = (packed, case.width, bias, work, case.tables("lora"), list(chain.from_iterable(case.members)), 0.25)
        return cpu.packed_linear_lora(x[first:last], *arguments)

    base = x.double() @ weight.double().t() + bias.double()
    return run, case.expected("lora", base, x, bindings, 0.25)


PANELS = [(0, 0, 48), (1, 48, 64), (2, 64, 208)]


@pytest.mark.parametrize("num_rows", [0, 1, 3, 6, 40, 150])
def test_with_adapters_equals_float64(num_rows, cpu_backend):
    run, expected = adapted(num_rows, PANELS)
    torch.testing.assert_close(run().double(), expected, rtol=2**-8, atol=2e-3)


def test_an_adapters_row_has_the_same_bits_whoever_is_beside_it(cpu_backend):
    run, _ = adapted(150, PANELS)
    together = run()
    for first, last in ((0, 150), (1, 2), (3, 4), (5, 17), (40, 110)):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(run(first, last), together[first:last])


@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_columns_that_are_no_panels_equal_product_then_adapters(num_rows, cpu_backend):
    case = LinearCase(77, [(0, 0, 48), (1, 51, 70), (2, 73, 203)], 4, torch.bfloat16)
    for slot, rank in enumerate((3, 8, 64)):
        case.add_lora(slot, rank, [0, 2] if slot == 1 else None)
    weight = cpu.pack_weight(randn(case.width, 77, dtype=torch.bfloat16, seed=4))
    x = randn(num_rows, 77, dtype=torch.bfloat16)
    work = build_work_list([((row % 3, 1.0, 0.5), (2, -1.0, 1.0))[: row % 3] for row in range(num_rows)])
    expected = cpu.packed_linear(x, weight, case.width, None)
    lora_linear(expected, x, work, case.tables("lora"), case.members, 0.25, backend="cpu")
    columns = list(chain.from_iterable(case.members))
    found = cpu.packed_linear_lora(x, weight, case.width, None, work, case.tables("lora"), columns, 0.25)
    assert torch.equal(found, expected)


def test_bad_arguments_are_named(cpu_backend):
    weight = randn(20, 60, dtype=torch.bfloat16)
    packed, x = cpu.pack_weight(weight), randn(3, 60, dtype=torch.bfloat16)
    for wrong, words in (
        (lambda: cpu.pack_weight(weight.float()), "bfloat16 or float16"),
        (lambda: cpu.pack_weight(weight[0]), "N, K"),
        (lambda: cpu.unpack_weight(packed, 40), "40 outputs"),
        (lambda: cpu.packed_linear(x, packed, 33, None), "33 outputs"),
        (lambda: cpu.packed_linear(x[:, :50], packed, 20, None), "60 inputs"),
        (lambda: cpu.packed_linear(x.half(), packed, 20, None), "the weight is"),
        (lambda: cpu.packed_linear(x, packed, 20, randn(19, dtype=torch.bfloat16)), "20 are needed"),
        (lambda: cpu.packed_linear(x, packed, 20, randn(20)), "bias must be"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
