"""lora_linear and sparse_linear against dense float64 oracles."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from deltaserve_kernels import KernelError, build_work_list, lora_linear, sparse_linear
from deltatest.kernel_cases import LinearCase, Parts, csr, randn

OPERATORS = {"lora": lora_linear, "sparse": sparse_linear}
# Inputs are exact in their dtype and sums are fp32, so what is left is fp32 noise over K terms (values of size one),
# and one rounding of the result: half a unit in the last place, 2^-8 of its size for bf16 and 2^-11 for fp16.
TOLERANCE = {
    torch.float32: {"rtol": 0.0, "atol": 3e-5},
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-4},
    torch.float16: {"rtol": 2**-11, "atol": 1e-4},
}
RANKS = [1, 2, 3, 5, 8, 13, 16, 33, 64]


def filled(in_features=77, widths=(48, 19, 130), dtype=torch.float32, num_slots=12) -> LinearCase:
    """Nine slots with odd ranks, some without some members; the last three slots stay empty."""
    members, start = [], 0
    for linear, width in enumerate(widths):
        members.append((linear, start, start + width))
        start += width + 3
    case = LinearCase(in_features, members, num_slots, dtype)
    for slot, rank in enumerate(RANKS):
        linears = [linear for linear in range(len(widths)) if (slot + linear) % 4 != 3]
        case.add_lora(slot, rank, linears)
        case.add_sparse(slot, 0.04 * (slot + 1), linears)
    return case


def random_bindings(num_rows: int, seed: int = 0, slots: int = 12, max_parts: int = 3) -> list[Parts]:
    draw = random.Random(seed)
    scales = [1.0, 0.5, -2.0]
    return [
        tuple(
            (draw.randrange(slots), draw.choice(scales), draw.choice(scales)) for _ in range(draw.randint(0, max_parts))
        )
        for _ in range(num_rows)
    ]


def run(kind: str, case: LinearCase, bindings, x, y, backend, depth=0.25, members=None):
    work = build_work_list(bindings)
    OPERATORS[kind](y, x, work, case.tables(kind), members or case.members, depth, backend=backend)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lora", "sparse"])
@pytest.mark.parametrize("num_rows", [0, 1, 63])
def test_mixed_rows_equal_the_dense_oracle(kind, num_rows, dtype, backend):
    case = filled(dtype=dtype)
    bindings = random_bindings(num_rows)
    x, y = randn(num_rows, 77, dtype=dtype), randn(num_rows, case.width, dtype=dtype, seed=1)
    expected = case.expected(kind, y, x, bindings, 0.25)
    out = run(kind, case, bindings, x, y.clone(), backend)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["lora", "sparse"])
@pytest.mark.parametrize(
    ("in_features", "widths"), [(1, (1,)), (16, (16,)), (31, (33,)), (32, (64, 64)), (100, (15, 17)), (512, (512,))]
)
def test_awkward_sizes(kind, in_features, widths, backend):
    case = filled(in_features, widths)
    bindings = random_bindings(37, seed=3)
    x, y = randn(37, in_features), randn(37, case.width, seed=1)
    expected = case.expected(kind, y, x, bindings, 0.25)
    torch.testing.assert_close(run(kind, case, bindings, x, y, backend).double(), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("kind", ["lora", "sparse"])
@pytest.mark.parametrize("binding", [(), ((4, 1.0, 1.0),), ((11, 1.0, 1.0),)], ids=["none", "one slot", "empty slot"])
def test_all_rows_alike(kind, binding, any_backend):
    case = filled()
    x, y = randn(70, 77), randn(70, case.width, seed=1)
    expected = case.expected(kind, y, x, [binding] * 70, 0.25)
    out = run(kind, case, [binding] * 70, x, y.clone(), any_backend)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[torch.float32])
    if binding in ((), ((11, 1.0, 1.0),)):
        assert torch.equal(out, y)


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_strided_rows_and_a_subset_of_the_group(kind, backend):
    case = filled()
    bindings = random_bindings(20, seed=5)
    wide_x, wide_y = randn(20, 200), randn(20, 500, seed=1)
    x, y = wide_x[:, 40:117], wide_y[:, 100 : 100 + case.width]
    members = [case.members[2], case.members[0]]
    subset = replace(case, members=members)
    subset.lora_dense, subset.sparse_dense = case.lora_dense, case.sparse_dense
    untouched = wide_y.clone()
    expected = subset.expected(kind, y, x, bindings, 0.25)
    run(kind, case, bindings, x, y, backend, members=members)
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[torch.float32])
    _, start, stop = case.members[1]
    assert torch.equal(y[:, start:stop], untouched[:, 100 + start : 100 + stop])
    assert torch.equal(wide_y[:, :100], untouched[:, :100])
    assert torch.equal(wide_y[:, 100 + case.width :], untouched[:, 100 + case.width :])


@pytest.mark.parametrize("kind", ["lora", "sparse"])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_scale_runs_linearly_over_depth(kind, depth, any_backend):
    case = filled()
    x = randn(1, 77)
    binding = ((3, 1.0, 3.0), (4, 0.0, -1.0))
    y = run(kind, case, [binding], x, torch.zeros(1, case.width), any_backend, depth)
    one, two = (
        run(kind, case, [((slot, scale, scale),)], x, torch.zeros(1, case.width), any_backend, depth)
        for slot, scale in ((3, 1.0 + 2.0 * depth), (4, -depth))
    )
    torch.testing.assert_close(y, one + two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_a_row_has_the_same_bits_alone_and_in_company(kind, dtype, backend):
    """Decode alone, decode among 64, and as one row of a prefill of its own adapter."""
    case = filled(in_features=160, widths=(96, 70), dtype=dtype)
    bindings = [*random_bindings(40, seed=7), *[((8, 1.0, 1.0),)] * 24]
    x, y = randn(64, 160, dtype=dtype), randn(64, case.width, dtype=dtype, seed=1)
    together = run(kind, case, bindings, x, y.clone(), backend)
    for row in range(0, 64, 3):
        alone = run(kind, case, bindings[row : row + 1], x[row : row + 1], y[row : row + 1].clone(), backend)
        assert torch.equal(alone[0], together[row]), f"row {row}"
        crowd = torch.cat([x[row : row + 1], randn(36, 160, dtype=dtype, seed=row)]).roll(row % 37, 0)
        crowd_y = torch.cat([y[row : row + 1], randn(36, case.width, dtype=dtype)]).roll(row % 37, 0)
        prefill = run(kind, case, [bindings[row]] * 37, crowd, crowd_y, backend)
        assert torch.equal(prefill[row % 37], together[row]), f"row {row} in prefill"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("most", [3, 4, 7, 8, 9, 15, 16, 17, 40, 300])
def test_sparse_outputs_of_any_number_of_entries(most, dtype, backend):
    """Kernels sum outputs of few entries sixteen at a time, up to a number of products; 300 is past it. How many rows
    share the adapter decides how many lie beside each other: four, eight, sixteen."""
    case = LinearCase(310, [(0, 0, 75)], 1, dtype)
    counts = [(5 * n) % (most + 1) for n in range(74)] + [most]
    mask = torch.zeros(75, 310, dtype=torch.bool)
    for n, count in enumerate(counts):
        mask[n, torch.randperm(310, generator=torch.Generator().manual_seed(n))[:count]] = True
    values = randn(sum(counts), dtype=dtype, scale=most**-0.5)
    case.sparse.set(0, 0, *csr(mask, values))
    dense = torch.zeros(75, 310, dtype=torch.float64)
    dense[mask] = values.double()
    case.sparse_dense[0, 0] = dense
    bindings = [((0, 1.0, 0.5),)]
    x, y = randn(19, 310, dtype=dtype), randn(19, 75, dtype=dtype, seed=1)
    together = run("sparse", case, bindings * 19, x, y.clone(), backend)
    wanted = case.expected("sparse", y, x, bindings * 19, 0.25)
    torch.testing.assert_close(together.double(), wanted, **TOLERANCE[dtype])
    for rows in (1, 2, 4, 5, 8, 9):
        fewer = run("sparse", case, bindings * rows, x[:rows], y[:rows].clone(), backend)
        assert torch.equal(fewer, together[:rows]), rows


@pytest.mark.parametrize("num_rows", [1, 5, 300])
def test_threads_do_not_change_bits(num_rows):
    """Enough work to be split: by matrix for few rows, by row chunks for many."""
    case = LinearCase(1024, [(0, 0, 1024), (1, 1024, 1624)], 2, torch.bfloat16)
    case.add_lora(0, 61)
    case.add_lora(1, 7)
    bindings = [((0, 1.0, 1.0), (1, 0.5, 0.5))] * num_rows
    x, y = randn(num_rows, 1024, dtype=torch.bfloat16), randn(num_rows, 1624, dtype=torch.bfloat16, seed=1)
    one = run("lora", case, bindings, x, y.clone(), "auto")
    torch.set_num_threads(2)
    two = run("lora", case, bindings, x, y.clone(), "auto")
    assert torch.equal(one, two)
    expected = case.expected("lora", y, x, bindings, 0.25)
    torch.testing.assert_close(two.double(), expected, **TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_nothing_outside_the_binding_is_read(kind, backend):
    """Other slots and base rows hold NaN; matrices end at NaN on both sides."""
    members = [(0, 0, 21)]
    case = LinearCase(37, members, 4)
    if kind == "lora":
        a, b_t = (
            torch.full((64 + 5 * width + 64,), float("nan"))[64 : 64 + 5 * width].view(5, width) for width in (37, 21)
        )
        a.copy_(randn(5, 37))
        b_t.copy_(randn(5, 21, seed=1))
        case.lora.set(0, 1, a, b_t)
        case.lora_dense[0, 1] = b_t.double().t() @ a.double()
        case.lora.set(0, 2, torch.full((3, 37), float("nan")), torch.full((3, 21), float("nan")))
    else:
        case.add_sparse(1, 0.2)
        indptr, cols, values = case.sparse.get(0, 1)
        case.sparse.set(0, 2, indptr, cols, torch.full_like(values, float("nan")))
    bindings = [(), ((1, 1.0, 1.0),), (), ((1, 1.0, 1.0),), ((3, 1.0, 1.0),)]
    wide = torch.full((5, 37 + 32), float("nan"))
    x, y = wide[:, 16 : 16 + 37], randn(5, 21, seed=2)
    x[1], x[3] = randn(37, seed=3), randn(37, seed=4)
    expected = case.expected(kind, y[[1, 3]], x[[1, 3]], [bindings[1]] * 2, 0.25)
    base = y.clone()
    run(kind, case, bindings, x, y, backend)
    torch.testing.assert_close(y[[1, 3]].double(), expected, **TOLERANCE[torch.float32])
    assert torch.equal(y[[0, 2, 4]], base[[0, 2, 4]])


def test_nan_in_a_used_adapter_is_not_hidden(backend):
    case = LinearCase(20, [(0, 0, 20)], 1)
    a = randn(2, 20)
    a[1, 3] = float("nan")
    case.lora.set(0, 0, a, randn(2, 20))
    y = run("lora", case, [((0, 1.0, 1.0),)], randn(1, 20), torch.zeros(1, 20), backend)
    assert y.isnan().all()


def _broken(name: str, case: LinearCase):
    x, y = randn(3, 77), randn(3, case.width)
    work = build_work_list([((0, 1.0, 1.0),)] * 3)
    members = list(case.members)
    if name == "rows":
        x = randn(4, 77)
    elif name == "y rows":
        y = randn(4, case.width)
    elif name == "work rows":
        work = build_work_list([((0, 1.0, 1.0),)] * 2)
    elif name == "dtype":
        x, y = x.bfloat16(), y.bfloat16()
    elif name == "y dtype":
        y = y.bfloat16()
    elif name == "integers":
        x, y = x.int(), y.int()
    elif name == "columns of x":
        x = randn(3, 76)
    elif name == "x transposed":
        x = randn(77, 3).t()
    elif name == "member width":
        members[0] = (0, 0, 47)
    elif name == "member outside":
        members[0] = (0, case.width - 20, case.width + 28)
    elif name == "member negative":
        members[0] = (0, -48, 0)
    elif name == "linear":
        members.append((3, 0, 1))
    elif name == "slot":
        work = build_work_list([((12, 1.0, 1.0),)] * 3)
    elif name == "repeated row":
        work = replace(work, rows=torch.tensor([0, 0, 1], dtype=torch.int32))
    elif name == "row outside":
        work = replace(work, rows=torch.tensor([0, 1, 3], dtype=torch.int32))
    return x, y, work, members


@pytest.mark.parametrize("kind", ["lora", "sparse"])
@pytest.mark.parametrize(
    "name",
    [
        "rows",
        "y rows",
        "work rows",
        "dtype",
        "y dtype",
        "integers",
        "columns of x",
        "x transposed",
        "member width",
        "member outside",
        "member negative",
        "linear",
        "slot",
        "repeated row",
        "row outside",
    ],
)
def test_arguments_that_do_not_fit_are_refused(kind, name, any_backend):
    case = filled()
    x, y, work, members = _broken(name, case)
    before = y.clone()
    with pytest.raises(ValueError):
        OPERATORS[kind](y, x, work, case.tables(kind), members, backend=any_backend)
    assert torch.equal(y, before)


def test_a_sparse_column_past_x_is_refused(any_backend):
    case = LinearCase(30, [(0, 0, 8)], 1)
    case.add_sparse(0, 0.5)
    with pytest.raises(ValueError, match="column"):
        sparse_linear(
            torch.zeros(1, 8),
            randn(1, 20),
            build_work_list([((0, 1.0, 1.0),)]),
            case.sparse,
            [(0, 0, 8)],
            backend=any_backend,
        )


def test_refusals_of_the_definition_are_typed():
    case = filled()
    with pytest.raises(KernelError):
        lora_linear(
            randn(1, 5), randn(1, 77), build_work_list([((0, 1.0, 1.0),)]), case.lora, case.members, backend="reference"
        )
