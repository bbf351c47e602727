"""Products that turn their members' inputs on the way: the bits of the operators one by one, whoever is in the step."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch import Tensor

from deltaserve_kernels import (
    DtypeMismatch,
    RotationFactor,
    RotationTables,
    ShapeMismatch,
    VectorTables,
    build_work_list,
    cpu,
    rotate_blocks,
    scale_shift,
)
from deltaserve_kernels.cpu.packed_terms import group_terms, packed_linear_terms
from deltatest.kernel_cases import Parts, randn

DTYPES = [torch.bfloat16, torch.float16]
DEPTH, WIDTH, INPUTS = 0.25, 208, 108
MEMBERS = [(0, 0, 48), (1, 64, 80), (2, 96, 208)]  # columns of no member between them
BINDINGS: list[Parts] = [
    (),
    ((0, 1.0, 3.0),),
    ((1, -1.0, 1.0), (0, 0.5, 0.5)),
    ((1, 1.0, 1.0),),
    ((2, 1.0, 1.0),),
    ((0, 0.0, 0.0),),
] * 6 + [((1, 1.0, 0.5),)] * 7


class Case:
    """Slot 0 turns two members and scales one of them, slot 1 turns and scales others, slot 2 has a scale alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        def factor(count: int, size: int, seed: int, *, has_order: bool = False) -> RotationFactor:
            blocks = randn(count, size, size, dtype=dtype, seed=seed, scale=0.3 * size**-0.5)
            generator = torch.Generator().manual_seed(seed)
            return RotationFactor(blocks, torch.randperm(INPUTS, generator=generator).int() if has_order else None)

        self.rotations, self.inputs = RotationTables(3, 3), VectorTables(3, 3)
        pairs, eights = factor(54, 2, 1), (factor(27, 4, 2), factor(27, 4, 3, has_order=True))
        large, shared = factor(3, 36, 4), factor(1, 18, 5, has_order=True)
        self.rotations.set_all(0, [(0, (pairs,)), (2, eights)])
        self.rotations.set_all(1, [(1, (large,)), (2, (large, shared))])
        for slot, linear in ((0, 2), (1, 0), (1, 1), (2, 1)):
            self.inputs.set(linear, slot, 1 + randn(INPUTS, seed=9 * slot + linear, scale=0.3))
        self.packed = cpu.pack_weight(randn(WIDTH, INPUTS, dtype=dtype, seed=4))

    def product(self, x: Tensor, bindings: list[Parts], *, has_scales: bool = True, is_turned: bool = True) -> Tensor:
        work = build_work_list(bindings)
        columns, inputs = list(chain.from_iterable(MEMBERS)), self.inputs if has_scales else None
        terms = group_terms(
            self.packed,
            WIDTH,
            len(x),
            columns,
            DEPTH,
            ins=None if inputs is None else cpu.changes(inputs, work),
            turning=(work, self.rotations) if is_turned else None,
        )
        return packed_linear_terms(x, self.packed, None, terms)

    def one_by_one(self, x: Tensor, bindings: list[Parts], *, has_scales: bool, backend: str) -> Tensor:
        work, y = build_work_list(bindings), cpu.packed_linear(x, self.packed, WIDTH, None)
        for linear, start, stop in MEMBERS:
            fed, whole = x.clone(), ((linear, 0, INPUTS),)
            if has_scales:
                scale_shift(fed, work, self.inputs, whole, DEPTH, backend=backend)
            rotate_blocks(fed, x, work, self.rotations, whole, DEPTH, backend=backend)
            y[:, start:stop] = cpu.packed_linear(fed, self.packed, WIDTH, None)[:, start:stop]
        return y


@pytest.mark.parametrize("has_scales", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_have_the_bits_of_the_operators(dtype: torch.dtype, has_scales: bool, cpu_backend: str) -> None:
    case, x = Case(dtype), randn(len(BINDINGS), 2 * INPUTS, dtype=dtype, seed=1)[:, INPUTS:]  # rows of a wider tensor
    found = case.product(x, BINDINGS, has_scales=has_scales)
    assert torch.equal(found, case.one_by_one(x, BINDINGS, has_scales=has_scales, backend="cpu"))
    wanted = case.one_by_one(x, BINDINGS, has_scales=has_scales, backend="reference")
    torch.testing.assert_close(found.float(), wanted.float(), rtol=2**-7, atol=0.05)
    plain = cpu.packed_linear(x, case.packed, WIDTH, None)
    for row, parts in enumerate(BINDINGS):
        is_base = not any(any(part[1:]) for part in parts)
        if is_base or (parts[0][0] == 2 and not has_scales):
            assert torch.equal(found[row], plain[row]), row
        else:
            assert not torch.equal(found[row], plain[row]), row
        assert torch.equal(found[row, 48:64], plain[row, 48:64]), "columns of no member changed"


@pytest.mark.parametrize("dtype", DTYPES)
def test_company_is_not_felt(dtype: torch.dtype, cpu_backend: str) -> None:
    case, x = Case(dtype), randn(len(BINDINGS), INPUTS, dtype=dtype, seed=1)
    together = case.product(x, BINDINGS)
    for row in (0, 1, 2, 3, 4, 5, 13, 36, 38, 42):
        assert torch.equal(case.product(x[row : row + 1], BINDINGS[row : row + 1])[0], together[row]), row
    assert torch.equal(case.product(x[30:], BINDINGS[30:]), together[30:])


def test_what_does_not_fit_is_named(cpu_backend: str) -> None:
    case, x = Case(torch.bfloat16), randn(len(BINDINGS), INPUTS, dtype=torch.bfloat16)
    for tables, words in (
        (RotationTables(2, 3), "linear 2 is not in"),
        (RotationTables(3, 2), "slot 2 is not in 0..1"),
    ):
        case.rotations = tables
        with pytest.raises(ValueError, match=words):
            case.product(x, BINDINGS)
    for factors, words in (
        ((RotationFactor(randn(26, 4, 4, dtype=torch.bfloat16)),), "rotations of 104 columns; 108 are needed"),
        ((RotationFactor(randn(1, 5, 5, dtype=torch.bfloat16)),), "do not cut 108 columns"),
    ):
        case.rotations = RotationTables(3, 3)
        case.rotations.set_all(1, [(1, factors)])
        with pytest.raises(ValueError, match=words):
            case.product(x, BINDINGS)
    case.rotations = RotationTables(3, 3)
    case.rotations.set_all(1, [(1, (RotationFactor(randn(27, 4, 4)),))])
    with pytest.raises(DtypeMismatch):
        case.product(x, BINDINGS)
    case = Case(torch.bfloat16)
    with pytest.raises(ShapeMismatch, match="work list is of 5"):
        case.product(x, BINDINGS[:5], has_scales=False)
