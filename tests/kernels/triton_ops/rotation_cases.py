"""The rotation kernels in Triton's interpreter against the definition; see test_interpreter.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltaserve_kernels import (
    KernelError,
    PaddedLayout,
    RotationFactor,
    VectorEntries,
    VectorEntry,
    VectorFamily,
    VectorRows,
    VectorStep,
    WorkList,
    build_work_list,
    build_work_list_runs,
    fan_out,
    gather_members,
    rotate_blocks,
    split_vectors,
    turn_fanned,
    turn_rows,
    use_backend,
)
from deltaserve_kernels.triton_ops import guard, rotations
from deltatest.kernel_cases import Parts, randn

# Member 3 in a launch of its own.
MEMBERS = [(0, 0, 24), (1, 27, 39), (2, 39, 41), (3, 41, 47)]
WIDTH, IN_FEATURES, DEPTH = 52, 24, 0.25
# Slot 0 turns outputs 0, 1 and 3, slot 1 all but 0, by one factor or several; slot 2 nothing.
BINDINGS: list[Parts] = [
    (), ((0, 1.0, 3.0),), ((2, 1.0, 1.0), (1, -1.0, 1.0), (0, 0.0, 0.0)), ((1, 1.0, 1.0),), ((2, 1.0, 1.0),),
    ((0, 0.0, 0.0),), ((0, 1.0, 3.0),),
]  # fmt: skip
TURNED = [1, 2, 3, 6]
TOLERANCE = {
    torch.float32: {"rtol": 0.0, "atol": 1e-5},
    torch.float16: {"rtol": 2**-10, "atol": 1e-4},
}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """Several programs a row; and arguments are checked without looking."""
    monkeypatch.setattr(rotations, "DECODE", rotations.RotationForm(1, 4, 16))
    monkeypatch.setattr(rotations, "PROMPTS", rotations.RotationForm(2, 4, 16))
    monkeypatch.setattr(guard, "may_look", lambda tensor: False)
    before = use_backend("triton")
    yield
    use_backend(before)


def factor(count: int, size: int, seed: int, dtype: torch.dtype, width: int = 0) -> RotationFactor:
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed)).int() if width else None
    return RotationFactor(randn(count, size, size, dtype=dtype, seed=seed, scale=0.3), order)


def family(dtype=torch.float32) -> VectorFamily:
    made = VectorFamily(4, 0, 3)
    outputs = {
        0: {0: (factor(6, 4, 1, dtype),), 1: (factor(1, 3, 2, dtype),), 3: (factor(1, 6, 5, dtype, 6),)},
        1: {
            1: (factor(6, 2, 3, dtype, 12), factor(1, 6, 4, dtype, 12)),
            2: (factor(1, 2, 6, dtype),),
            3: (factor(3, 2, 7, dtype), factor(1, 1, 8, dtype), factor(2, 3, 9, dtype, 6)),
        },
    }
    inputs = {0: {1: (factor(1, 12, 11, dtype),)}, 1: {0: (factor(8, 3, 12, dtype, 24), factor(2, 12, 13, dtype))}}
    for slot in (0, 1):
        scales = ((slot, VectorEntry(1 + randn(IN_FEATURES, seed=slot, scale=0.2))),)
        turned = (tuple(given[slot].items()) for given in (inputs, outputs))
        made.set_all(slot, VectorEntries((), scales, (), *turned))
    return made


def work_of(kind: str) -> WorkList:
    """Of a decode step, of a captured one, or of a step with prompts, in tiles of which some are not full."""
    if kind == "decode":
        return build_work_list(BINDINGS)
    if kind == "prompts":
        return build_work_list_runs([(3 * i, 2 + i % 2, parts) for i, parts in enumerate(BINDINGS)], 21)
    layout = PaddedLayout(len(BINDINGS) + 2)
    packed = np.empty(layout.size, dtype=np.int32)
    layout.fill(packed, BINDINGS)
    return layout.work_list(torch.from_numpy(packed))


def step_of(kind: str, dtype=torch.float32) -> VectorRows:
    slots = None if kind == "captured" else frozenset(range(3))
    return VectorRows(family(dtype), work_of(kind), slots, max_factors=3)


def operands(num_rows: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """In rows that are further apart than they are long."""
    wide_y, wide_x = (randn(num_rows, 60, dtype=dtype, seed=seed) for seed in (7, 8))
    return wide_y[:, 5:52], wide_x[:, 3:50]


def others(step: VectorRows) -> list[int]:
    if step.work.has_prompts:
        return [row for row in range(step.work.num_rows) if row // 3 not in TURNED or row % 3 >= 2 + row // 3 % 2]
    return [row for row in range(step.work.num_rows) if row not in TURNED]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("decode", torch.float32), ("captured", torch.float16), ("prompts", torch.float32)]
)
def test_rotations_equal_the_definition(kind, dtype, monkeypatch):
    monkeypatch.setattr(rotations, "ROWS_AT_ONCE", 8)
    step = step_of(kind, dtype)
    y, x = operands(step.work.num_rows, dtype)
    expected, before = y.clone(), y.clone()
    tables = step.family.out_rotations
    rotate_blocks(expected, x, step.work, tables, MEMBERS, DEPTH, backend="reference")
    turn_rows(y, x, step, tables, MEMBERS, DEPTH)
    torch.testing.assert_close(y, expected, **TOLERANCE[dtype])
    for row in others(step):
        assert torch.equal(y[row], before[row]), "a row without a rotation changed"
    one = 3 if kind == "prompts" else 1
    assert torch.equal(y[one, 39:41], before[one, 39:41]), "a member without a rotation changed"
    assert torch.equal(y[:, 24:27], before[:, 24:27])
    assert (y[one, :24] != before[one, :24]).any()


@pytest.mark.parametrize("kind", ["captured", "prompts"])
def test_each_member_is_fed_its_own_rotation(kind):
    """Beside scales of inputs; the product of what they are fed is taken from the rows made for each."""
    step, members = step_of(kind), MEMBERS[:3]
    x, weight = randn(step.work.num_rows, IN_FEATURES, seed=4), randn(WIDTH, IN_FEATURES, seed=5)
    fed = fan_out(x, step, members, DEPTH)
    turn_fanned(fed, x, step, members, DEPTH)
    found = gather_members(fed @ weight.t(), step, members)
    before = use_backend("reference")
    wanted_fed = fan_out(x, step, members, DEPTH)
    turn_fanned(wanted_fed, x, step, members, DEPTH)
    use_backend(before)
    torch.testing.assert_close(fed, wanted_fed, rtol=0, atol=2e-5)
    for linear, start, stop in members:
        own = fan_out(x, step, ((linear, 0, IN_FEATURES),), DEPTH)[len(x) :]
        scaled = x.clone()
        scaled[list(range(len(x))) if step.work.is_padded else step.work.rows.long()] = own
        turned = scaled.clone()
        rotate_blocks(
            turned, x, step.work, step.family.in_rotations, ((linear, 0, IN_FEATURES),), DEPTH, backend="reference"
        )  # fmt: skip
        torch.testing.assert_close(found[:, start:stop], (turned @ weight.t())[:, start:stop], rtol=0, atol=1e-4)
    plain = x @ weight.t()
    assert not torch.allclose(found[:, :39], plain[:, :39])
    torch.testing.assert_close(found[others(step)][:, :41], plain[others(step)][:, :41], rtol=0, atol=1e-5)


def test_a_row_has_the_same_bits_alone_and_in_company_and_spoils_nobody():
    step = step_of("decode")
    y, x = operands(len(BINDINGS))
    x[6], y[4, 2] = float("nan"), -0.0
    together, tables = y.clone(), step.family.out_rotations
    turn_rows(together, x, step, tables, MEMBERS, DEPTH)
    assert together[:6].isfinite().all()
    for row in (1, 2, 3):
        alone, work = y[row : row + 1].clone(), build_work_list(BINDINGS[row : row + 1])
        turn_rows(
            alone, x[row : row + 1], VectorRows(step.family, work, frozenset(range(3))), tables, MEMBERS, DEPTH
        )  # fmt: skip
        assert torch.equal(alone[0], together[row])
    padded, captured = torch.cat([y, y[:2]]), step_of("captured")
    turn_rows(padded, torch.cat([x, x[:2]]), captured, captured.family.out_rotations, MEMBERS, DEPTH)
    assert torch.equal(padded[:6], together[:6])


def test_rows_that_two_adapters_turn_are_the_definition_s():
    made = family()
    for parts, kind in ((BINDINGS[2], VectorRows), (((0, 1.0, 1.0), (1, 0.0, 0.5)), VectorStep)):
        for runs in ([(0, 1, BINDINGS[3]), (1, 1, parts)], [(0, 3, BINDINGS[3]), (3, 2, parts)]):
            assert isinstance(split_vectors(runs, 5, made), kind)


def test_what_does_not_fit_is_refused():
    step = step_of("decode")
    y, x = operands(len(BINDINGS))
    tables = step.family.out_rotations
    fitting = (y, x, step, tables, MEMBERS)
    wrong = {
        "do not cut 22 columns": (y, x, step, tables, [(0, 0, 22)]),
        "columns 40:50: not inside": (y, x, step, tables, [(2, 40, 50)]),
        "linear 4 of 4": (y, x, step, tables, [(4, 0, 4)]),
        "one dtype": (y.half(), x, step, tables, MEMBERS),
        "one width": (y, x[:, :40], step, tables, MEMBERS),
        "float rows": (y[1:], x, step, tables, MEMBERS),
    }
    turn_rows(*fitting, DEPTH)
    for message, arguments in wrong.items():
        # The host knows no entry of these linears; a captured pass launches all the same.
        captured = VectorRows(step.family, step.work, None, max_factors=3)
        with pytest.raises(KernelError, match=message):
            turn_rows(arguments[0], arguments[1], captured, *arguments[3:], DEPTH)
