"""Products that take scales and biases into their sums, inputs of members' own, and norms whose gains rows change."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch import Tensor

from deltaserve_kernels import (
    DeviceMismatch,
    VectorTables,
    build_work_list,
    cpu,
    lora_linear,
    scale_shift,
)
from deltaserve_kernels.cpu.packed_terms import group_terms, packed_linear_terms
from deltatest.block_cases import afloat
from deltatest.kernel_cases import LinearCase, Parts, randn

NAN = float("nan")
DTYPES = [torch.bfloat16, torch.float16]
DEPTH, WIDTH, INPUTS = 0.25, 208, 77
# Columns of no member on both sides of the second; more panels than one group; borders inside a group.
MEMBERS = [(0, 0, 48), (1, 64, 80), (2, 96, 208)]
COLUMNS = list(chain.from_iterable(MEMBERS))
BINDINGS: list[Parts] = [
    (),
    ((0, 1.0, 3.0),),
    ((1, -1.0, 1.0), (0, 0.5, 0.5), (3, 2.0, 1.0)),
    ((2, 1.0, 1.0),),
    ((3, 1.0, 1.0),),
    ((0, 0.0, 0.0),),
] * 7


class Case:
    """Slot 0 has low rank and all vectors, slot 1 low rank, slot 2 low rank and an input scale of the last member, slot
    3 a bias of the second and both of the last; seas of NaN around."""

    def __init__(self, dtype: torch.dtype, *, has_bias: bool = True) -> None:
        lora = LinearCase(INPUTS, MEMBERS, 4, dtype)
        for slot, rank in ((0, 3), (1, 8), (2, 16)):
            lora.add_lora(slot, rank)
        self.lora = lora.tables("lora")
        self.outputs, self.inputs = VectorTables(3, 4), VectorTables(3, 4)
        for linear, start, stop in MEMBERS:
            scale = afloat(1 + randn(stop - start, seed=linear, scale=0.3), NAN)
            self.outputs.set(linear, 0, scale, afloat(randn(stop - start, seed=linear + 10), NAN))
            if linear != 1:
                self.inputs.set(linear, 0, afloat(1 + randn(INPUTS, seed=linear + 20, scale=0.3), NAN))
        self.outputs.set(1, 3, None, afloat(randn(16, seed=30), NAN))
        last = afloat(1 + randn(112, seed=32, scale=0.3), NAN), afloat(randn(112, seed=33), NAN)
        self.outputs.set(2, 3, *last)
        self.inputs.set(2, 2, afloat(1 + randn(INPUTS, seed=31, scale=0.3), NAN))
        self.weight = randn(WIDTH, INPUTS, dtype=dtype, seed=4)
        self.packed = cpu.pack_weight(self.weight)
        self.bias = randn(WIDTH, dtype=dtype, seed=5) if has_bias else None

    def product(
        self,
        x: Tensor,
        bindings: list[Parts],
        *,
        outputs: VectorTables | None = None,
        inputs: VectorTables | None = None,
        has_inputs: bool = True,
        has_low_rank: bool = True,
        of: list[Parts] | None = None,
    ) -> Tensor:
        """``of``: bindings of which the vectors are, if not of the step's."""
        work = build_work_list(bindings)
        rows = work if of is None else build_work_list(of)
        outs, ins = cpu.changes(outputs or self.outputs, rows), cpu.changes(inputs or self.inputs, rows)
        terms = group_terms(
            self.packed,
            WIDTH,
            len(x),
            COLUMNS,
            DEPTH,
            outs=outs,
            ins=ins if has_inputs else None,
            low_rank=(work, self.lora) if has_low_rank else None,
        )
        return packed_linear_terms(x, self.packed, self.bias, terms)

    def expected(self, x: Tensor, bindings: list[Parts]) -> Tensor:
        """In float64 but for what is rounded on its way into the product."""
        work, wide = build_work_list(bindings), self.weight.double()
        y = x.double() @ wide.t()
        for linear, start, stop in MEMBERS:
            fed = x.clone()
            scale_shift(fed, work, self.inputs, ((linear, 0, INPUTS),), DEPTH, backend="reference")
            y[:, start:stop] = fed.double() @ wide[start:stop].t()
        y = y.float() + (0 if self.bias is None else self.bias.float())
        scale_shift(y, work, self.outputs, MEMBERS, DEPTH, backend="reference")
        delta = torch.zeros(len(x), WIDTH, dtype=x.dtype)
        lora_linear(delta, x, work, self.lora, MEMBERS, DEPTH, backend="reference")
        return y + delta.float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 5, 12, 42])
def test_it_equals_the_operators_one_by_one(dtype, has_bias, num_rows, cpu_backend):
    case, x = Case(dtype, has_bias=has_bias), randn(num_rows, INPUTS, dtype=dtype, seed=1)
    bindings = BINDINGS[-num_rows:]
    expected = case.expected(x, bindings)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4e-2 if dtype is torch.bfloat16 else 5e-3}
    torch.testing.assert_close(case.product(x, bindings).float(), expected, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_company_is_not_felt_and_rows_without_vectors_have_the_bits_of_the_lora_product(dtype, cpu_backend):
    case, x = Case(dtype), randn(42, INPUTS, dtype=dtype, seed=1)
    together = case.product(x, BINDINGS)
    for row in (*range(6), 41):
        assert torch.equal(case.product(x[row : row + 1], BINDINGS[row : row + 1]), together[row : row + 1]), row
    torch.set_num_threads(2)
    assert torch.equal(case.product(x, BINDINGS), together)
    base = cpu.packed_linear(x, case.packed, WIDTH, case.bias)
    nothing = [row for row, parts in enumerate(BINDINGS) if not any(any(part[1:]) for part in parts)]
    assert len(nothing) == 14
    assert torch.equal(together[nothing], base[nothing])
    lora = [((1, 1.0, 1.0),) if row % 2 else () for row in range(42)]
    work = build_work_list(lora)
    wanted = cpu.packed_linear_lora(x, case.packed, WIDTH, case.bias, work, case.lora, COLUMNS, DEPTH)
    assert torch.equal(case.product(x, lora), wanted)


def held_in(tables: VectorTables, narrow: set[int]) -> VectorTables:
    """The table with all numbers rounded to bfloat16, of the slots in ``narrow`` kept in it."""
    made = VectorTables(tables.num_linears, tables.num_slots, takes_narrow=True)
    for linear in range(tables.num_linears):
        for slot in range(tables.num_slots):
            rounded = [None if not t.numel() else t.bfloat16() for t in tables.get(linear, slot) or ()]
            if rounded:
                kept = (t if t is None or slot in narrow else t.float() for t in rounded)
                made.set(linear, slot, *(None if t is None else afloat(t, NAN) for t in kept))
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("narrow", [{0, 1, 2, 3}, {0, 2}])
def test_vectors_in_bfloat16_give_the_bits_of_the_same_numbers_in_fp32(dtype, has_bias, narrow, cpu_backend):
    case, x = Case(dtype, has_bias=has_bias), randn(42, INPUTS, dtype=dtype, seed=1)
    wide, half = ([held_in(tables, slots) for tables in (case.outputs, case.inputs)] for slots in (set(), narrow))
    for has_low_rank in (True, False):
        wanted = case.product(x, BINDINGS, outputs=wide[0], inputs=wide[1], has_low_rank=has_low_rank)
        found = case.product(x, BINDINGS, outputs=half[0], inputs=half[1], has_low_rank=has_low_rank)
        assert torch.equal(found, wanted)
    assert not torch.equal(wanted, case.product(x, BINDINGS, has_low_rank=False)), "no number was rounded"


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_low_rank_do_not_feel_whose_product_has_some(dtype, cpu_backend):
    case, x = Case(dtype), randn(42, INPUTS, dtype=dtype, seed=1)
    vectors = [row for row, parts in enumerate(BINDINGS) if parts == ((3, 1.0, 1.0),)]
    alone = case.product(x, BINDINGS, has_low_rank=False)
    assert torch.equal(case.product(x, BINDINGS)[vectors], alone[vectors])
    assert not torch.equal(alone[vectors], cpu.packed_linear(x, case.packed, WIDTH, case.bias)[vectors])
    base, few = cpu.packed_linear(x, case.packed, WIDTH, case.bias), build_work_list([((1, 1.0, 1.0),)] * 42)
    outs, ins = (cpu.changes(tables, few) for tables in (case.outputs, case.inputs))  # slot 1 has no vectors
    terms = group_terms(case.packed, WIDTH, 42, COLUMNS, DEPTH, outs=outs, ins=ins)
    assert torch.equal(packed_linear_terms(x, case.packed, case.bias, terms), base)


def test_what_does_not_fit_is_named(cpu_backend):
    case, x = Case(torch.bfloat16), randn(42, INPUTS, dtype=torch.bfloat16)
    narrow = VectorTables(3, 4)
    narrow.set(0, 0, torch.ones(47))
    few = VectorTables(3, 1)
    work = build_work_list(BINDINGS)
    found = cpu.changes(case.outputs, work)

    def product(columns: list[int], outs: Tensor | None = found, ins: Tensor | None = None) -> Tensor:
        terms = group_terms(case.packed, WIDTH, 42, columns, DEPTH, outs=outs, ins=ins)
        return packed_linear_terms(x, case.packed, None, terms)

    def used(rows: Tensor, packed: Tensor = case.packed, terms: Tensor | None = None) -> Tensor:
        if terms is None:
            terms = group_terms(case.packed, WIDTH, 42, COLUMNS, DEPTH, outs=found)
        return packed_linear_terms(rows, packed, None, terms)

    for wrong, words in (
        (lambda: case.product(x, BINDINGS, outputs=narrow), "linear 0 has vectors of 47"),
        (lambda: case.product(x, BINDINGS, inputs=case.outputs), "77 are needed"),
        (lambda: case.product(x, BINDINGS, outputs=few), "slot 3 is not in 0..0"),
        (lambda: case.product(x, BINDINGS, outputs=VectorTables(1, 4)), "linear 1 is not in 0..0"),
        (lambda: case.product(x, BINDINGS, of=BINDINGS[:5]), "the changes are of 5"),
        (lambda: product([0, 0, 48, 1, 50, 66]), "no whole panels"),
        (lambda: product([0, 0, 48, 1, 64, 224]), "not inside y's 208"),
        (lambda: product([0, 0, 48, 1]), "triples"),
        (lambda: product([-1, 0, 48]), r"linear -1 is not in"),
        (lambda: product([0, 0, 48], torch.ones(3)), "changes must come from prepare_changes"),
        (lambda: product([0, 0, 48], cpu.prepared(work)), "changes must come from prepare_changes"),
        (lambda: product([0, 0, 48], None, torch.empty(0)), "changes must come from prepare_changes"),
        (lambda: used(x[:41]), "x has 41 rows and the terms are of 42"),
        (lambda: used(x, cpu.pack_weight(case.weight[:128])), "is not what pack_weight makes of 208 outputs"),
        (lambda: used(x[:, :64], cpu.pack_weight(case.weight[:, :64])), "x has 64 inputs and the terms are of 77"),
        (lambda: used(x, terms=torch.empty(0)), "terms must come from group_terms"),
        (lambda: used(x, terms=found), "terms must come from group_terms"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
    with pytest.raises(DeviceMismatch):
        cpu.changes(VectorTables(3, 4, "meta"), work)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize("size", [3, 16, 77])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_take_differences_of_gains(dtype, size, offset, cpu_backend):
    tables = VectorTables(2, 4)
    deltas = {slot: afloat(randn(size, seed=slot, scale=0.3), NAN) for slot in (0, 3)}
    for slot, delta in deltas.items():
        tables.set(1, slot, delta)
    x, weight = randn(42, size, dtype=dtype, scale=3.0), randn(size, dtype=dtype, seed=9)
    work = build_work_list(BINDINGS)
    found = cpu.rms_norm_changed(x, weight, 1e-5, offset, cpu.changes(tables, work), 1, DEPTH)
    plain = cpu.rms_norm(x, weight, 1e-5, offset)
    gains = []
    for parts in BINDINGS:
        gain = offset + weight.double()
        for slot, first, last in parts:
            if slot in deltas:
                gain = gain + (first + (last - first) * DEPTH) * deltas[slot].double()
        gains.append(gain)
    wide = x.double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * torch.stack(gains)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=eps if dtype is not torch.float32 else 1e-5, atol=1e-5)
    for row, parts in enumerate(BINDINGS):
        is_same = not any(slot in deltas and (first or last) for slot, first, last in parts)
        assert torch.equal(found[row], plain[row]) == is_same, row
    with pytest.raises(ValueError, match=r"linear 2 is not in 0\.\.1"):
        cpu.rms_norm_changed(x, weight, 1e-5, offset, cpu.changes(tables, work), 2, DEPTH)
    tables.set(1, 0, None, deltas[0])
    with pytest.raises(ValueError, match="norm 1: a difference of the gain alone"):
        cpu.rms_norm_changed(x, weight, 1e-5, offset, cpu.changes(tables, work), 1, DEPTH)
