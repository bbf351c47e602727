"""Launches of vector terms by row; one each. Definitions: ``vector_rows_reference``, and ``scale_shift`` of terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from deltaserve_kernels import pointwise, row_checks, term_checks
from deltaserve_kernels.checks import Member
from deltaserve_kernels.rotation_tables import RotationTables
from deltaserve_kernels.triton_ops import guard
from deltaserve_kernels.triton_ops import vector_row_kernels as kernels
from deltaserve_kernels.triton_ops.early import early
from deltaserve_kernels.triton_ops.members import MAX_MEMBERS, groups_of
from deltaserve_kernels.triton_ops.pointwise import norm_warps
from deltaserve_kernels.triton_ops.row_items import all_rows, flagged_rows, listed_rows, row_items
from deltaserve_kernels.vector_family import VectorFamily
from deltaserve_kernels.vector_tables import VectorTables
from deltaserve_kernels.worklist import WorkList

# Columns of a row that one program has: 8 numbers of 16 bits, one load, a thread.
BLOCK = 1024


def _lists(work: WorkList, tables: VectorTables) -> tuple[Tensor | int, ...]:
    """The item of each row and the list's parts, in the order of kernels."""
    guard.check_wide(tables)
    return (row_items(work), work.item_parts, work.part_slot, work.part_scale, tables.pointers, tables.num_slots)


def scale_shift(
    y: Tensor,
    work: WorkList,
    tables: VectorTables,
    members: Sequence[Member],
    depth: float,
    gain: Tensor | None,
    shift: Tensor | None,
    unit: float,
) -> None:
    """``y = y * f + t`` where a row's parts have an entry; see ``terms.scale_shift``. Raises a KernelError."""
    guard.check_linear(y, y, work, tables, members, has_dtype=False)
    term_checks.check_gains(members, gain, shift)
    rows = listed_rows(work)
    for group in groups_of(members) if len(rows) else ():
        kernels.scale_rows[(len(rows), group.num_tiles(BLOCK))](
            y, y.stride(0), y if gain is None else gain, y if shift is None else shift, rows, *_lists(work, tables),
            *group.linears, depth, unit, HAS_GAIN=gain is not None, HAS_SHIFT=shift is not None, BLOCK_N=BLOCK,
            **group.place, num_warps=4, **early(y.device),
        )  # fmt: skip


def scaled_input(x: Tensor, work: WorkList, tables: VectorTables, linear: int, depth: float) -> Tensor:
    """See ``vector_rows.scaled_input``. Raises a KernelError."""
    row_checks.check_rows(x, work, tables, (linear,), x.shape[1])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _feed(out, x, all_rows(work), work, tables, (linear,), depth, 0)
    return out


def fan_out(x: Tensor, work: WorkList, tables: VectorTables, members: Sequence[Member], depth: float) -> Tensor:
    """See ``vector_rows.fan_out``. Raises a KernelError."""
    linears = [member[0] for member in members]
    row_checks.check_rows(x, work, tables, linears, x.shape[1])
    num_rows, rows = len(x), listed_rows(work)
    out = torch.empty(num_rows + len(linears) * len(rows), x.shape[1], dtype=x.dtype, device=x.device)
    out[:num_rows].copy_(x)
    for begin in range(0, len(linears), MAX_MEMBERS):
        _feed(
            out, x, rows, work, tables, linears[begin : begin + MAX_MEMBERS], depth, num_rows + begin * len(rows)
        )  # fmt: skip
    return out


def _feed(
    out: Tensor,
    x: Tensor,
    rows: Tensor,
    work: WorkList,
    tables: VectorTables,
    linears: Sequence[int],
    depth: float,
    first_row: int,
) -> None:
    width = x.shape[1]
    if len(rows):
        kernels.feed_rows[(len(linears) * len(rows), triton.cdiv(width, BLOCK))](
            out, x, x.stride(0), rows, *_lists(work, tables), *(*linears, 0, 0)[:MAX_MEMBERS], depth, len(rows),
            first_row, K=width, BLOCK_K=BLOCK, num_warps=4, **early(x.device),
        )  # fmt: skip


def gather_members(
    y: Tensor, work: WorkList, tables: VectorTables, turns: RotationTables, members: Sequence[Member]
) -> Tensor:
    """See ``vector_rows.gather_members``. Raises a KernelError."""
    rows = listed_rows(work)
    first = row_checks.check_fanned(y, work, len(rows), members)
    for number, group in enumerate(groups_of(members)) if len(rows) else ():
        kernels.gather_rows[(len(rows), group.num_tiles(BLOCK))](
            y, y.stride(0), rows, *_lists(work, tables), turns.pointers, *group.linears, len(rows),
            first + number * MAX_MEMBERS * len(rows), BLOCK_N=BLOCK, **group.place, num_warps=4, **early(y.device),
        )  # fmt: skip
    return y[:first]


def set_aside(y: Tensor, work: WorkList, family: VectorFamily) -> Tensor:
    """See ``vector_rows.set_aside``. Raises a KernelError."""
    row_checks.check_rows(y, work, name="y")
    rows, width = listed_rows(work), y.shape[1]
    kept = torch.empty(len(rows), width, dtype=y.dtype, device=y.device)
    if len(rows):
        kernels.set_rows_aside[(len(rows), triton.cdiv(width, BLOCK))](
            y, y.stride(0), kept, rows, flagged_rows(work, family.flags), N=width, BLOCK_N=BLOCK, num_warps=4,
            **early(y.device),
        )  # fmt: skip
    return kept


def put_back(y: Tensor, kept: Tensor, work: WorkList, family: VectorFamily) -> None:
    """See ``vector_rows.put_back``. Raises a KernelError."""
    rows, width = listed_rows(work), y.shape[1]
    row_checks.check_kept(y, kept, work, len(rows))
    if len(rows):
        kernels.put_rows_back[(len(rows), triton.cdiv(width, BLOCK))](
            y, y.stride(0), kept, rows, flagged_rows(work, family.flags), N=width, BLOCK_N=BLOCK, num_warps=4,
            **early(y.device),
        )  # fmt: skip


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
    """See ``vector_rows.changed_rms_norm``: the launch of ``rms_norm`` and none more. Raises a KernelError."""
    pointwise.check_norm(x, weight)
    row_checks.check_rows(x, work, tables, (norm,), x.shape[1])
    row_checks.check_gain(gain, x.shape[1])
    num_rows, size = x.shape
    out = torch.empty(num_rows, size, dtype=x.dtype, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(size)
        kernels.changed_norm_rows[(num_rows,)](
            out, x, x.stride(0), weight, gain, eps, offset, *_lists(work, tables), norm, depth,
            SIZE=size, BLOCK=block, num_warps=norm_warps(block), **early(x.device),
        )  # fmt: skip
    return out


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
    """See ``vector_rows.change_norm``. Raises a KernelError."""
    row_checks.check_norm(y, normalised, gain, shift, work, tables, norm)
    rows, size = listed_rows(work), y.shape[1]
    if len(rows):
        kernels.change_norm_rows[(len(rows), triton.cdiv(size, BLOCK))](
            y, normalised, gain, y if shift is None else shift, rows, *_lists(work, tables), norm, depth,
            HAS_SHIFT=shift is not None, SIZE=size, BLOCK=BLOCK, num_warps=4, **early(y.device),
        )  # fmt: skip
