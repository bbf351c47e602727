"""Dense differences and residual modules as operators: against float64, at every depth, and with bad arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaserve_kernels import (
    ApartEntries,
    ApartFamily,
    DenseEntry,
    DtypeMismatch,
    ModuleEntry,
    OutOfRange,
    ShapeMismatch,
    add_modules,
    dense_linear,
    pack_bits,
    split_apart,
    unpack_bits,
)
from deltaserve_kernels.worklist import Run
from deltatest.kernel_cases import randn

ROWS, WIDTH = 70, 37
MEMBERS = ((0, 0, 24), (1, 24, 54))
# A prompt of more rows than a tile, two adapters on one row, a depth profile, a strength of 0, a row of nobody.
RUNS: list[Run] = [
    (0, 40, ((1, 1.0, 1.0),)),
    (40, 20, ((2, 0.5, 0.5), (1, -2.0, 1.0))),
    (60, 3, ((3, 1.0, 1.0),)),
    (63, 2, ((1, 0.0, 0.0),)),
    (65, 4, ((1, 1.0, 1.0),)),
]


def entries(seed: int, dtype: torch.dtype = torch.float32) -> ApartEntries:
    signs = pack_bits(randn(30, WIDTH, seed=seed) > 0)
    dense = DenseEntry(WIDTH, delta=randn(24, WIDTH, seed=seed + 1).to(dtype))
    packed = DenseEntry(WIDTH, signs=signs, scale=randn(30, seed=seed + 2).abs())
    module = ModuleEntry(
        randn(5, WIDTH, seed=seed + 3).to(dtype), randn(5, WIDTH, seed=seed + 4).to(dtype), None, None, "gelu"
    )
    reading = module._replace(down_bias=randn(5, seed=seed + 5), up_bias=randn(WIDTH, seed=seed + 6), reads=0)
    return ApartEntries(((0, dense), (1, packed)), ((1, module), (3, reading)))


def filled(dtype: torch.dtype = torch.float32) -> ApartFamily:
    family = ApartFamily(2, 4, 4)
    family.set_all(1, entries(10, dtype))
    family.set_all(2, entries(20, dtype))
    return family


def matrix(entry: DenseEntry) -> Tensor:
    if entry.delta is not None:
        return entry.delta.double()
    assert entry.signs is not None
    assert entry.scale is not None
    bits = [[entry.signs[i].tolist()[k // 32] >> k % 32 & 1 for k in range(WIDTH)] for i in range(len(entry.signs))]
    return (2 * torch.tensor(bits).double() - 1) * entry.scale.double()[:, None]


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_differences_equal_float64(depth: float, dtype: torch.dtype) -> None:
    family = filled(dtype)
    step = split_apart(RUNS, family)
    assert step is not None
    x, y = randn(ROWS, WIDTH, seed=1).to(dtype), randn(ROWS, 54, seed=2).to(dtype)
    wanted = y.double()
    for start, count, parts in RUNS:
        for slot, first, last in parts:
            for linear, left, right in MEMBERS:
                entry = family.dense.entry(linear, slot)
                if entry is not None:
                    rows = slice(start, start + count)
                    change = x[rows].double() @ matrix(entry).t()
                    wanted[rows, left:right] += (first + (last - first) * depth) * change
    before = y.clone()
    dense_linear(y, x, step, MEMBERS, depth)
    torch.testing.assert_close(
        y.double(),
        wanted,
        atol=1e-4 if dtype is torch.float32 else 1e-2,
        rtol=1e-5 if dtype is torch.float32 else 2**-8,
    )
    for rows in (slice(60, 65), slice(69, 70)):  # a slot without terms, strength 0, nobody
        assert torch.equal(y[rows], before[rows])


def test_modules_run_in_binding_order_and_equal_float64() -> None:
    family = filled()
    step = split_apart(RUNS, family)
    assert step is not None
    y, elsewhere = randn(ROWS, WIDTH, seed=3), randn(ROWS, WIDTH, seed=4)
    before = y.clone()
    for point in (1, 3):
        wanted = y.double()
        for start, count, parts in RUNS:
            rows = slice(start, start + count)
            for slot, first, last in parts:
                entry = family.modules.entry(point, slot)
                if entry is None:
                    continue
                x = wanted[rows] if entry.reads < 0 else elsewhere[rows].double()
                middle = x @ entry.down.double().t() + (0 if entry.down_bias is None else entry.down_bias)
                out = torch.nn.functional.gelu(middle) @ entry.up_t.double()
                wanted[rows] += (first + (last - first) * 0.5) * (out + (0 if entry.up_bias is None else entry.up_bias))
        read = {(0, i): elsewhere[item.rows] for i, item in enumerate(step.items)}
        add_modules(y, step, point, 0.5, read)
        torch.testing.assert_close(y.double(), wanted, atol=2e-3, rtol=1e-4)
    assert not torch.equal(y[:60], before[:60])
    assert torch.equal(y[60:65], before[60:65])
    untouched = y.clone()
    add_modules(y, step, 2, 0.5, {})  # a point where nobody has a module
    assert torch.equal(y, untouched)


def test_a_row_has_the_same_bits_in_any_company() -> None:
    family = filled()
    x, y = randn(ROWS, WIDTH, seed=1), randn(ROWS, 54, seed=2)
    together = split_apart(RUNS, family)
    assert together is not None
    found = y.clone()
    dense_linear(found, x, together, MEMBERS, 0.5)
    for row in (0, 39, 45, 66):
        parts = next(parts for start, count, parts in RUNS if start <= row < start + count)
        alone = split_apart([(0, 1, parts)], family)
        assert alone is not None
        single = y[row : row + 1].clone()
        dense_linear(single, x[row : row + 1], alone, MEMBERS, 0.5)
        assert torch.equal(single[0], found[row])


def test_rows_of_a_binding_are_one_item_and_rows_without_terms_none() -> None:
    family = filled()
    step = split_apart(RUNS, family)
    assert step is not None
    assert [item.rows.tolist() for item in step.items] == [[*range(40), *range(65, 69)], list(range(40, 60))]
    assert [item.parts for item in step.items] == [RUNS[0][2], RUNS[1][2]]
    assert split_apart(RUNS[2:4], family) is None
    family.clear(1)
    family.clear(2)
    assert family.is_empty
    assert split_apart(RUNS, family) is None
    assert family.dense.entry(0, 1) is None
    assert family.modules.entry(1, 1) is None


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 100])
def test_bits_are_packed_as_the_format_says(columns: int) -> None:
    bits = randn(5, columns, seed=columns) > 0
    words = pack_bits(bits)
    assert words.shape == (5, -(-columns // 32))
    assert torch.equal(unpack_bits(words, columns).bool(), bits)
    for row, of_row in zip(bits, words.tolist(), strict=True):
        assert [of_row[k // 32] >> k % 32 & 1 for k in range(columns)] == row.int().tolist()


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    family = filled()
    good = entries(30)
    dense, module = good.dense[0][1], good.modules[0][1]
    wrong: list[tuple[type[ValueError], ApartEntries]] = [
        (OutOfRange, ApartEntries(dense=((2, dense),))),
        (OutOfRange, ApartEntries(dense=((0, dense), (0, dense)))),
        (ShapeMismatch, ApartEntries(dense=((1, dense),))),
        (ShapeMismatch, ApartEntries(dense=((0, DenseEntry(WIDTH)),))),
        (ShapeMismatch, ApartEntries(dense=((0, dense._replace(in_features=36)),))),
        (ShapeMismatch, ApartEntries(dense=((0, good.dense[1][1]._replace(scale=torch.ones(29))),))),
        (DtypeMismatch, ApartEntries(dense=((0, DenseEntry(WIDTH, torch.ones(24, WIDTH).double())),))),
        (OutOfRange, ApartEntries(modules=((4, module),))),
        (OutOfRange, ApartEntries(modules=((1, module._replace(activation="mish")),))),
        (OutOfRange, ApartEntries(modules=((1, module._replace(reads=9)),))),
        (ShapeMismatch, ApartEntries(modules=((1, module._replace(up_t=torch.ones(4, WIDTH))),))),
        (ShapeMismatch, ApartEntries(modules=((1, module._replace(up_bias=torch.ones(5))),))),
        (DtypeMismatch, ApartEntries(modules=((1, module._replace(down=module.down.bfloat16())),))),
    ]
    for error, given in wrong:
        with pytest.raises(error):
            family.set_all(0, given)
        assert family.dense.entry(0, 0) is None
        assert family.modules.entry(1, 0) is None
    step = split_apart(RUNS, family)
    assert step is not None
    with pytest.raises(ShapeMismatch):
        dense_linear(torch.zeros(ROWS, 54), torch.zeros(ROWS, 36), step, MEMBERS, 0.0)
    with pytest.raises(ShapeMismatch):
        add_modules(torch.zeros(ROWS, 36), step, 1, 0.0, {})
