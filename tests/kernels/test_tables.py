from __future__ import annotations

import gc
import weakref

import pytest
import torch

from deltaserve_kernels import (
    BackendUnavailable,
    BlockTables,
    DeviceMismatch,
    DtypeMismatch,
    LoraTables,
    Misaligned,
    NormTables,
    NotContiguous,
    OutOfRange,
    ShapeMismatch,
    SparseTables,
    VectorTables,
    build_work_list,
    select,
    sparse_linear,
)
from deltaserve_kernels.pointer_tables import PointerTables
from deltaserve_kernels.triton_ops.jagged import to_csr

INDPTR = torch.tensor([0, 1, 3], dtype=torch.int32)
COLS = torch.tensor([4, 0, 2], dtype=torch.int32)


def test_lora_entries_hold_addresses_ranks_and_tensors():
    tables = LoraTables(3, 4)
    a, b_t = torch.randn(5, 8), torch.randn(5, 6)
    assert not tables.has_any(1)
    tables.set(1, 2, a, b_t)
    assert tables.has_any(1)
    assert not tables.has_any(0)
    assert tables.pointers[1, :, 2].tolist() == [a.data_ptr(), b_t.data_ptr()]
    assert tables.ranks[1, 2] == 5
    assert tables.ranks.sum() == 5
    assert tables.get(1, 2) == (a, b_t)
    tables.clear(2)
    assert not tables.has_any(1)
    assert not tables.pointers.any()
    assert not tables.ranks.any()
    tables.clear(2)


def test_tensors_live_exactly_as_long_as_their_entry():
    tables = LoraTables(1, 2)
    a = torch.randn(2, 8)
    watch = weakref.ref(a)
    tables.set(0, 0, a, torch.randn(2, 8))
    del a
    gc.collect()
    assert watch() is not None
    tables.set(0, 0, torch.randn(3, 8), torch.randn(3, 8))
    gc.collect()
    assert watch() is None
    assert tables.has_any(0)


def test_growth_keeps_entries():
    lora, sparse = LoraTables(2, 2), SparseTables(2, 2)
    lora.set(1, 1, torch.randn(3, 8), torch.randn(3, 4))
    sparse.set(1, 1, INDPTR, COLS, torch.ones(3))
    before = lora.pointers[1, :, 1].tolist(), sparse.pointers[1, :, 1].tolist()
    for tables in (lora, sparse):
        tables.grow(5)
    assert (lora.pointers[1, :, 1].tolist(), sparse.pointers[1, :, 1].tolist()) == before
    assert lora.ranks.shape == (2, 5)
    assert sparse.extents[1, :, 1].tolist() == [3, 5]
    lora.set(0, 4, torch.randn(1, 8), torch.randn(1, 4))
    with pytest.raises(OutOfRange):
        lora.grow(4)


@pytest.mark.parametrize(
    ("a", "b_t", "error"),
    [
        (torch.randn(2, 8).int(), torch.randn(2, 4), DtypeMismatch),
        (torch.randn(2, 8).double(), torch.randn(2, 4).double(), DtypeMismatch),
        (torch.randn(2, 8), torch.randn(2, 4).bfloat16(), DtypeMismatch),
        (torch.randn(2, 8).half(), torch.randn(2, 4).half(), DtypeMismatch),
        (torch.randn(2, 8), torch.randn(3, 4), ShapeMismatch),
        (torch.randn(0, 8), torch.randn(0, 4), ShapeMismatch),
        (torch.randn(8), torch.randn(2, 4), ShapeMismatch),
        (torch.randn(2, 9), torch.randn(2, 4), ShapeMismatch),
        (torch.randn(2, 8), torch.randn(2, 5), ShapeMismatch),
        (torch.randn(8, 2).t(), torch.randn(2, 4), NotContiguous),
        (torch.randn(17)[1:].view(2, 8), torch.randn(2, 4), Misaligned),
    ],
)
def test_lora_refusals_leave_the_table_as_it_was(a, b_t, error):
    tables = LoraTables(2, 2)
    kept = torch.randn(3, 8), torch.randn(3, 4)
    tables.set(0, 0, *kept)
    with pytest.raises(error):
        tables.set(0, 0, a, b_t)
    assert tables.get(0, 0) == kept
    assert tables.ranks.tolist() == [[3, 0], [0, 0]]


@pytest.mark.parametrize(("linear", "slot"), [(-1, 0), (2, 0), (0, -1), (0, 2)])
def test_places_outside_the_table_are_refused(linear, slot):
    with pytest.raises(OutOfRange):
        LoraTables(2, 2).set(linear, slot, torch.randn(1, 4), torch.randn(1, 4))
    with pytest.raises(OutOfRange):
        SparseTables(2, 2).set(linear, slot, INDPTR, COLS, torch.ones(3))
    if linear == 0:
        with pytest.raises(OutOfRange):
            LoraTables(2, 2).clear(slot)


@pytest.mark.parametrize(
    ("indptr", "cols", "values", "error"),
    [
        (INDPTR.long(), COLS, torch.ones(3), DtypeMismatch),
        (INDPTR, COLS.long(), torch.ones(3), DtypeMismatch),
        (INDPTR, COLS, torch.ones(3).int(), DtypeMismatch),
        (INDPTR, COLS, torch.ones(2), ShapeMismatch),
        (INDPTR[:1].clone(), COLS[:0].clone(), torch.ones(0), ShapeMismatch),
        (INDPTR, COLS.view(1, 3), torch.ones(3), ShapeMismatch),
        (torch.tensor([1, 1, 3], dtype=torch.int32), COLS, torch.ones(3), OutOfRange),
        (torch.tensor([0, 1, 2], dtype=torch.int32), COLS, torch.ones(3), OutOfRange),
        (torch.tensor([0, 4, 3], dtype=torch.int32), COLS, torch.ones(3), OutOfRange),
        (INDPTR, torch.tensor([0, -1, 2], dtype=torch.int32), torch.ones(3), OutOfRange),
        (torch.tensor([0, 1, 2, 3], dtype=torch.int32), COLS, torch.ones(3), ShapeMismatch),
    ],
)
def test_sparse_refusals_leave_the_table_as_it_was(indptr, cols, values, error):
    tables = SparseTables(1, 2)
    tables.set(0, 1, INDPTR, COLS, torch.ones(3))
    with pytest.raises(error):
        tables.set(0, 0, indptr, cols, values)
    assert tables.get(0, 0) is None
    assert tables.extents.tolist() == [[[0, 3], [0, 5]]]


def test_a_sparse_entry_may_be_empty():
    tables = SparseTables(1, 1)
    tables.set(0, 0, torch.zeros(3, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0))
    assert tables.has_any(0)
    assert tables.extents[0, :, 0].tolist() == [0, 0]


def test_a_whole_adapter_is_set_as_linear_by_linear():
    terms = [(i, torch.randn(i + 1, 8), torch.randn(i + 1, 6)) for i in (2, 0, 1)]
    deltas = [(i, INDPTR.clone(), COLS.clone(), torch.randn(3)) for i in (1, 2)]
    singly, whole = (LoraTables(3, 4), SparseTables(3, 4)), (LoraTables(3, 4), SparseTables(3, 4))
    for term in terms:
        singly[0].set(term[0], 2, *term[1:])
    for delta in deltas:
        singly[1].set(delta[0], 2, *delta[1:])
    whole[0].set_all(2, terms)
    whole[1].set_all(2, [(index, whole[1].scan(*tensors)) for index, *tensors in deltas])
    for one, other in zip(singly, whole, strict=True):
        assert torch.equal(one.pointers, other.pointers)
        assert torch.equal(one.dims, other.dims)
        assert [one.has_any(i) for i in range(3)] == [other.has_any(i) for i in range(3)]
    assert torch.equal(singly[0].ranks, whole[0].ranks)
    assert torch.equal(singly[1].extents, whole[1].extents)
    whole[0].set_all(3, [])


def test_a_refused_term_leaves_nothing_of_its_adapter():
    tables = LoraTables(3, 4)
    tables.set(1, 0, torch.randn(2, 8), torch.randn(2, 6))
    good = (0, torch.randn(2, 8), torch.randn(2, 6))
    for bad in (
        (1, torch.randn(2, 9), torch.randn(2, 6)),
        (3, torch.randn(2, 8), torch.randn(2, 6)),
        (2, torch.randn(2, 8).half(), torch.randn(2, 6).half()),
        good,
    ):
        with pytest.raises((ShapeMismatch, OutOfRange, DtypeMismatch)):
            tables.set_all(2, [good, bad])
        assert not tables.has_any(0)
        assert not tables.pointers[:, :, 2].any()


def test_slots_and_ranks_are_known_on_the_host():
    """What decides, without looking at a device, which graph a step takes."""
    tables = LoraTables(3, 4)
    assert (tables.rank_in_use, tables.rank_capacity, tables.has_slot(2)) == (16, 16, False)
    tables.reserve_rank(65)
    tables.set(1, 2, torch.randn(5, 8), torch.randn(5, 6))
    tables.set(0, 2, torch.randn(17, 8), torch.randn(17, 6))
    assert tables.has_slot(2)
    assert (tables.largest_rank(2), tables.largest_rank(1)) == (17, 0)
    assert (tables.rank_in_use, tables.rank_capacity) == (32, 80)
    assert (tables.shape_of(1), tables.shape_of(2)) == ((8, 6), (0, 0))
    tables.clear(2)
    assert (tables.has_slot(2), tables.largest_rank(2)) == (False, 0)
    tables.set(1, 3, torch.randn(100, 8), torch.randn(100, 6))
    assert (tables.rank_in_use, tables.rank_capacity) == (112, 112)


def test_tables_without_csr_say_the_same_and_hold_one_form():
    """Also of entries scanned by tables that hold both; the C++ operators, which read CSR, do not take them."""
    both, alone = SparseTables(2, 2), SparseTables(2, 2, has_csr=False)
    values = torch.tensor([1.0, 2.0, 3.0])
    for linear, entry in enumerate((alone.scan(INDPTR, COLS, values), both.scan(INDPTR, COLS, values))):
        alone.set_all(1, [(linear, entry)])
        both.set(linear, 1, INDPTR, COLS, values)
    assert not alone.pointers.any()
    assert alone.extents[:, :, 1].tolist() == [[0, 5], [0, 5]]
    for linear in range(2):
        assert dense_from(alone, linear, 1, (2, 5)).tolist() == [[0, 0, 0, 0, 1], [2, 0, 3, 0, 0]]
        assert [t.tolist() for t in alone.get(linear, 1)] == [t.tolist() for t in (INDPTR, COLS, values)]
    assert (alone.get(0, 0), alone.shape_of(0)) == (None, (0, 2))
    with pytest.raises(ShapeMismatch, match="no CSR form"):
        both.set_all(0, [(0, alone.scan(INDPTR, COLS, values))])
    x, members = torch.randn(3, 5), [(0, 0, 2), (1, 2, 4)]
    work = build_work_list([((1, 1.0, 0.5),), (), ((1, 2.0, 2.0),)])
    results = []
    for tables in (both, alone):
        results.append(torch.ones(3, 4))
        sparse_linear(results[-1], x, work, tables, members, 0.5, backend="reference")
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.ones(3, 4))
    if select("cpu") == "cpu":
        with pytest.raises(BackendUnavailable, match="jagged"):
            sparse_linear(torch.ones(3, 4), x, work, alone, members, 0.5)


def test_an_entry_is_set_where_it_is():
    """Scanned on the host for a device: brought over by ``to``, refused before."""
    tables = SparseTables(1, 1, "meta")
    entry = tables.scan(INDPTR, COLS, torch.ones(3))
    with pytest.raises(DeviceMismatch):
        tables.set_all(0, [(0, entry)])
    assert not tables.has_any(0)
    tables.set_all(0, [(0, entry.to(tables.device))])
    assert tables.has_any(0)
    with pytest.raises(DeviceMismatch):
        SparseTables(1, 1).scan(INDPTR, COLS, torch.ones(3, device="meta"))


@pytest.mark.parametrize("kind", [LoraTables, SparseTables, BlockTables, VectorTables, NormTables])
def test_every_array_grows_and_is_cleared(kind: type[PointerTables]):
    tables = kind(3, 2)
    arrays = [name for name, value in vars(tables).items() if isinstance(value, torch.Tensor) and name != "dims"]
    held = [name for name in kind.ARRAYS if getattr(tables, name) is not None]
    assert sorted(arrays) == sorted(held)  # a kind that forgets to name one keeps addresses of freed memory
    for name in held:
        getattr(tables, name).fill_(7)
    tables.grow(4)
    tables.clear(1)
    for name in held:
        array = getattr(tables, name)
        assert [bool((array[..., slot] == 7).all()) for slot in range(4)] == [True, False, False, False]
        assert not array[..., 1:].any()


def dense_from(tables: SparseTables, linear: int, slot: int, shape: tuple[int, int]) -> torch.Tensor:
    """What the jagged form of an entry says, after its addresses are found in the table."""
    twin = tables._jagged[linear, slot]
    assert tables.keep_jagged()[linear, :, slot].tolist() == [tensor.data_ptr() for tensor in twin.tensors]
    indptr, cols, values = to_csr(twin)
    dense = torch.zeros(shape)
    dense[torch.repeat_interleave(torch.arange(shape[0]), indptr.diff()), cols.long()] = values
    return dense


def test_the_jagged_form_follows_the_entries():
    tables = SparseTables(2, 2)
    early = tables.scan(INDPTR, COLS, torch.tensor([1.0, 2.0, 3.0]))
    tables.set(1, 0, INDPTR, COLS, torch.tensor([4.0, 5.0, 6.0]))
    assert tables.jagged_pointers is None
    tables.keep_jagged()
    assert dense_from(tables, 1, 0, (2, 5)).tolist() == [[0, 0, 0, 0, 4], [5, 0, 6, 0, 0]]
    tables.set_all(1, [(0, early)])  # scanned when the form was not kept yet
    assert dense_from(tables, 0, 1, (2, 5)).tolist() == [[0, 0, 0, 0, 1], [2, 0, 3, 0, 0]]
    late = tables.scan(INDPTR, COLS, torch.tensor([7.0, 8.0, 9.0]))
    assert late.jagged is not None
    tables.set_all(0, [(1, late)])
    tables.grow(3)
    assert dense_from(tables, 1, 0, (2, 5)).tolist() == [[0, 0, 0, 0, 7], [8, 0, 9, 0, 0]]
    tables.clear(0)
    assert not tables.keep_jagged()[:, :, 0].any()
    assert list(tables._jagged) == [(0, 1)]
    wide = torch.tensor([0, 0, 1 << 16], dtype=torch.int32)
    with pytest.raises(OutOfRange, match="16 bits"):
        tables.set(1, 2, INDPTR, wide, torch.ones(3))
    assert not tables.has_slot(2)
    asked = SparseTables(1, 1)
    with torch.inference_mode():  # a pass may be the first to ask
        asked.keep_jagged()
    asked.set(0, 0, INDPTR, COLS, torch.ones(3))
    asked.clear(0)
