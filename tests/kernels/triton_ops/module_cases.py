"""The kernels of residual modules in Triton's interpreter against float64; see test_interpreter.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltaserve_kernels import (
    ACTIVATIONS,
    ApartFamily,
    ApartRows,
    KernelError,
    PaddedLayout,
    apart_rows_reference,
    build_work_list,
    module_rows,
    use_backend,
)
from deltaserve_kernels.triton_ops import modules
from deltatest.apart_cases import module, modules_expected
from deltatest.kernel_cases import Parts, randn

SIZE, RANKS = 77, (5, 20, 1)
FORM = modules.ModuleForm(tile_rows=2, programs=2, group=8, chunk=64, block_n=64)
TOLERANCE = {
    torch.float32: {"rtol": 0.0, "atol": 3e-5},
    torch.float16: {"rtol": 2**-11, "atol": 1e-3},
}
# At point 1 slots 0 to 2 have a module, of which the second reads point 0; slot 3 has one at point 0 alone.
BINDINGS: list[Parts] = [
    (), ((0, 1.0, 0.5),), ((1, -2.0, 1.0),), ((2, 0.5, 2.0), (3, 1.0, 1.0)), ((3, 1.0, 1.0),), ((0, 0.0, 0.0),),
    ((1, -2.0, 1.0),),
]  # fmt: skip


def filled(dtype=torch.float32, size=SIZE) -> ApartFamily:
    family = ApartFamily(0, 2, 4)
    for slot, rank in enumerate(RANKS):
        options = {"dtype": dtype, "reads": 0 if slot == 1 else -1, "has_biases": slot != 2}
        family.modules.set_all(slot, [(1, module(size, rank, "gelu", 10 * slot, **options))])
    family.modules.set_all(3, [(0, module(size, 3, "relu", 90, dtype=dtype))])
    return family


def run(family, bindings, y, read, form=FORM, depth=0.25) -> torch.Tensor:
    modules.add_modules(y, build_work_list(bindings), family.modules, 1, depth, {0: read}, form)
    return y


@pytest.mark.parametrize(("size", "dtype"), [(1, torch.float32), (77, torch.float32), (128, torch.float16)])
def test_modules_equal_float64(size, dtype):
    family = filled(dtype, size)
    y, read = randn(7, size, dtype=dtype), randn(7, size, dtype=dtype, seed=1)
    expected = modules_expected(y, BINDINGS, family.modules, 1, 0.25, {0: read})
    torch.testing.assert_close(run(family, BINDINGS, y, read).double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_also_of_large_and_small_numbers(activation):
    family = ApartFamily(0, 2, 1)
    family.modules.set_all(0, [(1, module(16, 4, activation, 5))])
    y = torch.cat([randn(2, 16), randn(1, 16) * 1e-4, randn(1, 16) * 300])
    bindings: list[Parts] = [((0, 1.0, 1.0),)] * 4
    expected = modules_expected(y, bindings, family.modules, 1, 0.25, {})
    found = run(family, bindings, y, y).double()
    torch.testing.assert_close(found[:3], expected[:3], rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(found[3], expected[3], rtol=1e-6, atol=3e-4)  # sums of sixteen numbers near 300


@pytest.mark.parametrize("num", [0, 4, 5], ids=["base", "another point", "strength 0"])
def test_rows_without_a_module_keep_their_bits(num):
    family = filled()
    y = randn(3, SIZE)
    y[1, 3], y[2, 4] = float("nan"), -0.0
    bindings = [BINDINGS[num]] * 3
    out = run(family, bindings, y.clone(), y)
    work = build_work_list(bindings)
    kept = modules.set_module_rows_aside(out, work, family.modules, 1)
    modules.put_module_rows_back(out, kept, work, family.modules, 1)
    assert torch.equal(out.view(torch.int32), y.view(torch.int32))


def test_a_row_has_the_same_bits_alone_and_in_company():
    family = filled()
    y, read = randn(7, SIZE), randn(7, SIZE, seed=1)
    together = run(family, BINDINGS, y.clone(), read)
    for row in (1, 2, 3):
        alone = run(family, BINDINGS[row : row + 1], y[row : row + 1].clone(), read[row : row + 1])
        assert torch.equal(alone[0], together[row])


def test_rows_with_a_module_are_set_aside_and_come_back():
    family = filled()
    y, work = randn(7, SIZE), build_work_list(BINDINGS)
    found, wanted = y.clone(), y.clone()
    kept = modules.set_module_rows_aside(found, work, family.modules, 1)
    with_module = [1, 2, 3, 6]
    assert not found[with_module].any()
    assert torch.equal(found[[0, 4, 5]], y[[0, 4, 5]])
    by_definition = apart_rows_reference.set_module_rows_aside(wanted, work, family.modules, 1)
    assert torch.equal(found, wanted)
    for rows, of_them, module_ in ((found, kept, modules), (wanted, by_definition, apart_rows_reference)):
        rows += 1.5
        module_.put_module_rows_back(rows, of_them, work, family.modules, 1)
    assert torch.equal(found, wanted)
    assert torch.equal(found, y + 1.5)


@pytest.mark.parametrize("num_rows", [0, 6])
def test_a_padded_list_gives_the_same_bits(num_rows):
    family = filled()
    bindings = BINDINGS[1 : num_rows + 1] + [()] * (7 - num_rows)
    y, read = randn(7, SIZE), randn(7, SIZE, seed=1)
    expected = run(family, bindings, y.clone(), read)
    layout = PaddedLayout(7)
    buffer = np.zeros(layout.size, dtype=np.int32)
    layout.fill(buffer, bindings)
    work = layout.work_list(torch.from_numpy(buffer))
    kept = modules.set_module_rows_aside(y, work, family.modules, 1)
    modules.put_module_rows_back(y, kept, work, family.modules, 1)
    modules.add_modules(y, work, family.modules, 1, 0.25, {0: read}, FORM)
    assert torch.equal(y, expected)


def test_the_operator_reaches_the_kernels_and_equals_the_definition():
    family = filled()
    y, read = randn(7, SIZE), randn(7, SIZE, seed=1)
    step = ApartRows(family, build_work_list(BINDINGS))
    found = []
    for backend in ("reference", "triton"):
        before = use_backend(backend)
        found.append(y.clone())
        module_rows(found[-1], step, 1, 0.5, {0: read})
        use_backend(before)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=3e-5)
    assert not torch.equal(found[1], y)


def test_what_is_not_given_or_does_not_fit_is_refused():
    family, work = filled(), build_work_list([BINDINGS[2]])
    for y, read, match in (
        (randn(1, SIZE), {}, "read"),
        (randn(1, SIZE), {0: randn(1, SIZE - 1)}, "not as y"),
        (randn(1, SIZE - 1), {0: randn(1, SIZE - 1)}, "76"),
        (randn(1, SIZE).half(), {0: randn(1, SIZE).half()}, "one dtype"),
    ):
        with pytest.raises(KernelError, match=match):
            modules.add_modules(y, work, family.modules, 1, 0.25, read)
