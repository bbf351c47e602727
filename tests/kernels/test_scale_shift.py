"""scale_shift against float64, the C++ operator against the definition to the bit, and the split of a step's rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaserve_kernels import (
    DtypeMismatch,
    OutOfRange,
    ShapeMismatch,
    VectorEntries,
    VectorEntry,
    VectorFamily,
    VectorTables,
    build_work_list,
    scale_shift,
    split_runs,
)
from deltatest.block_cases import afloat
from deltatest.kernel_cases import Parts, randn

NAN = float("nan")
MEMBERS = [(0, 0, 24), (2, 24, 37)]
BINDINGS: list[Parts] = [
    ((0, 1.0, 3.0),),
    (),
    ((1, -1.0, 1.0), (0, 0.5, 0.5), (3, 2.0, 1.0)),
    ((1, 1.0, 1.0),),
    ((2, 1.0, 1.0),),
] * 9
Given = dict[tuple[int, int], tuple[Tensor | None, Tensor | None]]


def filled() -> tuple[VectorTables, Given]:
    """Slot 0 has scales and biases of both members, slot 1 of one, slot 3 a bias of that one, slot 2 nothing; seas of
    NaN around."""
    tables, given = VectorTables(3, 4), {}
    for linear, start, stop in MEMBERS:
        scale = afloat(1 + randn(stop - start, seed=linear, scale=0.3), NAN)
        given[linear, 0] = scale, afloat(randn(stop - start, seed=linear + 10), NAN)
    given[2, 1] = afloat(1 + randn(13, seed=21, scale=0.3), NAN), afloat(randn(13, seed=20), NAN)
    given[2, 3] = None, afloat(randn(13, seed=22), NAN)
    for (linear, slot), (scale, bias) in given.items():
        tables.set(linear, slot, scale, bias)
    return tables, given


def expected(y: Tensor, given: Given, depth: float, gain: Tensor | None = None, unit: float = 1.0) -> Tensor:
    out = y.double()
    for row, parts in enumerate(BINDINGS[: len(y)]):
        for linear, start, stop in MEMBERS if gain is None else MEMBERS[:1]:
            factor = torch.ones(stop - start).double() if gain is None else gain.double()
            shift, has_any = torch.zeros(stop - start).double(), False
            for slot, first, last in parts:
                scale, bias = given.get((linear, slot), (None, None))
                at = first + (last - first) * depth
                has_any = has_any or scale is not None or bias is not None
                factor = factor if scale is None else factor + at * (scale.double() - unit)
                shift = shift if bias is None else shift + at * bias.double()
            if has_any:
                out[row, start:stop] = out[row, start:stop] * factor + shift
    return out


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vectors_in_bfloat16_give_the_bits_of_the_same_numbers_in_fp32(dtype: torch.dtype, backend: str) -> None:
    wide, narrow = VectorTables(3, 4), VectorTables(3, 4, takes_narrow=True)
    for (linear, slot), vectors in filled()[1].items():
        rounded = [None if vector is None else vector.bfloat16() for vector in vectors]
        narrow.set(linear, slot, *(None if vector is None else afloat(vector, NAN) for vector in rounded))
        wide.set(linear, slot, *(None if vector is None else vector.float() for vector in rounded))
    y = randn(len(BINDINGS), 37, dtype=dtype, seed=1)
    found, wanted = y.clone(), y.clone()
    scale_shift(found, build_work_list(BINDINGS), narrow, MEMBERS, 0.25, backend=backend)
    scale_shift(wanted, build_work_list(BINDINGS), wide, MEMBERS, 0.25, backend="reference")
    assert torch.equal(found, wanted)
    assert not torch.equal(found, y)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_and_biases_against_float64(dtype: torch.dtype, backend: str) -> None:
    tables, given = filled()
    wide = randn(len(BINDINGS), 45, dtype=dtype, seed=1)
    y = wide.clone()[:, 3:40]
    scale_shift(y, build_work_list(BINDINGS), tables, MEMBERS, 0.25, backend=backend)
    wanted = expected(wide[:, 3:40], given, 0.25)
    tolerance = {"rtol": 0.0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-3}
    torch.testing.assert_close(y.double(), wanted, **tolerance)
    for row in (1, 4, 6, 9):
        assert torch.equal(y[row], wide[row, 3:40]), "a row without vectors changed"
    assert torch.equal(y[3, :24], wide[3, 3:27]), "a member without vectors changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fast_operator_has_the_bits_of_the_definition(dtype: torch.dtype) -> None:
    tables, _ = filled()
    y = randn(len(BINDINGS), 37, dtype=dtype, seed=1)
    work, found = build_work_list(BINDINGS), {}
    for backend in ("reference", "cpu"):
        found[backend] = y.clone()
        scale_shift(found[backend], work, tables, MEMBERS, 0.25, backend=backend)
    assert torch.equal(found["reference"], found["cpu"])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_differences_start_from_gain_and_shift(backend: str) -> None:
    tables, given = filled()
    gain, y = 1 + randn(24, seed=3), randn(len(BINDINGS), 24, seed=1)
    out = y.clone()
    scale_shift(out, build_work_list(BINDINGS), tables, MEMBERS[:1], 0.5, gain=gain, unit=0.0, backend=backend)
    torch.testing.assert_close(out.double(), expected(y, given, 0.5, gain, 0.0), rtol=0, atol=1e-5)
    with pytest.raises((ShapeMismatch, ValueError), match="gain"):
        scale_shift(out, build_work_list(BINDINGS), tables, MEMBERS[:1], gain=gain[1:], backend=backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_arguments_that_do_not_fit_are_refused(backend: str) -> None:
    tables, _ = filled()
    work, y = build_work_list(BINDINGS), randn(len(BINDINGS), 37)
    for bad in ([(0, 0, 23)], [(0, 30, 54)]):
        with pytest.raises(ValueError, match="columns"):
            scale_shift(y, work, tables, bad, backend=backend)
    with pytest.raises(ValueError, match=r"rows|T = 45"):
        scale_shift(y[1:], work, tables, MEMBERS, backend=backend)
    far = build_work_list([((9, 1.0, 1.0),)] * len(BINDINGS))
    with pytest.raises(OutOfRange if backend == "reference" else ValueError, match="slot"):
        scale_shift(y, far, tables, MEMBERS, backend=backend)
    with pytest.raises(DtypeMismatch if backend == "reference" else ValueError, match=r"float64|Double"):
        scale_shift(y.double(), work, tables, MEMBERS, backend=backend)


def test_a_step_is_split_by_who_has_vectors() -> None:
    family = VectorFamily(2, 1, 4)
    family.set_all(
        1, VectorEntries(outputs=((0, VectorEntry(torch.ones(8))),), norms=((0, VectorEntry(torch.ones(8))),))
    )
    family.set_all(3, VectorEntries(inputs=((1, VectorEntry(torch.ones(8))),)))
    plain, first, second = ((0, 1.0, 1.0),), ((1, 1.0, 1.0),), ((0, 1.0, 1.0), (3, 0.5, 0.5))
    runs = [(7, 2, first), (0, 2, plain), (3, 1, first), (4, 3, second)]
    step = split_runs(runs, 10, family)
    assert step is not None
    assert step.rows.tolist() == [3, 7, 8, 4, 5, 6]
    assert step.compact.rows.tolist() == list(range(6))
    assert step.compact.part_slot.tolist() == step.work.part_slot.tolist() == [1, 0, 3]
    assert step.others is not None
    assert step.others.rows.tolist() == [0, 1]
    found = step.rows_with(family.norms, 0)
    assert found is not None
    assert found.tolist() == [0, 1, 2]
    assert split_runs([(0, 2, plain)], 10, family) is None
    family.clear(1)
    family.clear(3)
    assert family.is_empty
    assert split_runs(runs, 10, family) is None
