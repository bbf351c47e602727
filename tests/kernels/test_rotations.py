"""rotate_blocks against dense matrices in float64; who is in the step; what tables refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaserve_kernels import (
    DtypeMismatch,
    OutOfRange,
    RotationFactor,
    RotationTables,
    ShapeMismatch,
    VectorEntries,
    VectorFamily,
    build_work_list,
    cpu,
    rotate_blocks,
)
from deltatest.kernel_cases import Parts, randn

MEMBERS = [(0, 0, 24), (2, 24, 36)]
BINDINGS: list[Parts] = [((0, 1.0, 3.0),), (), ((1, -1.0, 1.0), (0, 0.5, 0.5)), ((1, 1.0, 1.0),), ((2, 1.0, 1.0),)] * 9


def shuffled(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).int()


def entries(dtype: torch.dtype) -> dict[tuple[int, int], tuple[RotationFactor, ...]]:
    """Slot 0 turns both members, slot 1 one of them by two factors; slot 2 nothing."""
    return {
        (0, 0): (RotationFactor(randn(6, 4, 4, dtype=dtype, seed=1, scale=0.3)),),
        (2, 0): (RotationFactor(randn(1, 3, 3, dtype=dtype, seed=2, scale=0.3)),),
        (2, 1): (
            RotationFactor(randn(6, 2, 2, dtype=dtype, seed=3, scale=0.3), shuffled(12, 3)),
            RotationFactor(randn(1, 6, 6, dtype=dtype, seed=4, scale=0.3), shuffled(12, 4)),
        ),
    }


def filled(dtype: torch.dtype) -> RotationTables:
    tables = RotationTables(3, 4)
    for slot in (0, 1):
        tables.set_all(slot, [(linear, given) for (linear, at), given in entries(dtype).items() if at == slot])
    return tables


def dense(factors: tuple[RotationFactor, ...], width: int) -> Tensor:
    """The whole matrix of a rotation, for row vectors, float64."""
    whole = torch.eye(width).double()
    for blocks, order in factors:
        size = blocks.shape[1]
        matrix = torch.block_diag(*blocks.double().expand(width // size, -1, -1)) + torch.eye(width).double()
        taken = torch.eye(width).double() if order is None else torch.eye(width).double()[:, order.long()]
        whole = whole @ taken @ matrix @ taken.t()
    return whole


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotations_against_dense_matrices(dtype: torch.dtype, backend: str) -> None:
    given = entries(dtype)
    wide = randn(len(BINDINGS), 40, dtype=dtype, seed=7)
    before, x = wide[:, 4:].clone(), randn(len(BINDINGS), 40, dtype=dtype, seed=8)[:, 4:]
    y = wide[:, 4:]  # a view: rows are not next to each other
    rotate_blocks(y, x, build_work_list(BINDINGS), filled(dtype), MEMBERS, 0.25, backend=backend)
    wanted = before.double()
    for row, parts in enumerate(BINDINGS):
        for linear, start, stop in MEMBERS:
            for slot, first, last in parts:
                if (linear, slot) in given:
                    matrix = dense(given[linear, slot], stop - start) - torch.eye(stop - start).double()
                    wanted[row, start:stop] += (first + (last - first) * 0.25) * x[row, start:stop].double() @ matrix
    tolerance = {"rtol": 0.0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-3}
    torch.testing.assert_close(y.double(), wanted, **tolerance)
    if backend == "cpu":
        in_place = x.clone()
        whole = in_place.clone()
        cpu.rotate_blocks(whole, x, build_work_list(BINDINGS), filled(dtype), MEMBERS, 0.25)
        cpu.rotate_blocks(in_place, in_place, build_work_list(BINDINGS), filled(dtype), MEMBERS, 0.25)
        assert torch.equal(in_place, whole), "y may be x itself"
    for row in (1, 4, 6, 9):
        assert torch.equal(y[row], before[row]), "a row without a rotation changed"
    assert torch.equal(y[3, :24], before[3, :24]), "a member without a rotation changed"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_company_is_not_felt_and_strength_0_changes_no_bit(dtype: torch.dtype, backend: str) -> None:
    tables, x = filled(dtype), randn(len(BINDINGS), 36, dtype=dtype, seed=8)
    together = x.clone()
    rotate_blocks(together, x, build_work_list(BINDINGS), tables, MEMBERS, 0.25, backend=backend)
    for row in (0, 2, 3, 37):
        alone = x[row : row + 1].clone()
        rotate_blocks(alone, x[row : row + 1], build_work_list([BINDINGS[row]]), tables, MEMBERS, 0.25, backend=backend)
        assert torch.equal(alone[0], together[row])
    # Not even where the rotation is beyond all numbers.
    tables.set_all(3, [(0, (RotationFactor(torch.full((6, 4, 4), 1e38, dtype=torch.float32).to(dtype) * 10),))])
    still = x.clone()
    rotate_blocks(
        still, x, build_work_list([((3, 0.0, 0.0), (0, 0.0, 0.0))] * len(x)), tables, MEMBERS, backend=backend
    )
    assert torch.equal(still, x)


def test_a_small_rotation_is_not_lost_in_16_bits() -> None:
    """Blocks hold the difference: beside the identity, 1e-4 would be half a rounding of bfloat16."""
    blocks = (1e-4 * randn(4, 4, 4, seed=1)).bfloat16()
    tables = RotationTables(1, 1)
    tables.set_all(0, [(0, (RotationFactor(blocks),))])
    x = randn(3, 16, seed=2).bfloat16()
    change = torch.zeros(3, 16, dtype=torch.bfloat16)
    rotate_blocks(change, x, build_work_list([((0, 1.0, 1.0),)] * 3), tables, [(0, 0, 16)])
    wanted = (x.view(3, 4, 1, 4).double() @ blocks.double()).view(3, 16)
    torch.testing.assert_close(change.double(), wanted, rtol=2**-7, atol=1e-7)


def test_tables_refuse_what_does_not_fit_and_let_go() -> None:
    tables = filled(torch.float32)
    for bad, error in (
        (RotationFactor(randn(6, 4, 5)), ShapeMismatch),
        (RotationFactor(randn(5, 4, 4)), ShapeMismatch),
        (RotationFactor(randn(6, 4, 4).double()), DtypeMismatch),
        (RotationFactor(randn(6, 4, 4).bfloat16()), DtypeMismatch),
        (RotationFactor(randn(6, 4, 4), shuffled(24, 0).long()), DtypeMismatch),
        (RotationFactor(randn(5, 4, 4), shuffled(24, 0)), OutOfRange),
        (RotationFactor(randn(1, 5, 5), shuffled(24, 0)), OutOfRange),
    ):
        with pytest.raises(error):
            tables.set_all(2, [(0, (bad,))])
        assert not tables.has_slot(2)
    with pytest.raises(ShapeMismatch, match="one width"):
        tables.set_all(2, [(1, (RotationFactor(randn(6, 4, 4)), RotationFactor(randn(5, 4, 4))))])
    with pytest.raises(ShapeMismatch, match="factors"):
        tables.set_all(2, [(0, ())])
    tables.set_all(2, [(1, (RotationFactor(randn(1, 5, 5)),))])
    y, work, far = randn(1, 24), build_work_list([((2, 1.0, 1.0),)]), build_work_list([((9, 1.0, 1.0),)])
    for backend in ("reference", "cpu"):
        with pytest.raises(ValueError, match="do not cut"):
            rotate_blocks(y, y.clone(), work, tables, [(1, 0, 24)], backend=backend)
        with pytest.raises(ValueError, match=r"columns|one shape"):
            rotate_blocks(y, randn(1, 25), work, tables, [(1, 0, 20)], backend=backend)
        with pytest.raises(ValueError, match=r"bfloat16|BFloat16"):
            rotate_blocks(y.bfloat16(), y.bfloat16(), work, tables, [(1, 0, 20)], backend=backend)
        with pytest.raises(ValueError, match="slot"):
            rotate_blocks(y, y.clone(), far, tables, [(1, 0, 20)], backend=backend)
    for slot in range(3):
        tables.clear(slot)
    assert not any(tables.has_any(linear) for linear in range(3))
    assert tables.factors(0, 0) is None


def test_a_family_knows_slots_by_their_rotations_and_moves_them() -> None:
    family = VectorFamily(2, 1, 2)
    given = VectorEntries(in_rotations=((0, (RotationFactor(randn(2, 4, 4), shuffled(8, 1)),)),))
    assert given.nbytes == 2 * 16 * 4 + 8 * 4
    moved = given.to(torch.device("cpu"))
    assert torch.equal(moved.in_rotations[0][1][0].blocks, given.in_rotations[0][1][0].blocks)
    family.set_all(1, moved)
    assert family.has_slot(1)
    assert not family.is_empty
    family.clear(1)
    assert family.is_empty
    assert not family.in_rotations.has_any(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 15, 16, 20, 40, 80, 240])
def test_blocks_of_all_sizes_equal_the_definition(size: int, dtype: torch.dtype, cpu_backend: str) -> None:
    """Alone, shared by all blocks, in an order, one after the other; one row and several, alone and in company."""
    tables, count = RotationTables(1, 3), 240 // size
    own = RotationFactor(randn(count, size, size, dtype=dtype, seed=1, scale=size**-0.5))
    shared = RotationFactor(randn(1, size, size, dtype=dtype, seed=2, scale=size**-0.5), shuffled(240, 5))
    for slot, factors in enumerate(((own,), (shared,), (own, shared, own))):
        tables.set_all(slot, [(0, factors)])
    bindings: list[Parts] = [((0, 1.0, 1.0),), ((1, 0.5, 1.0),), ((2, 1.0, 1.0), (0, 1.0, -1.0)), ()]
    bindings += [bindings[0]] * 37 + [bindings[2]] * 4
    x, before = randn(len(bindings), 240, dtype=dtype), randn(len(bindings), 240, dtype=dtype, seed=1)
    found, wanted = before.clone(), before.clone()
    members, work = ((0, 0, 240),), build_work_list(bindings)
    rotate_blocks(found, x, work, tables, members, 0.25, backend=cpu_backend)
    rotate_blocks(wanted, x, work, tables, members, 0.25, backend="reference")
    tolerance = {"atol": 2e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 2**-7}
    torch.testing.assert_close(found.float(), wanted.float(), **tolerance)
    assert torch.equal(found[3], before[3])
    for row in (0, 2, 40, 44):
        alone = before[row : row + 1].clone()
        rotate_blocks(
            alone, x[row : row + 1], build_work_list([bindings[row]]), tables, members, 0.25, backend=cpu_backend
        )
        assert torch.equal(alone[0], found[row]), row
