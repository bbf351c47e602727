"""The operators of ``vector_rows`` in plain PyTorch: definition and oracle. They look into the list, as definitions do.

A part whose scale is 0 throughout changes nothing, to the bit. In lists of fixed capacity every row is a listed one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from deltaserve_kernels import pointwise, row_checks, term_reference
from deltaserve_kernels.checks import Member
from deltaserve_kernels.errors import OutOfRange
from deltaserve_kernels.pointer_tables import PointerTables
from deltaserve_kernels.reference import items_of
from deltaserve_kernels.rotation_tables import RotationTables
from deltaserve_kernels.rotations import rotate_by_definition
from deltaserve_kernels.vector_family import VectorFamily
from deltaserve_kernels.vector_tables import VectorTables
from deltaserve_kernels.worklist import WorkList

Parts = list[tuple[int, float, float]]


def _items(work: WorkList, has: Callable[[int], bool]) -> Iterator[tuple[list[int], Parts]]:
    """Items of which some part that is not 0 throughout has an entry."""
    for rows, parts in items_of(work):
        if rows and any((first or last) and has(slot) for slot, first, last in parts):
            yield rows, parts


def _entry(tables: PointerTables, index: int, *others: PointerTables) -> Callable[[int], bool]:
    return lambda slot: any(held.mark(index, slot) is not None for held in (tables, *others))


def listed_rows(work: WorkList) -> Tensor:
    """int64 [R]: the rows of a list, all rows of the step where it is padded."""
    return torch.arange(work.num_rows, device=work.device) if work.is_padded else work.rows.long()


def scaled_input(x: Tensor, work: WorkList, tables: VectorTables, linear: int, depth: float) -> Tensor:
    row_checks.check_rows(x, work, tables, (linear,), x.shape[1])
    fed = x.clone(memory_format=torch.contiguous_format)
    for rows, parts in _items(work, _entry(tables, linear)):
        factor = torch.ones(x.shape[1], device=x.device)
        for slot, first, last in parts:
            entry = tables.get(linear, slot)
            if entry is not None and entry[0].numel():
                factor = factor + (first + (last - first) * depth) * (entry[0] - 1)
        fed[rows] = (x[rows].float() * factor).to(x.dtype)
    return fed


def fan_out(x: Tensor, work: WorkList, tables: VectorTables, members: Sequence[Member], depth: float) -> Tensor:
    row_checks.check_rows(x, work, tables, [member[0] for member in members], x.shape[1])
    listed = listed_rows(work)
    return torch.cat([x, *(scaled_input(x, work, tables, member[0], depth)[listed] for member in members)])


def gather_members(
    y: Tensor, work: WorkList, tables: VectorTables, turns: RotationTables, members: Sequence[Member]
) -> Tensor:
    listed = listed_rows(work)
    first = row_checks.check_fanned(y, work, len(listed), members)
    place = {row: i for i, row in enumerate(listed.tolist())}
    for number, (linear, start, stop) in enumerate(members):
        for rows, _ in _items(work, _entry(tables, linear, turns)):
            source = [first + number * len(listed) + place[row] for row in rows]
            y[rows, start:stop] = y[source, start:stop]
    return y[:first]


def turn_rows(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: RotationTables,
    members: Sequence[Member],
    depth: float,
    num_factors: int,
    num_fanned: int = 0,
) -> None:
    row_checks.check_turned(y, x, work, tables, members, num_fanned)
    for slot in {slot for _, parts in items_of(work) for slot, first, last in parts if first or last}:
        found = max(len(tables.factors(member[0], slot) or ()) for member in members)
        if found > num_factors:
            raise OutOfRange(f"slot {slot} has {found} factors; there are {num_factors} launches")
    if not num_fanned:
        rotate_by_definition(y, x, work, tables, members, depth)
        return
    listed = listed_rows(work)
    for number, member in enumerate(members):
        rows = torch.zeros_like(x)
        first = work.num_rows + number * num_fanned
        rows[listed] = y[first : first + num_fanned]
        rotate_by_definition(rows, x, work, tables, (member,), depth)
        y[first : first + num_fanned] = rows[listed]


def set_aside(y: Tensor, work: WorkList, family: VectorFamily) -> Tensor:
    row_checks.check_rows(y, work)
    kept = y[listed_rows(work)]
    for rows, _ in _items(work, family.has_slot):
        y[rows] = 0
    return kept


def put_back(y: Tensor, kept: Tensor, work: WorkList, family: VectorFamily) -> None:
    listed = listed_rows(work)
    row_checks.check_kept(y, kept, work, len(listed))
    place = {row: i for i, row in enumerate(listed.tolist())}
    for rows, _ in _items(work, family.has_slot):
        y[rows] = kept[[place[row] for row in rows]] + y[rows]


def changed_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    gain: Tensor,
    work: WorkList,
    tables: VectorTables,
    norm: int,
    depth: float,
) -> Tensor:
    row_checks.check_rows(x, work, tables, (norm,), x.shape[1])
    y = pointwise.rms_norm(x, weight, eps, offset)
    rows = x.float()
    normalised = (rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)).contiguous()
    change_norm(y, normalised, gain, None, work, tables, norm, depth)
    return y


def change_norm(
    y: Tensor,
    normalised: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    work: WorkList,
    tables: VectorTables,
    norm: int,
    depth: float,
) -> None:
    row_checks.check_norm(y, normalised, gain, shift, work, tables, norm)
    changed = normalised.clone()
    members = ((norm, 0, y.shape[1]),)
    term_reference.scale_shift(changed, work, tables, members, depth, gain, shift, 0.0)
    for rows, _ in _items(work, _entry(tables, norm)):
        y[rows] = changed[rows].to(y.dtype)
