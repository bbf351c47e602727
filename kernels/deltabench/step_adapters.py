"""Random adapters on every linear of a base, straight into the pointer tables: no store, no door."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltabench.cases import copy_of, draw
from deltabench.points import Point
from deltaserve.model.base import BaseModel
from deltaserve_kernels import LoraTables, SparseEntry, SparseTables

# Entries this size give about half of what a base's linear gives: a row with a wrong adapter shows in its logits.
LORA_SCALE = 0.5
SPARSE_SCALE = 0.1


def lora_tables(base: BaseModel, point: Point, only: Sequence[str] = ()) -> LoraTables:
    """Each adapter in memory of its own. ``only``: last parts of the names of the linears that have terms."""
    tables = LoraTables(len(base.linears), point.num_slots, base.device)
    for slot, rank in enumerate(point.all_ranks):
        entries = []
        for index, name in enumerate(base.linears):
            if only and name.rsplit(".", 1)[-1] not in only:
                continue
            spec = base.spec.linears[name]
            a = _normal(base, rank, spec.in_features, scale=spec.in_features**-0.5)
            entries.append((index, a, _normal(base, rank, spec.out_features, scale=LORA_SCALE * rank**-0.5)))
        tables.set_all(slot, entries)
    return tables


def sparse_tables(base: BaseModel, point: Point, density: float) -> SparseTables:
    """A few different deltas a shape, copied: each entry has memory of its own."""
    tables = SparseTables(len(base.linears), point.num_slots, base.device)
    drawn: dict[tuple[int, int], list[SparseEntry]] = {}
    for slot in range(point.num_slots):
        entries = []
        for index, name in enumerate(base.linears):
            spec = base.spec.linears[name]
            shape = (spec.out_features, spec.in_features)
            if shape not in drawn:
                drawn[shape] = draw(tables, *shape, density, base.dtype, scale=SPARSE_SCALE)
            some = drawn[shape]
            entries.append((index, copy_of(some[(slot + index) % len(some)])))
        tables.set_all(slot, entries)
    return tables


def adapter_width(base: BaseModel, only: Sequence[str]) -> int:
    """in + out of the named linears of one layer."""
    specs = base.spec.linears
    named = [specs[name] for name in base.linears if name.rsplit(".", 1)[-1] in only]
    return sum(spec.in_features + spec.out_features for spec in named) // base.spec.num_layers


def _normal(base: BaseModel, *shape: int, scale: float) -> Tensor:
    return torch.empty(*shape, dtype=base.dtype, device=base.device).normal_(std=scale)
