from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve_kernels import KernelError, OutOfRange, PaddedLayout, WorkList, build_work_list, build_work_list_runs

A, B = (3, 1.0, 1.0), (5, 0.5, 2.0)


def rows_by_binding(work: WorkList) -> dict[tuple[tuple[int, float, float], ...], list[int]]:
    rows, item_rows, item_parts = work.rows.tolist(), work.item_rows.tolist(), work.item_parts.tolist()
    slots, scales = work.part_slot.tolist(), work.part_scale.tolist()
    found = {}
    for item in range(work.num_items):
        parts = tuple((slots[p], *scales[p]) for p in range(item_parts[item], item_parts[item + 1]))
        assert parts not in found, "one binding makes one item"
        found[parts] = rows[item_rows[item] : item_rows[item + 1]]
    return found


def test_rows_of_one_binding_meet_in_one_item_and_base_rows_are_absent():
    work = build_work_list([(A,), (), (A, B), (A,), (), (B,)])
    work.validate()
    assert work.num_rows == 6
    assert rows_by_binding(work) == {(A,): [0, 3], (A, B): [2], (B,): [5]}
    assert (work.rows.dtype, work.part_scale.dtype) == (torch.int32, torch.float32)


@pytest.mark.parametrize("bindings", [[], [()], [(), (), ()]])
def test_a_step_without_adapters_is_empty(bindings):
    work = build_work_list(bindings)
    work.validate()
    assert work.is_empty
    assert work.num_items == 0
    assert work.num_rows == len(bindings)


def test_order_of_parts_and_scale_make_different_bindings():
    work = build_work_list([(A, B), (B, A), (A, (5, 0.5, 1.0))])
    assert work.num_items == 3


def test_runs_join_across_sequences_and_may_come_in_any_order():
    work = build_work_list_runs([(6, 2, (A,)), (0, 3, (A,)), (3, 0, (B,)), (4, 1, (A, B))], num_rows=9)
    work.validate()
    assert rows_by_binding(work) == {(A,): [0, 1, 2, 6, 7], (A, B): [4]}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([(), (A,), (B,), (A, B)])), max_size=12))
def test_runs_and_rows_agree(runs):
    starts, flat = [], []
    for count, parts in runs:
        starts.append((len(flat), count, parts))
        flat += [parts] * count
    from_runs, from_rows = build_work_list_runs(starts, len(flat)), build_work_list(flat)
    from_runs.validate()
    assert rows_by_binding(from_runs) == rows_by_binding(from_rows)


def padded(bindings, num_rows):
    layout = PaddedLayout(num_rows)
    buffer = np.full(layout.size, -7, dtype=np.int32)
    layout.fill(buffer, bindings)
    return layout.work_list(torch.from_numpy(buffer))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([(), (A,), (B,), (A, B)]), max_size=12))
def test_a_padded_list_holds_what_a_plain_one_does(bindings):
    plain, wide = build_work_list(bindings), padded(bindings, 12)
    wide.validate()
    assert wide.is_padded
    assert not wide.is_empty
    assert (wide.num_rows, wide.num_items) == (12, 12)
    count = plain.num_items
    found = rows_by_binding(
        dataclasses.replace(wide, item_rows=wide.item_rows[: count + 1], item_parts=wide.item_parts[: count + 1])
    )
    assert found == rows_by_binding(plain)
    assert plain.num_planes == sum(map(len, bindings)) <= wide.num_planes
    assert set(wide.item_rows[count:].tolist()) == {plain.rows.numel()}


def test_a_padded_list_of_64_rows_is_small_and_says_what_it_has_no_room_for():
    layout = PaddedLayout(64)
    assert layout.size * 4 == 1640
    assert layout.fits([((row, 1.0, 1.0),) for row in range(64)])
    assert layout.fits([((row % 4, 1.0, 1.0), (5, 1.0, 1.0)) for row in range(64)])
    assert not layout.fits([((row, 1.0, 1.0), (65, 1.0, 1.0)) for row in range(64)])
    assert not layout.fits([(A,)] * 65)
    assert not PaddedLayout(1).fits([tuple((slot, 1.0, 1.0) for slot in range(9))])
    with pytest.raises(OutOfRange, match="no room"):
        layout.fill(np.zeros(layout.size, dtype=np.int32), [(A,)] * 65)


@pytest.mark.parametrize(("name", "place", "value"), [("item_rows", 2, 1), ("item_parts", 1, 0), ("rows", 1, 0)])
def test_a_padded_list_that_is_wrong_is_refused(name, place, value):
    work = padded([(A,), (A,), (B,)], 5)
    getattr(work, name)[place] = value
    with pytest.raises(KernelError):
        work.validate()


@pytest.mark.parametrize(
    "runs",
    [[(0, 2, (A,)), (1, 1, (B,))], [(2, 2, (A,))], [(-1, 1, (A,))], [(0, -1, (A,))], [(0, 1, ((-1, 1.0, 1.0),))]],
)
def test_runs_that_overlap_or_leave_the_step_are_refused(runs):
    with pytest.raises(OutOfRange):
        build_work_list_runs(runs, num_rows=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", torch.tensor([0, 0], dtype=torch.int32)),
        ("rows", torch.tensor([0, 9], dtype=torch.int32)),
        ("rows", torch.tensor([0, -1], dtype=torch.int32)),
        ("rows", torch.tensor([0, 1])),
        ("item_rows", torch.tensor([0, 1], dtype=torch.int32)),
        ("item_rows", torch.tensor([0, 0, 2], dtype=torch.int32)),
        ("item_parts", torch.tensor([1, 1], dtype=torch.int32)),
        ("part_scale", torch.ones(1, 3)),
    ],
)
def test_validate_refuses_broken_lists(name, value):
    good = {
        "num_rows": 2,
        "rows": torch.tensor([0, 1], dtype=torch.int32),
        "item_rows": torch.tensor([0, 2], dtype=torch.int32),
        "item_parts": torch.tensor([0, 1], dtype=torch.int32),
        "part_slot": torch.tensor([4], dtype=torch.int32),
        "part_scale": torch.ones(1, 2),
    }
    WorkList(**good).validate()
    with pytest.raises(KernelError):
        WorkList(**{**good, name: value}).validate()
