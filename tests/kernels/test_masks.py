"""Masks over the base's weights as operators: against float64, in every form of the weight, and with bad arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaserve_kernels import (
    ApartEntries,
    ApartFamily,
    ApartStep,
    DenseEntry,
    DtypeMismatch,
    ShapeMismatch,
    WeightView,
    cpu,
    dense_linear,
    pack_bits,
    split_apart,
)
from deltaserve_kernels.worklist import Run
from deltatest.apart_cases import packed
from deltatest.kernel_cases import Parts, randn
from deltatest.mask_cases import expected, filled, in_panels, mask, weight_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Two adapters on one row, a mask beside a matrix and signs, an empty slot, a strength of 0, a row of nobody.
PARTS: list[Parts] = [
    ((0, 1.0, 0.5),), ((1, 0.5, 2.0), (0, -1.0, 1.0)), ((2, 1.0, 1.0), (1, 1.0, 1.0)), ((3, 1.0, 1.0),),
    ((0, 0.0, 0.0),), (),
]  # fmt: skip
UNTOUCHED = (3, 4, 5)


def steps_of(bindings: list[Parts], family: ApartFamily) -> ApartStep:
    runs: list[Run] = [(row, 1, parts) for row, parts in enumerate(bindings)]
    step = split_apart(runs, family)
    assert step is not None
    return step


def forms(view: WeightView) -> list[WeightView]:
    return [view] if view.data.dtype is torch.float32 or not cpu.is_available() else [view, in_panels(view)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_equal_float64_in_any_form_of_the_weight(dtype: torch.dtype, any_backend: str) -> None:
    family, members = filled((24, 30, 9), 37, first=3, dtype=dtype)
    x, y = randn(len(PARTS), 37, seed=1).to(dtype), randn(len(PARTS), 70, seed=2).to(dtype)
    weight = weight_of(70, 37, dtype)
    wanted = expected(y, x, PARTS, family, members, 0.25, weight.data)
    for view in forms(weight):
        found = y.clone()
        dense_linear(found, x, steps_of(PARTS, family), members, 0.25, lambda: view, backend=any_backend)  # noqa: B023
        tolerance = {"atol": 1e-4, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 2e-2, "rtol": 2**-7}
        torch.testing.assert_close(found.double(), wanted, **tolerance)
        for row in UNTOUCHED:
            assert torch.equal(found[row], y[row])
        assert torch.equal(found[:, :3], y[:, :3])
        assert torch.equal(found[:, 66:], y[:, 66:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("inputs", "widths", "first", "rows"),
    [(1, (1,), 3, 1), (33, (7, 40), 5, 9), (300, (64, 33), 0, 40), (77, (20, 16), 16, 4), (64, (96,), 0, 2)],
)
def test_shapes_of_all_sorts_equal_the_definition(
    inputs: int, widths: tuple[int, ...], first: int, rows: int, dtype: torch.dtype, cpu_backend: str
) -> None:
    family, members = filled(widths, inputs, first, dtype)
    bindings = [parts for parts in PARTS[:3] for _ in range(rows)]
    step = steps_of(bindings, family)
    total = members[-1][2] + 2
    wide = randn(3 * rows, inputs + 3, seed=1, dtype=dtype, scale=inputs**-0.5)  # rows of a wider matrix
    x, y = wide[:, 1 : inputs + 1], randn(3 * rows, total, seed=2, dtype=dtype)
    weight = weight_of(total, inputs, dtype)
    wanted = y.clone()
    dense_linear(wanted, x, step, members, 0.5, lambda: weight, backend="reference")
    for view in forms(weight):
        found = y.clone()
        dense_linear(found, x, step, members, 0.5, lambda: view, backend=cpu_backend)  # noqa: B023
        torch.testing.assert_close(
            found.float(), wanted.float(), atol=1e-4, rtol=0 if dtype is torch.float32 else 2**-7
        )
        assert torch.equal(found[:, [*range(first), -2, -1]], y[:, [*range(first), -2, -1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_of_an_adapter_have_the_bits_of_each_alone(dtype: torch.dtype, cpu_backend: str) -> None:
    """Every number of rows that tiles and blocks may leave over, in the company of another adapter."""
    family, members = filled((37, 24), 290, 5, dtype)
    x, y = randn(70, 290, seed=3, dtype=dtype), randn(70, 66, seed=4, dtype=dtype)
    for view in forms(weight_of(66, 290, dtype)):

        def some(first: int, count: int, view: WeightView = view) -> Tensor:
            runs: list[Run] = [(0, count, PARTS[1]), (count, 1, PARTS[0])]
            step = split_apart(runs, family)
            assert step is not None
            given = torch.cat([x[first : first + count], x[:1]])
            found = torch.cat([y[first : first + count], y[:1]])
            dense_linear(found, given, step, members, 0.5, lambda: view, backend=cpu_backend)
            return found[:count]

        wanted = some(0, 70)
        for first, count in ((0, 1), (69, 1), (40, 2), (7, 3), (30, 4), (1, 5), (60, 8), (3, 9), (10, 17), (20, 33)):
            assert torch.equal(some(first, count), wanted[first : first + count]), (first, count)


def test_bits_past_the_last_input_meet_no_weight(any_backend: str) -> None:
    family, members = filled((20,), 37)
    of_mask = family.dense.entry(0, 0)
    assert of_mask is not None
    assert of_mask.mask is not None
    x, y, weight = randn(1, 37), randn(1, 20, seed=1), weight_of(20, 37)
    found = []
    for entry in (of_mask, of_mask._replace(mask=of_mask.mask | torch.tensor([0, -1 << 5], dtype=torch.int32))):
        family.set_all(0, ApartEntries(((0, entry),)))
        found.append(y.clone())
        step = steps_of([PARTS[0]], family)
        dense_linear(found[-1], x, step, members, 0.0, lambda: weight, backend=any_backend)
    assert torch.equal(*found)


def test_the_weight_is_asked_for_only_where_a_row_has_a_mask() -> None:
    family, members = filled((24, 30), 37)
    family.set_all(3, ApartEntries(((1, packed(30, 37, 5)),)))
    weight, asked = weight_of(54, 37), []

    def give() -> WeightView:
        asked.append(1)
        return weight

    x, y = randn(1, 37), randn(1, 54, seed=1)
    dense_linear(y, x, steps_of([((3, 1.0, 1.0),)], family), members, 0.0, give)
    dense_linear(y, x, steps_of([((2, 1.0, 1.0),)], family), members, 0.0, give)
    assert not asked
    dense_linear(y, x, steps_of([((0, 1.0, 1.0),)], family), members, 0.0, give)
    assert len(asked) == 1
    assert family.dense.has_masks
    family.set_all(0, ApartEntries(((0, packed(24, 37, 6)),)))
    assert not family.dense.has_mask(members[:1], (0,))
    family.clear(0)
    family.clear(1)
    assert not family.dense.has_masks


def test_what_does_not_fit_is_refused(any_backend: str) -> None:
    family, members = filled((24, 30), 37)
    good, signs = mask(24, 37, 1), packed(24, 37, 1)
    assert good.mask is not None
    wrong: list[tuple[type[ValueError], DenseEntry]] = [
        (ShapeMismatch, good._replace(in_features=65)),
        (ShapeMismatch, good._replace(delta=torch.zeros(24, 37))),
        (ShapeMismatch, good._replace(signs=signs.signs, scale=signs.scale)),
        (ShapeMismatch, good._replace(mask=pack_bits(torch.ones(23, 37) > 0))),
        (DtypeMismatch, good._replace(mask=good.mask.long())),
    ]
    for error, entry in wrong:
        with pytest.raises(error):
            family.set_all(3, ApartEntries(((0, entry),)))
        assert family.dense.entry(0, 3) is None
    with pytest.raises(ShapeMismatch, match="give the base's weight"):
        good.rows(0, 1)
    step, x, y = steps_of([PARTS[0]], family), torch.zeros(1, 37), torch.zeros(1, 54)
    with pytest.raises(ShapeMismatch, match="reads the base's weight"):
        dense_linear(y, x, step, members, 0.0, backend=any_backend)
    if any_backend == "cpu":
        for bad in (
            torch.zeros(54, 36),
            torch.zeros(53, 37),
            torch.zeros(54, 37).half(),
            torch.zeros(74, 54)[::2, :37],
        ):
            with pytest.raises(ValueError, match="the weight is"):
                dense_linear(y, x, step, members, 0.0, lambda: WeightView(bad, 54), backend="cpu")  # noqa: B023
        with pytest.raises(ValueError, match="the weight is"):
            dense_linear(y, x, step, members, 0.0, lambda: WeightView(torch.zeros(4, 37, 16), 54), backend="cpu")
    assert not y.any()
