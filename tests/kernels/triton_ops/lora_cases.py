"""Low-rank kernels in Triton's interpreter, each form against the dense float64 oracle; see test_interpreter.py.

fp32 and fp16 only: the interpreter multiplies bf16 bit patterns.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from deltaserve_kernels import (
    PaddedLayout,
    WorkList,
    build_work_list,
    build_work_list_runs,
    lora_linear,
    select,
)
from deltaserve_kernels.triton_ops import guard, lora
from deltaserve_kernels.triton_ops.tiles import row_tiles
from deltatest.kernel_cases import LinearCase, Parts, randn

TOLERANCE = {
    torch.float32: {"rtol": 0.0, "atol": 3e-5},
    torch.float16: {"rtol": 2**-11, "atol": 1e-4},
}
FORMS = {"by_row": lora.DECODE, "products": lora.PRODUCTS, "one_launch": lora.ONE_LAUNCH, "prefill": lora.PREFILL}
RANKS = [1, 3, 16, 17, 33]


def filled(in_features=77, widths=(48, 19, 130), dtype=torch.float32, num_slots=7) -> LinearCase:
    """Five slots with odd ranks, some without some members; the last two slots stay empty."""
    members, start = [], 0
    for linear, width in enumerate(widths):
        members.append((linear, start, start + width))
        start += width + 3
    case = LinearCase(in_features, members, num_slots, dtype)
    for slot, rank in enumerate(RANKS):
        case.add_lora(slot, rank, [linear for linear in range(len(widths)) if (slot + linear) % 4 != 3])
    return case


# Few distinct bindings: a program costs the interpreter milliseconds.
BINDINGS: list[Parts] = [(), ((0, 1.0, 0.5),), ((4, 0.5, 2.0), (1, -2.0, 1.0)), ((3, 1.0, 1.0),), ((5, 1.0, 1.0),)]


def bindings_of(num_rows: int) -> list[Parts]:
    return [BINDINGS[(row + 1 + row // 5) % 5] for row in range(num_rows)]


def run(case, bindings, x, y, form, depth=0.25, members=None) -> torch.Tensor:
    """In place, with K split where it can be."""
    form = replace(form, block_k=32) if form.fold else replace(form, block_k=32, split_k=32)
    lora.lora_linear(y, x, build_work_list(bindings), case.lora, members or case.members, depth, form)
    return y


def check(case, bindings, form, dtype=torch.float32, atol=None) -> None:
    x = randn(len(bindings), case.in_features, dtype=dtype)
    y = randn(len(bindings), case.width, dtype=dtype, seed=1)
    expected = case.expected("lora", y, x, bindings, 0.25)
    tolerance = TOLERANCE[dtype] if atol is None else {"rtol": 2**-11, "atol": atol}
    torch.testing.assert_close(run(case, bindings, x, y, form).double(), expected, **tolerance)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("num_rows", [0, 1, 63])
def test_mixed_ranks_parts_and_members(num_rows, form):
    check(filled(), bindings_of(num_rows), form)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_half_precision_is_rounded_once(form):
    """Prefill rounds h to 16 bits as well: 2^-11 of values near 2, some of 33 ranks, through B of size one."""
    check(filled(dtype=torch.float16), bindings_of(9), form, torch.float16, atol=4e-3 if form.fold else None)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("in_features", "widths"), [(1, (1,)), (16, (16,)), (129, (15, 17)), (32, (7, 9, 8, 5))])
def test_awkward_sizes(in_features, widths, form):
    """Four members go in two launches."""
    check(filled(in_features, widths), bindings_of(6), form)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_item_of_several_tiles(form):
    check(filled(widths=(40,)), [((2, 1.0, 1.0),)] * 70, form)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("binding", [(), ((6, 1.0, 1.0),)], ids=["base", "empty slot"])
def test_rows_without_a_delta_keep_their_bits(binding, form):
    case = filled()
    x, y = randn(5, 77), randn(5, case.width, seed=1)
    x[2], y[3, 7], y[3, 8] = float("nan"), float("nan"), -0.0
    out = run(case, [binding] * 5, x, y.clone(), form)
    assert torch.equal(out.view(torch.int32), y.view(torch.int32))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_nothing_around_the_operands_is_read_or_written(form):
    """Operands lie in seas of NaN: rows, columns and ranks beyond theirs, and other slots' adapters."""
    case = filled(in_features=40, widths=(24, 20))
    case.lora.clear(1)
    for linear, start, stop in case.members:
        a, b_t = torch.full((3, 40), float("nan")), torch.full((3, stop - start), float("nan"))
        case.lora.set(linear, 6, a, b_t)
        sea_a, sea_b = (torch.full((12, width), float("nan")) for width in (40, stop - start))
        sea_a[4:9], sea_b[4:9] = randn(5, 40, seed=linear), randn(5, stop - start, seed=linear + 9)
        case.lora.set(linear, 1, sea_a[4:9], sea_b[4:9])
        case.lora_dense[linear, 1] = sea_b[4:9].double().t() @ sea_a[4:9].double()
    wide_x, wide_y = torch.full((12, 80), float("nan")), torch.full((12, 120), float("nan"))
    x, y = wide_x[3:9, 8:48], wide_y[3:9, 16 : 16 + case.width]
    x.copy_(randn(6, 40))
    for _, start, stop in case.members:
        y[:, start:stop] = randn(6, stop - start, seed=start + 1)
    bindings: list[Parts] = [((1, 1.0, 1.0),), (), ((1, 1.0, 1.0),), ((0, 1.0, 1.0),), (), ((1, 1.0, 1.0),)]
    expected = torch.full((12, 120), float("nan"), dtype=torch.float64)
    expected[3:9, 16 : 16 + case.width] = case.expected("lora", y, x, bindings, 0.25)
    run(case, bindings, x, y, form)
    torch.testing.assert_close(wide_y.double(), expected, rtol=0.0, atol=1e-4, equal_nan=True)


def test_one_launch_equals_two_to_the_bit_and_replays():
    case = filled()
    bindings = bindings_of(14)
    x, y = randn(14, 77), randn(14, case.width, seed=1)
    two = run(case, bindings, x, y.clone(), lora.PRODUCTS)
    for _ in range(2):
        assert torch.equal(run(case, bindings, x, y.clone(), lora.ONE_LAUNCH), two)
    assert not lora.counters(1, x.device).any()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_row_has_the_same_bits_alone_and_in_company(form):
    case = filled()
    bindings = bindings_of(9)
    x, y = randn(9, 77), randn(9, case.width, seed=1)
    together = run(case, bindings, x, y.clone(), form)
    for row in (2, 3):
        alone = run(case, bindings[row : row + 1], x[row : row + 1], y[row : row + 1].clone(), form)
        assert torch.equal(alone[0], together[row])


def test_splits_depend_on_the_width_alone():
    assert [lora.PRODUCTS.splits(k) for k in (1, 64, 1023, 1024, 4096, 14336)] == [1, 1, 1, 2, 8, 16]
    assert [lora.DECODE.splits(k) for k in (1, 4096, 4097, 14336)] == [1, 1, 2, 4]
    for k in (1, 77, 4096, 14336):
        for form in (lora.PRODUCTS, lora.DECODE):
            assert form.splits(k) * form.chunk(k) >= k
    assert lora.PREFILL.splits(14336) == 1


def test_tiles_cover_every_row_once_and_are_built_once():
    bindings: list[Parts] = [((0, 1.0, 1.0),)] * 33 + [((1, 1.0, 1.0), (2, 1.0, 1.0))] * 16 + [((3, 1.0, 1.0),)]
    work = build_work_list(bindings)
    tiles = row_tiles(work, 16)
    assert row_tiles(work, 16) is tiles
    assert tiles.tile_item.tolist() == [0, 0, 0, 1, 2, -1]
    assert tiles.tile_first.tolist()[:5] == [0, 16, 32, 33, 49]
    assert (tiles.item_plane.tolist(), tiles.num_plane_rows) == ([0, 33, 65], 66)


def padded(bindings: list[Parts], num_rows: int) -> WorkList:
    """The same list with room for ``num_rows`` rows; what lies past the counts must not matter."""
    layout = PaddedLayout(num_rows)
    buffer = np.zeros(layout.size, dtype=np.int32)
    layout.fill(buffer, bindings)
    work = layout.work_list(torch.from_numpy(buffer))
    work.validate()
    work.rows[int(work.item_rows[-1]) :] = 10**6
    work.part_slot[int(work.item_parts[-1]) :] = 10**6
    return work


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("num_rows", [0, 1, 9])
def test_a_padded_list_gives_the_same_bits(num_rows, form, monkeypatch):
    monkeypatch.setattr(guard, "may_look", lambda tensor: False)
    case = filled()
    case.lora.reserve_rank(100)
    bindings = bindings_of(num_rows) + [()] * (12 - num_rows)
    x, y = randn(12, 77), randn(12, case.width, seed=1)
    expected = run(case, bindings, x, y.clone(), form)
    form = replace(form, block_k=32) if form.fold else replace(form, block_k=32, split_k=32)
    lora.lora_linear(y, x, padded(bindings, 12), case.lora, case.members, 0.25, form)
    assert torch.equal(y, expected)


def test_padded_tiles_are_those_of_the_plain_list():
    bindings: list[Parts] = [((0, 1.0, 1.0),)] * 33 + [()] * 7 + [((1, 1.0, 1.0), (2, 1.0, 1.0))] * 16
    plain, wide = (row_tiles(work, 16) for work in (build_work_list(bindings), padded(bindings, 200)))
    count = int((plain.tile_item >= 0).sum())
    assert plain.tile_item[:count].tolist() == wide.tile_item[:count].tolist() == [0, 0, 0, 1]
    assert plain.tile_first[:count].tolist() == wide.tile_first[:count].tolist() == [0, 16, 32, 33]
    assert set(wide.tile_item[count:].tolist()) == {-1}
    assert wide.item_plane[:2].tolist() == [0, 33]
    assert (wide.capacity, wide.num_plane_rows) == (200, 1600)


def test_tiles_of_hundreds_of_items():
    """More items than the kernel takes at a time, of one row to five."""
    bindings: list[Parts] = [((slot, 1.0, 1.0),) for slot in range(300) for _ in range(1 + slot % 5)]
    tiles = row_tiles(build_work_list(bindings), 2)
    expected = [slot for slot in range(300) for _ in range((2 + slot % 5) // 2)]
    assert tiles.tile_item[: len(expected)].tolist() == expected
    assert set(tiles.tile_item[len(expected) :].tolist()) <= {-1}
    assert tiles.item_plane.diff().tolist() == [1 + slot % 5 for slot in range(299)]


def test_the_operator_reaches_the_kernels_by_name_only():
    case = filled(widths=(12,))
    x, y = randn(1, 77), randn(1, case.width, seed=1)
    bindings: list[Parts] = [((1, 1.0, 1.0),)]
    expected = case.expected("lora", y, x, bindings, 0.0)
    lora_linear(y, x, build_work_list(bindings), case.lora, case.members, backend="triton")
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[torch.float32])
    assert select("cpu", "triton") == "triton"
    assert select("cpu", "auto") != "triton"


def test_a_step_with_prompts_takes_the_form_for_many_rows():
    case = filled(widths=(40,))
    parts: Parts = ((2, 1.0, 1.0),)
    x, y = randn(20, 77), randn(20, case.width, seed=1)
    for runs, form in (
        ([(0, 17, parts), (17, 1, parts)], lora.PREFILL),
        ([(i, 1, parts) for i in range(18)], lora.DECODE),
    ):
        work = build_work_list_runs(runs, 20)
        chosen, named = y.clone(), y.clone()
        lora.lora_linear(chosen, x, work, case.lora, case.members, 0.25)
        lora.lora_linear(named, x, work, case.lora, case.members, 0.25, form)
        assert torch.equal(chosen, named)
