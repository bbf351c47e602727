"""A work list is checked and taken apart once, and what comes of it fits no other step and cannot be made by others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltaserve_kernels import WorkList, build_work_list, cpu, lora_linear, sparse_linear
from deltatest.kernel_cases import LinearCase, randn

BINDINGS = [(), ((0, 1.0, 0.5),), ((2, 1.0, 1.0), (0, -1.0, 1.0)), ((0, 1.0, 0.5),)]


def filled() -> LinearCase:
    case = LinearCase(30, [(0, 0, 16), (1, 16, 48)], 3)
    for slot in range(3):
        case.add_lora(slot, 2 + slot)
        case.add_sparse(slot, 0.2)
    return case


def added(kind: str, case: LinearCase, work: WorkList) -> torch.Tensor:
    x, y = randn(len(BINDINGS), 30, seed=3), torch.zeros(len(BINDINGS), 48)
    operator = lora_linear if kind == "lora" else sparse_linear
    operator(y, x, work, case.tables(kind), case.members, 0.25, backend="cpu")
    return y


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_one_list_is_prepared_once_for_every_operator(kind, cpu_backend):
    case, work = filled(), build_work_list(BINDINGS)
    assert work.prepared is None
    first = added(kind, case, work)
    prepared = work.prepared
    assert prepared is not None
    assert first.any()
    assert torch.equal(added(kind, case, work), first)
    added("sparse" if kind == "lora" else "lora", case, work)
    assert work.prepared is prepared
    assert replace(work).prepared is None


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_later_changes_of_the_list_reach_nothing(kind, cpu_backend):
    case, work = filled(), build_work_list(BINDINGS)
    first = added(kind, case, work)
    for tensor in (work.rows, work.item_rows, work.item_parts, work.part_slot):
        tensor.fill_(1 << 30)
    assert torch.equal(added(kind, case, work), first)
    with pytest.raises(ValueError, match=r"item_rows must rise|row 1073741824"):
        added(kind, case, replace(work))


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_a_prepared_list_fits_its_step_and_tables_alone(kind, cpu_backend):
    case, work = filled(), build_work_list(BINDINGS)
    added(kind, case, work)
    operator = getattr(torch.ops.deltaserve_cpu, f"{kind}_linear")
    tables, columns = case.tables(kind), [0, 0, 16, 1, 16, 48]
    numbers = tables.ranks if kind == "lora" else tables.extents
    whole = (tables.pointers, numbers, tables.dims)
    fewer = (tables.pointers[..., :2].contiguous(), numbers[..., :2].contiguous(), tables.dims)
    for rows, prepared, held, words in (
        (3, work.prepared, whole, "x has 3 rows"),
        (5, work.prepared, whole, "x has 5 rows"),
        (4, work.prepared, fewer, "slot 2 is not in"),
        (4, torch.empty(0, dtype=torch.uint8), whole, "prepare_work"),
        (4, torch.zeros(4096, dtype=torch.uint8), whole, "prepare_work"),
        (4, work.prepared.clone(), whole, "prepare_work"),
    ):
        y = torch.zeros(rows, 48)
        with pytest.raises(ValueError, match=words):
            operator(y, randn(rows, 30), prepared, *held, columns, 0.0)
        assert not y.any()


def test_the_fused_product_asks_the_same(cpu_backend):
    case, work = LinearCase(30, [(0, 0, 16), (1, 16, 48)], 3, torch.bfloat16), build_work_list(BINDINGS)
    case.add_lora(0, 2)
    case.add_lora(2, 3)
    packed = cpu.pack_weight(randn(48, 30, dtype=torch.bfloat16))
    columns, tables = [0, 0, 16, 1, 16, 48], case.tables("lora")
    cpu.packed_linear_lora(randn(4, 30, dtype=torch.bfloat16), packed, 48, None, work, tables, columns, 0.0)
    fused = torch.ops.deltaserve_cpu.packed_linear_lora
    held = (tables.pointers, tables.ranks, tables.dims, columns, 0.0)
    with pytest.raises(ValueError, match="x has 3 rows"):
        fused(randn(3, 30, dtype=torch.bfloat16), packed, 48, None, work.prepared, *held)
    with pytest.raises(ValueError, match="prepare_work"):
        fused(randn(4, 30, dtype=torch.bfloat16), packed, 48, None, packed, *held)
