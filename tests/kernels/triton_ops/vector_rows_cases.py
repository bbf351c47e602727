"""Vector terms by row in Triton's interpreter, over lists of an eager step and of a captured one; test_interpreter.py.

Held to the definitions in ``vector_rows_reference``, which ``test_decode_graphs`` holds to the way of an eager step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from deltaserve_kernels import (
    DtypeMismatch,
    KernelError,
    OutOfRange,
    PaddedLayout,
    ShapeMismatch,
    VectorEntries,
    VectorEntry,
    VectorFamily,
    VectorRows,
    WorkList,
    build_work_list,
    change_norm,
    changed_rms_norm,
    fan_out,
    gather_members,
    pointwise,
    put_back,
    scale_shift,
    scaled_input,
    set_aside,
    use_backend,
)
from deltaserve_kernels.triton_ops import guard, vector_rows
from deltaserve_kernels.triton_ops import pointwise as triton_pointwise
from deltatest.block_cases import afloat
from deltatest.kernel_cases import Parts, randn

NAN = float("nan")
WIDTHS = (40, 19, 33, 8)  # more members than one launch takes
MEMBERS = [(i, sum(WIDTHS[:i]) + 3 * i, sum(WIDTHS[: i + 1]) + 3 * i) for i in range(len(WIDTHS))]
IN_FEATURES, TOTAL = 45, MEMBERS[-1][2] + 2
DEPTH = 0.25
# Slots: scales, biases, both, norms and inputs; 3 has nothing, and 4 nothing that this step's linears know.
BINDINGS: list[Parts] = [
    (), ((0, 1.0, 0.5),), ((1, 0.5, 2.0), (2, -2.0, 1.0)), ((3, 1.0, 1.0),), ((2, 0.0, 0.0),), ((4, 1.0, 1.0),),
    ((3, 1.0, 0.0), (0, 0.0, 2.0), (1, 1.0, 1.0)), ((2, 1.0, 1.0),), ((0, 0.0, 0.0), (3, 1.0, 1.0)),
]  # fmt: skip
UNTOUCHED = [row for row, parts in enumerate(BINDINGS) if all(s in (3, 4) or not (a or b) for s, a, b in parts)]
HAVING_SOME = [row for row in range(len(BINDINGS)) if row not in UNTOUCHED]


@pytest.fixture(autouse=True)
def _blocks(monkeypatch) -> Iterator[None]:
    """Several programs a row; and as on a GPU, arguments are checked without looking."""
    monkeypatch.setattr(vector_rows, "BLOCK", 32)
    monkeypatch.setattr(guard, "may_look", lambda tensor: False)
    before = use_backend("triton")
    yield
    use_backend(before)


@contextmanager
def by_definition() -> Iterator[None]:
    before = use_backend("reference")
    yield
    use_backend(before)


def vector(size: int, seed: int, mean: float = 0.0) -> torch.Tensor:
    return afloat(mean + randn(size, seed=seed, scale=0.3), NAN)


def family() -> VectorFamily:
    """Vectors lie in seas of NaN."""
    made = VectorFamily(len(WIDTHS) + 1, 2, 5)
    for slot, (has_scale, has_bias) in {0: (True, True), 1: (True, False), 2: (False, True)}.items():
        outputs = [
            (i, VectorEntry(vector(w, 10 * slot + i, 1.0) if has_scale else None, vector(w, i) if has_bias else None))
            for i, w in enumerate(WIDTHS)
            if i != slot
        ]
        inputs = [(i, VectorEntry(vector(IN_FEATURES, 50 + 7 * slot + i, 1.0), None)) for i in range(4) if i != slot]
        norms = [(slot % 2, VectorEntry(vector(IN_FEATURES, 90), vector(IN_FEATURES, 91) if has_bias else None))]
        made.set_all(slot, VectorEntries(tuple(outputs), tuple(inputs), tuple(norms)))
    made.set_all(4, VectorEntries(((len(WIDTHS), VectorEntry(vector(8, 1), None)),)))
    return made


def step_of(kind: str) -> VectorRows:
    """Of an eager step, whose list has rows with vectors alone, or of a captured one, padded by two rows."""
    if kind == "captured":
        layout = PaddedLayout(len(BINDINGS) + 2)
        packed = np.empty(layout.size, dtype=np.int32)
        layout.fill(packed, BINDINGS)
        return VectorRows(family(), layout.work_list(torch.from_numpy(packed)))
    # Two rows that the step has beside those of the list stand at its end.
    work = build_work_list([parts if any(s < 3 for s, *_ in parts) else () for parts in BINDINGS] + [(), ()])
    return VectorRows(family(), work, frozenset(range(5)))


@pytest.fixture(params=["eager", "captured"])
def step(request) -> VectorRows:
    return step_of(request.param)


def rows_of(step: VectorRows, width: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """[T, width] with a stride of its own, in a sea of NaN."""
    sea = torch.full((step.work.num_rows + 1, width + 7), NAN, dtype=dtype)
    sea[1:, 5 : width + 5] = randn(step.work.num_rows, width, dtype=dtype, seed=seed)
    return sea[1:, 5 : width + 5]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    half = found.dtype == torch.float16
    torch.testing.assert_close(found, wanted, rtol=2**-10 if half else 2e-6, atol=1e-3 if half else 2e-6)


def num_padding(work: WorkList) -> list[int]:
    return list(range(len(BINDINGS), work.num_rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_outputs_are_scaled_and_shifted(step, dtype):
    y = rows_of(step, TOTAL, dtype)
    found, wanted = y.clone(), y.clone()
    scale_shift(found, step.work, step.family.outputs, MEMBERS, DEPTH)
    with by_definition():
        scale_shift(wanted, step.work, step.family.outputs, MEMBERS, DEPTH)
    close(found, wanted)
    base = UNTOUCHED + num_padding(step.work)
    assert torch.equal(found[base], y[base])
    assert all(not torch.equal(found[row], y[row]) for row in HAVING_SOME)
    between = [column for _, start, _ in MEMBERS[1:] for column in range(start - 3, start)]
    assert torch.equal(found[:, between], y[:, between])


def test_a_gain_of_its_own_starts_the_sum():
    step = step_of("eager")
    rows, gain, shift = rows_of(step, IN_FEATURES), randn(IN_FEATURES, seed=5), randn(IN_FEATURES, seed=6)
    for given in ({"gain": gain, "shift": shift}, {"gain": gain}, {"shift": shift}):
        found, wanted = rows.clone(), rows.clone()
        for norm in range(2):
            members = ((norm, 0, IN_FEATURES),)
            scale_shift(found, step.work, step.family.norms, members, DEPTH, unit=0.0, **given)
            with by_definition():
                scale_shift(wanted, step.work, step.family.norms, members, DEPTH, unit=0.0, **given)
        close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_inputs_of_a_lone_linear_are_scaled(step, dtype):
    x = rows_of(step, IN_FEATURES, dtype)
    found = scaled_input(x, step, 2, DEPTH)
    with by_definition():
        close(found, scaled_input(x, step, 2, DEPTH))
    base = UNTOUCHED + num_padding(step.work)
    assert torch.equal(found[base], x[base])
    assert not torch.equal(found[1], x[1])


def test_members_are_fed_what_each_wants_and_given_what_came_of_it(step):
    x, weight = rows_of(step, IN_FEATURES), randn(TOTAL, IN_FEATURES, seed=3)
    fed = fan_out(x, step, MEMBERS, DEPTH)
    with by_definition():
        close(fed, fan_out(x, step, MEMBERS, DEPTH))
    product = fed @ weight.t()
    wanted = product.clone()
    found = gather_members(product, step, MEMBERS)
    with by_definition():
        assert torch.equal(found, gather_members(wanted, step, MEMBERS))
    plain = x @ weight.t()
    for linear, start, stop in MEMBERS:
        own = (scaled_input(x, step, linear, DEPTH) @ weight.t())[:, start:stop]
        torch.testing.assert_close(found[:, start:stop], own, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[HAVING_SOME], plain[HAVING_SOME])


def test_rows_are_set_aside_and_put_back(step):
    y = rows_of(step, TOTAL)
    found, wanted, added = y.clone(), y.clone(), rows_of(step, TOTAL, seed=2)
    kept = set_aside(found, step)
    # A slot counts whatever linear its vectors are of: 4 too where the list has its row.
    aside = [*HAVING_SOME, 5] if step.work.is_padded else HAVING_SOME
    others = [row for row in range(len(y)) if row not in aside]
    assert not found[aside].any()
    assert torch.equal(found[others], y[others])
    with by_definition():
        kept_too = set_aside(wanted, step)
    assert torch.equal(found, wanted)
    for each in (found, wanted):
        each += added
    put_back(found, kept, step)
    with by_definition():
        put_back(wanted, kept_too, step)
    assert torch.equal(found, wanted)
    assert torch.equal(found, y + added)


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 0.0), (torch.float16, 1.0)])
def test_an_rms_norm_has_its_rows_gains_in_the_launch_of_the_plain_one(step, dtype, offset):
    x, weight = rows_of(step, IN_FEATURES, dtype), randn(IN_FEATURES, dtype=dtype, seed=8)
    plain = triton_pointwise.rms_norm(x, weight, 1e-5, offset)
    for norm in range(2):
        arguments = (x, weight, 1e-5, offset, weight.float() + offset, step, norm, DEPTH)
        found = changed_rms_norm(*arguments)
        with by_definition():
            wanted = changed_rms_norm(*arguments)
        close(found, wanted)
        same = [
            row for row in range(len(x)) if torch.equal(wanted[row], pointwise.rms_norm(x, weight, 1e-5, offset)[row])
        ]
        assert set(same) >= set(UNTOUCHED)
        assert len(same) < len(x) - 1
        assert torch.equal(found[same], plain[same])


@pytest.mark.parametrize("has_shift", [False, True])
def test_any_norm_s_rows_are_changed(step, has_shift):
    y, normalised = rows_of(step, IN_FEATURES).contiguous(), randn(step.work.num_rows, IN_FEATURES, seed=9)
    gain, shift = randn(IN_FEATURES, seed=5), randn(IN_FEATURES, seed=6) if has_shift else None
    found, wanted = y.clone(), y.clone()
    for norm in range(2):
        change_norm(found, normalised, gain, shift, step, norm, DEPTH)
        with by_definition():
            change_norm(wanted, normalised, gain, shift, step, norm, DEPTH)
    close(found, wanted)
    base = UNTOUCHED + num_padding(step.work)
    assert torch.equal(found[base], y[base])
    assert all(not torch.equal(found[row], y[row]) for row in HAVING_SOME)


def test_a_step_without_rows_and_an_empty_list_change_nothing():
    for work in (build_work_list([]), build_work_list([(), ()])):
        step = VectorRows(family(), work, frozenset())
        x = randn(work.num_rows, IN_FEATURES)
        y = torch.zeros(work.num_rows, TOTAL)
        scale_shift(y, work, step.family.outputs, MEMBERS)
        assert torch.equal(scaled_input(x, step, 0, 0.0), x)
        assert torch.equal(fan_out(x, step, MEMBERS, 0.0), x)
        assert torch.equal(gather_members(y, step, MEMBERS), y)
        put_back(y, set_aside(y, step), step)
        assert not y.any()


def test_arguments_that_do_not_fit_are_refused():
    step = step_of("eager")
    x, y, gain = rows_of(step, IN_FEATURES), rows_of(step, TOTAL), randn(IN_FEATURES)
    wrong: list[tuple[type[KernelError], object]] = [
        (ShapeMismatch, lambda: scaled_input(x[1:], step, 0, 0.0)),
        (ShapeMismatch, lambda: scaled_input(y, step, 1, 0.0)),
        (OutOfRange, lambda: scaled_input(x, step, 9, 0.0)),
        (ShapeMismatch, lambda: gather_members(y, step, MEMBERS)),
        (ShapeMismatch, lambda: put_back(y, x, step)),
        (ShapeMismatch, lambda: set_aside(y[1:], step)),
        (DtypeMismatch, lambda: changed_rms_norm(x, gain, 1e-5, 0.0, gain.half(), step, 0, 0.0)),
        (ShapeMismatch, lambda: change_norm(x, x.half(), gain, None, step, 0, 0.0)),
        (OutOfRange, lambda: scale_shift(y[:, :10], step.work, step.family.outputs, MEMBERS)),
        (ShapeMismatch, lambda: scale_shift(y, step.work, step.family.outputs, MEMBERS, gain=gain)),
    ]
    for error, call in wrong:
        with pytest.raises(error):
            call()  # type: ignore[operator]
