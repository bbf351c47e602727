"""Adapters of every kind in the tables of one base, and sequences that use them in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.adapters.device_pool import DevicePool
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.engine.batch import ScheduledPart
from deltaserve.model.base import BaseModel
from deltatest.paged_driver import PagedDriver


class MixedBatch:
    """Adapters by name; ``logits`` runs sequences together, each with an adapter at a strength."""

    def __init__(self, base: BaseModel, num_slots: int = 16) -> None:
        self.base = base
        tables = replace(DeltaTables.of(base, num_slots), prefixes=None)
        self.pool = DevicePool(tables, num_slots=num_slots, max_bytes=1 << 30)
        self.slots: dict[str, int] = {}
        self.driver = PagedDriver(base, tables, num_blocks=128)

    def load(self, name: str, folded: FoldedAdapter) -> None:
        staged = self.pool.convert(folded)
        slot = self.pool.reserve(name, staged.nbytes)
        self.pool.install(slot, self.pool.stage(staged))
        self.slots[name] = slot
        self.pool.check_integrity()

    def load_all(self, adapters: Mapping[str, FoldedAdapter]) -> MixedBatch:
        for name, folded in adapters.items():
            self.load(name, folded)
        return self

    def reload(self, name: str, path: Path) -> None:
        """Evict the adapter, spoil what its slot pointed at, and read it from its folded file again."""
        self.pool.release(self.slots.pop(name))
        self.load(name, FoldedAdapter.load(path, self.base.spec, self.base.dtype))

    def logits(
        self, ids: Sequence[Sequence[int]], names: Sequence[str | tuple[str, float] | None], *, chunk: int = 1 << 30
    ) -> list[Tensor]:
        parts = []
        for name in names:
            name, scale = name if isinstance(name, tuple) else (name, 1.0)
            parts.append(() if name is None else (ScheduledPart(self.slots[name], scale, scale),))
        return [rows.clone() for rows in self.driver.logits(ids, parts, chunk=chunk)]


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def prompts(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in lengths]
