"""Where the base's product takes vectors into its sums, rows get what the operators one by one give them, and nobody
feels who is beside them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from deltaserve.engine.batch import ScheduledPart, ScheduledSequence
from deltaserve.model.kv_cache import KVCache
from deltaserve.model.vectors import prepared
from deltaserve_kernels import VectorEntries, VectorEntry, VectorFamily, cpu, split_runs
from deltatest.fixture_of_load import TINY
from loadtest.kind_adapters import BY_NAME
from loadtest.kind_steps import Stand, base_of

NAMES = ("lora", "ia3", "dora", "bias", "norms", "gates", "oft", "boft", "road", "sparse")
Parts = tuple[ScheduledPart, ...]


ROTATIONS = ("oft", "boft", "road")


@pytest.fixture(scope="module", params=[(torch.bfloat16, True), (torch.float16, True), (torch.float16, False)])
def stand(request: pytest.FixtureRequest) -> Stand:
    """Without adapters that rotate inputs, scales of inputs go another way: into the product itself."""
    dtype, has_rotations = request.param
    torch.manual_seed(0)
    base = base_of(TINY, dtype)
    if not all(base.linear(name).group.joining is not None for name in base.linears):
        pytest.skip("this processor's library multiplies 16-bit weights itself")
    stand = Stand(base, KVCache(base.kv_layout, 64, "cpu"), len(NAMES), 0)
    for slot, name in enumerate(NAMES):
        if has_rotations or name not in ROTATIONS:
            stand.fill(BY_NAME[name], [slot])
    return stand


def logits(stand: Stand, rows: Sequence[Parts], *, has_prompt: bool = True) -> Tensor:
    """[rows, vocab] of a decode step after a prompt of seven tokens, each row with its adapters throughout."""
    prompts = [ScheduledSequence(i, range(9, 16), 0, (i,), parts, "none") for i, parts in enumerate(rows)]
    if has_prompt:
        stand.runner.execute(prompts)
    steps = [ScheduledSequence(i, (5,), 7, (i,), parts) for i, parts in enumerate(rows)]
    return stand.runner.execute(steps).clone()


def part(name: str, scale: float = 1.0) -> ScheduledPart:
    return ScheduledPart(NAMES.index(name), scale, scale)


def all_rows() -> list[Parts]:
    several = (part("lora", 0.5), part("dora", 0.5), part("bias", -1.0), part("norms"))
    return [(), *((part(name),) for name in NAMES), several, (part("road"), part("lora"))]


def test_rows_equal_the_operators_one_by_one(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = all_rows()
    joined = logits(stand, rows)
    for name in stand.base.linears:
        monkeypatch.setattr(stand.base.linear(name).group, "joining", None)
    apart = logits(stand, rows)
    plain = logits(stand, [()] * len(rows))
    for row, parts in enumerate(rows):
        is_same = torch.equal(joined[row], apart[row])
        error, effect = (joined[row] - apart[row]).norm(), (apart[row] - plain[row]).norm()
        assert is_same or error < 0.2 * effect, (row, parts, float(error), float(effect))
        vectors = stand.runner.vectors
        assert effect > 0 or not any(vectors is not None and vectors.has_slot(each.slot) for each in parts)
    assert torch.equal(joined[0], apart[0])
    assert torch.equal(joined[1], apart[1])


def test_company_is_not_felt(stand: Stand) -> None:
    rows = all_rows()
    together = logits(stand, rows)
    for row, parts in enumerate(rows):
        assert torch.equal(logits(stand, [parts])[0], together[row]), (row, parts)
        fewer = [parts, *rows[1 : 1 + row % 4]]
        assert torch.equal(logits(stand, fewer)[0], together[row]), (row, parts)


@pytest.mark.parametrize("name", NAMES)
def test_strength_0_is_the_base(stand: Stand, name: str) -> None:
    plain, nothing, _ = logits(stand, [(), (part(name, 0.0),), (part("ia3"), part(name, 0.0))])
    assert torch.equal(nothing, plain)


def test_what_was_found_out_about_the_tables_does_not_outlive_a_change(stand: Stand) -> None:
    """Groups look through the tables once; an adapter that comes or goes makes them look again."""
    fresh = Stand(stand.base, stand.kv, len(NAMES), 0)
    fresh.fill(BY_NAME["norms"], [0])
    of_slot = [(), (ScheduledPart(0),), (ScheduledPart(1),)]
    plain, _, nothing = logits(fresh, of_slot)
    assert torch.equal(nothing, plain)
    seen = []
    for name in ("bias", "ia3", "oft", "road"):
        fresh.fill(BY_NAME[name], [1])
        _, _, something = logits(fresh, of_slot, has_prompt=False)
        seen.append(something)
        assert all(not torch.equal(something, other) for other in (plain, *seen[:-1])), name
        assert fresh.runner.vectors is not None
        fresh.runner.vectors.clear(1)
        if name != "oft":  # "road" comes into the slot of "oft" with no other step between
            assert torch.equal(logits(fresh, of_slot, has_prompt=False)[2], plain), name


@pytest.mark.parametrize("beside", ["lora", "dora"])
def test_rotated_outputs_have_the_bits_of_the_operators(
    stand: Stand, beside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turned in place where tables hold no scales of these outputs (beside "lora"), from a copy where they do."""
    fresh = Stand(stand.base, stand.kv, len(NAMES), 0)
    for name in ("road", beside):
        fresh.fill(BY_NAME[name], [NAMES.index(name)])
    rows = [(), (part("road"),), (part("road"), part(beside, 0.5)), (part("road", -0.5),), (part(beside),)]
    joined, plain = logits(fresh, rows), logits(fresh, [()] * len(rows))
    for name in stand.base.linears:
        monkeypatch.setattr(stand.base.linear(name).group, "joining", None)
    apart = logits(fresh, rows)
    assert torch.equal(joined[:4], apart[:4])
    assert all(not torch.equal(joined[row], plain[row]) for row in range(1, len(rows)))


def test_what_groups_found_holds_until_tables_change(stand: Stand) -> None:
    """Equal steps one after another, while a slot of their rows gets one kind after another, or none."""
    fresh = Stand(stand.base, stand.kv, 2, 0)
    fresh.fill(BY_NAME["bias"], [0])
    rows: list[Parts] = [(), (ScheduledPart(0),), (ScheduledPart(0), ScheduledPart(1)), (ScheduledPart(1),)]
    logits(fresh, rows)  # the prompts, whose K and V stay as they are
    steps = [ScheduledSequence(i, (5,), 7, (i,), parts) for i, parts in enumerate(rows)]
    before = None
    for name in ("", "lora", "", "sparse", "blocks", "road", "", "ia3", "signs", ""):
        fresh.tables.clear(1)
        if name:
            fresh.fill(BY_NAME[name], [1])
        found = fresh.runner.execute(steps).clone()
        assert torch.equal(found, fresh.new_runner().execute(steps)), name
        for _ in range(2):  # by what the first of them found
            assert torch.equal(fresh.runner.execute(steps), found), name
        if before is not None:
            assert torch.equal(found[:2], before[:2]), name
            assert not torch.equal(found[2], before[2]), name
            assert not torch.equal(found[3], before[3]), name
        before = found


def test_what_was_found_in_the_tables_holds_until_they_change() -> None:
    if not cpu.is_available():
        pytest.skip(f"no C++ operators here: {cpu.unavailable_reason()}")
    family = VectorFamily(2, 1, 3)
    family.set_all(0, VectorEntries(outputs=((1, VectorEntry(None, torch.ones(16))),)))
    step = split_runs([(0, 1, ((0, 1.0, 1.0),)), (1, 1, ((2, 1.0, 1.0),))], 2, family)
    assert step is not None
    first = prepared(step)
    assert first.outputs is not None
    assert first.inputs is None
    assert first.norms is None
    assert prepared(step) is first
    family.clear(0)
    family.set_all(0, VectorEntries(norms=((0, VectorEntry(torch.ones(16), None)),)))
    second = prepared(step)
    assert second.outputs is None
    assert second.norms is not None
