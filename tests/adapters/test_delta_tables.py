"""Tables of all families are made, emptied and missed in one place."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from deltaserve.adapters.delta_tables import NAMES, DeltaTables
from deltaserve.adapters.device_pool import DevicePool
from deltaserve.model.base import BaseModel
from deltatest.fixture_of_load import TINY
from loadtest.kind_adapters import BY_NAME
from loadtest.kind_steps import base_of

# An adapter of each family; a mask is one of the sparse.
KIND_OF = {
    "lora": "lora",
    "sparse": "sparse",
    "vectors": "norms",
    "apart": "houlsby",
    "vocabulary": "tokens",
    "blocks": "blocks",
    "prefixes": "prefix",
}


@pytest.fixture(scope="module")
def base() -> BaseModel:
    torch.manual_seed(0)
    return base_of(TINY, torch.float32)


def test_every_family_is_served_and_known_here(base: BaseModel) -> None:
    families = [field.name for field in fields(DeltaTables) if field.name not in NAMES]
    assert families == list(KIND_OF)
    tables = DeltaTables.of(base, 3)
    assert [getattr(tables, name) for name in families] == list(tables.served())
    assert [family.num_slots for family in tables.served()] == [3] * len(families)
    assert not list(DeltaTables().served())


@pytest.mark.parametrize("family", KIND_OF)
def test_a_slot_is_filled_emptied_and_refused_without_its_family(base: BaseModel, family: str) -> None:
    tables = DeltaTables.of(base, 2)
    pool = DevicePool(tables, num_slots=2, max_bytes=1 << 30)
    folded = BY_NAME[KIND_OF[family]].make(base)
    staged = pool.stage(pool.convert(folded))
    slot = pool.reserve("v", staged.nbytes)
    pool.install(slot, staged)
    assert [each for each in tables.served() if each.has_slot(slot)] == [getattr(tables, family)]
    pool.release(slot)
    assert not any(each.has_slot(0) or each.has_slot(1) for each in tables.served())
    without = replace(tables, **{family: None})
    with pytest.raises(ValueError, match="this pool has no tables for"):
        DevicePool(without, num_slots=2, max_bytes=1 << 30).convert(folded)


def test_a_pool_asks_for_no_more_slots_than_all_tables_have(base: BaseModel) -> None:
    tables = replace(DeltaTables.of(base, 3), prefixes=DeltaTables.of(base, 2).prefixes)
    with pytest.raises(ValueError, match="3 slots asked for; the tables have 3, 3, 3, 3, 3, 3, 2"):
        DevicePool(tables, num_slots=3, max_bytes=1)
