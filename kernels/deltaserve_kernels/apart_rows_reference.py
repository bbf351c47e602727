"""The operators of ``apart_rows`` in plain PyTorch: definition and oracle, which look into the list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from deltaserve_kernels import row_checks
from deltaserve_kernels.apart_family import ApartFamily, ApartItem, ApartStep
from deltaserve_kernels.apart_reference import dense_linear as by_items
from deltaserve_kernels.apart_reference import run_module
from deltaserve_kernels.base_weight import ReadWeight
from deltaserve_kernels.checks import Member
from deltaserve_kernels.dense_tables import DenseTables
from deltaserve_kernels.module_tables import ModuleEntry, ModuleTables
from deltaserve_kernels.reference import items_of
from deltaserve_kernels.worklist import WorkList


def dense_linear(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: DenseTables,
    members: Sequence[Member],
    depth: float,
    weight: ReadWeight | None = None,
) -> None:
    row_checks.check_rows(y, work, name="y")
    row_checks.check_rows(x, work)
    family = ApartFamily(0, 0, 0, work.device)
    family.dense = tables
    items = [
        ApartItem(torch.tensor(rows, device=work.device), tuple(part for part in parts if part[1] or part[2]))
        for rows, parts in items_of(work)
        if rows
    ]
    by_items(y, x, ApartStep(family, tuple(items)), members, depth, weight)


def add_modules(
    y: Tensor, work: WorkList, tables: ModuleTables, point: int, depth: float, read: Mapping[int, Tensor]
) -> None:
    row_checks.check_rows(y, work, tables, (point,), y.shape[-1], name="y")
    for _, rows, entry, (first, last) in _modules(work, tables, point):
        scale = first + (last - first) * depth
        if scale:
            before = y[rows].float()
            given = before if entry.reads < 0 else read[entry.reads][rows].float()
            y[rows] = (before + scale * run_module(given, entry)).to(y.dtype)


def set_module_rows_aside(y: Tensor, work: WorkList, tables: ModuleTables, point: int) -> Tensor:
    row_checks.check_rows(y, work, tables, (point,), y.shape[-1], name="y")
    kept = y[work.rows.long()]
    for _, rows, _, _ in _modules(work, tables, point):
        y[rows] = 0
    return kept


def put_module_rows_back(y: Tensor, kept: Tensor, work: WorkList, tables: ModuleTables, point: int) -> None:
    row_checks.check_rows(y, work, tables, (point,), y.shape[-1], name="y")
    for places, rows, _, _ in _modules(work, tables, point):
        y[rows] = kept[places] + y[rows]


def _modules(
    work: WorkList, tables: ModuleTables, point: int
) -> Iterator[tuple[list[int], list[int], ModuleEntry, tuple[float, float]]]:
    """(places in the list, rows, module, scales) of each item with a module at the point."""
    place = 0
    for rows, parts in items_of(work):
        places = list(range(place, place + len(rows)))
        place += len(rows)
        for slot, first, last in parts if rows else ():
            entry = tables.entry(point, slot)
            if entry is not None and (first or last):
                yield places, rows, entry, (first, last)
