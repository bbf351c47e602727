"""Dense differences and residual modules as operators: against float64, at every depth, and with bad arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaserve_kernels import (
    ACTIVATIONS,
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
SHAPES = [(1, 1, 1), (33, 200, 9), (128, 17, 3), (250, 65, 33), (290, 40, 70)]  # inputs, outputs, rows of an item
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_differences_equal_float64(depth: float, dtype: torch.dtype, backend: str) -> None:
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
    dense_linear(y, x, step, MEMBERS, depth, backend=backend)
    torch.testing.assert_close(
        y.double(),
        wanted,
        atol=1e-4 if dtype is torch.float32 else 1e-2,
        rtol=1e-5 if dtype is torch.float32 else 2**-8,
    )
    for rows in (slice(60, 65), slice(69, 70)):  # a slot without terms, strength 0, nobody
        assert torch.equal(y[rows], before[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_modules_run_in_binding_order_and_equal_float64(dtype: torch.dtype, backend: str) -> None:
    family = filled(dtype)
    step = split_apart(RUNS, family)
    assert step is not None
    y, elsewhere = randn(ROWS, WIDTH, seed=3).to(dtype), randn(ROWS, WIDTH, seed=4).to(dtype)
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
        add_modules(y, step, point, 0.5, {0: elsewhere}, backend=backend)
        tolerance = {"atol": 2e-3, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 1e-2, "rtol": 2**-7}
        torch.testing.assert_close(y.double(), wanted, **tolerance)
    assert not torch.equal(y[:60], before[:60])
    assert torch.equal(y[60:65], before[60:65])
    untouched = y.clone()
    add_modules(y, step, 2, 0.5, {}, backend=backend)  # a point where nobody has a module
    assert torch.equal(y, untouched)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_torch(activation: str, backend: str) -> None:
    family, rank = ApartFamily(1, 1, 1), 41
    up_t = torch.zeros(rank, 64)
    up_t[torch.arange(rank), torch.arange(rank)] = 1.0
    entry = ModuleEntry(torch.zeros(rank, 64), up_t, 4 * randn(rank), None, activation)
    family.set_all(0, ApartEntries(modules=((0, entry),)))
    step = split_apart([(0, 1, ((0, 1.0, 1.0),))], family)
    assert step is not None
    assert entry.down_bias is not None
    y = torch.zeros(1, 64)
    add_modules(y, step, 0, 0.0, {}, backend=backend)
    wanted = ACTIVATIONS[activation](entry.down_bias.double())
    torch.testing.assert_close(y[0, :rank].double(), wanted, atol=1e-6, rtol=1e-6)
    assert not y[0, rank:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("inputs", "outputs", "rows"), [(1, 1, 1), (33, 200, 9), (128, 17, 3), (250, 65, 33), (290, 40, 70)]
)
def test_shapes_of_all_sorts_equal_the_definition(
    inputs: int, outputs: int, rows: int, dtype: torch.dtype, cpu_backend: str
) -> None:
    family = ApartFamily(2, 1, 3)
    for slot in range(3):
        dense = DenseEntry(inputs, delta=randn(outputs, inputs, seed=slot, dtype=dtype, scale=inputs**-0.5))
        bits = randn(outputs, inputs, seed=10 + slot) > 0
        signs = DenseEntry(inputs, signs=pack_bits(bits), scale=randn(outputs, seed=20 + slot, scale=inputs**-0.5))
        down = randn(19, inputs, seed=30 + slot, dtype=dtype, scale=inputs**-0.5)
        up_t = randn(19, inputs, seed=40 + slot, dtype=dtype, scale=0.25)
        module = ModuleEntry(down, up_t, randn(19), None if slot else randn(inputs), "silu")
        family.set_all(slot, ApartEntries(((0, dense), (1, signs)), ((0, module),)))
    runs: list[Run] = [
        (i * rows, rows, tuple((slot, 0.5, 1.0) for slot in slots)) for i, slots in enumerate(((0,), (1, 2), (2,)))
    ]
    step = split_apart(runs, family)
    assert step is not None
    wide = randn(3 * rows, inputs + 5, seed=1, dtype=dtype)  # rows of a wider matrix
    x, members = wide[:, 2 : inputs + 2], ((0, 1, 1 + outputs), (1, 1 + outputs, 1 + 2 * outputs))
    y = randn(3 * rows, 2 * outputs + 2, seed=2, dtype=dtype)
    found, wanted = y.clone(), y.clone()
    dense_linear(found, x, step, members, 0.5, backend=cpu_backend)
    dense_linear(wanted, x, step, members, 0.5, backend="reference")
    torch.testing.assert_close(found.float(), wanted.float(), atol=1e-4, rtol=0 if dtype is torch.float32 else 2**-7)
    assert torch.equal(found[:, [0, -1]], y[:, [0, -1]])
    changed, expected = wide.clone(), wide.clone()
    add_modules(changed[:, 2 : inputs + 2], step, 0, 0.5, {}, backend=cpu_backend)
    add_modules(expected[:, 2 : inputs + 2], step, 0, 0.5, {}, backend="reference")
    torch.testing.assert_close(
        changed.float(), expected.float(), atol=2e-4, rtol=1e-5 if dtype is torch.float32 else 2**-7
    )


def test_a_row_has_the_same_bits_in_any_company(backend: str) -> None:
    family = filled()
    x, y = randn(ROWS, WIDTH, seed=1), randn(ROWS, 54, seed=2)
    together = split_apart(RUNS, family)
    assert together is not None
    found, hidden = y.clone(), x.clone()
    dense_linear(found, x, together, MEMBERS, 0.5, backend=backend)
    add_modules(hidden, together, 3, 0.5, {0: x}, backend=backend)
    for row in (0, 39, 45, 66):
        parts = next(parts for start, count, parts in RUNS if start <= row < start + count)
        alone = split_apart([(0, 1, parts)], family)
        assert alone is not None
        single = y[row : row + 1].clone()
        dense_linear(single, x[row : row + 1], alone, MEMBERS, 0.5, backend=backend)
        assert torch.equal(single[0], found[row])
        if backend == "reference":  # BLAS may add a row's products in another order by its place among the rows
            continue
        single = x[row : row + 1].clone()
        add_modules(single, alone, 3, 0.5, {0: x[row : row + 1]}, backend=backend)
        assert torch.equal(single[0], hidden[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_of_an_adapter_have_the_bits_of_each_alone(dtype: torch.dtype, cpu_backend: str) -> None:
    """Every number of rows that tiles and blocks may leave over."""
    family = ApartFamily(2, 1, 1)
    dense = DenseEntry(70, delta=randn(37, 70, dtype=dtype))
    signs = DenseEntry(70, signs=pack_bits(randn(37, 70, seed=1) > 0), scale=randn(37, seed=2))
    module = ModuleEntry(randn(9, 70, dtype=dtype, scale=0.1), randn(9, 70, dtype=dtype), None, None, "tanh")
    family.set_all(0, ApartEntries(((0, dense), (1, signs)), ((0, module),)))
    x, y = randn(150, 70, seed=3, dtype=dtype), randn(150, 74, seed=4, dtype=dtype)
    members, parts = ((0, 0, 37), (1, 37, 74)), ((0, 1.0, 0.5),)

    def both(first: int, count: int) -> tuple[Tensor, Tensor]:
        step = split_apart([(0, count, parts)], family)
        assert step is not None
        found, hidden = y[first : first + count].clone(), x[first : first + count].clone()
        dense_linear(found, x[first : first + count], step, members, 0.5, backend=cpu_backend)
        add_modules(hidden, step, 0, 0.5, {}, backend=cpu_backend)
        return found, hidden

    wanted = both(0, 150)
    for first, count in ((0, 1), (149, 1), (40, 2), (7, 3), (90, 4), (1, 5), (60, 7), (3, 9), (100, 33), (20, 65)):
        for found, whole in zip(both(first, count), wanted, strict=True):
            assert torch.equal(found, whole[first : first + count]), (first, count)


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


def test_what_does_not_fit_is_refused_and_changes_nothing(any_backend: str) -> None:
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
        (DtypeMismatch, ApartEntries(dense=((0, DenseEntry(WIDTH, torch.ones(24, WIDTH).half())),))),
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
    for bad_y, bad_x in (
        (torch.zeros(ROWS, 54), torch.zeros(ROWS, 36)),
        (torch.zeros(ROWS, 53), torch.zeros(ROWS, WIDTH)),
        (torch.zeros(ROWS, 54).half(), torch.zeros(ROWS, WIDTH).half()),
    ):
        with pytest.raises(ValueError, match=r"\d|float"):
            dense_linear(bad_y, bad_x, step, MEMBERS, 0.0, backend=any_backend)
    hidden = torch.zeros(ROWS, WIDTH)
    for bad_y, point, read in (
        (torch.zeros(ROWS, 36), 1, {}),
        (hidden.half(), 1, {}),
        (hidden, 3, {}),
        (hidden, 3, {0: torch.zeros(ROWS, 36)}),
    ):
        with pytest.raises(ValueError, match=r"\d|float"):
            add_modules(bad_y, step, point, 0.0, read, backend=any_backend)
    assert not hidden.any()


def test_items_are_split_by_who_has_a_module() -> None:
    family = filled()
    family.set_all(3, ApartEntries(entries(40).dense))
    step = split_apart(RUNS, family)
    assert step is not None
    split = step.split_at(3)
    assert split.with_module is not None
    assert split.without is not None
    assert split.rows is not None
    assert (split.with_module.items, split.without.items) == (step.items[:2], step.items[2:])
    assert sorted(split.rows.tolist()) == [*range(60), *range(65, 69)]
    assert step.split_at(1) is split
    assert step.split_at(2) == (None, None, step)
    assert (step.reads(3, 0), step.reads(3, 1), step.reads(1, 0)) == (True, False, False)
