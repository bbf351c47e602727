"""Argument checks of operators over the rows of a step: of shapes, dtypes and devices, so that nothing waits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaserve_kernels.checks import Member
from deltaserve_kernels.errors import DeviceMismatch, DtypeMismatch, NotContiguous, OutOfRange, ShapeMismatch
from deltaserve_kernels.pointer_tables import FLOAT_DTYPES, PointerTables
from deltaserve_kernels.rotation_tables import RotationTables
from deltaserve_kernels.worklist import WorkList


def check_rows(
    rows: Tensor,
    work: WorkList,
    tables: PointerTables | None = None,
    indices: Sequence[int] = (),
    width: int = 0,
    *,
    name: str = "x",
) -> None:
    """Raise a KernelError unless ``rows`` [T, N] are a list's, and entries of ``tables`` for ``indices`` are ``width``
    wide."""
    if rows.dim() != 2 or rows.shape[0] != work.num_rows or rows.dtype not in FLOAT_DTYPES:
        raise ShapeMismatch(f"{name} is {rows.dtype} {list(rows.shape)}; float rows [{work.num_rows}, N] are needed")
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        raise NotContiguous(f"{name} has strides {rows.stride()}; rows must be contiguous")
    if rows.device.type != work.device.type:
        raise DeviceMismatch(f"{name} is on {rows.device}, the work list on {work.device}")
    if tables is None:
        return
    if tables.device.type != work.device.type:
        raise DeviceMismatch(f"the tables are on {tables.device}, the work list on {work.device}")
    for index in indices:
        if not 0 <= index < tables.num_linears:
            raise OutOfRange(f"{tables.NOUN} {index} is not in 0..{tables.num_linears - 1}")
        known = tables.shape_of(index)[1]
        if known and known != width:
            raise ShapeMismatch(f"{tables.NOUN} {index} has vectors of {known}; rows have {width} columns")


def check_fanned(y: Tensor, work: WorkList, num_listed: int, members: Sequence[Member]) -> int:
    """Raise a KernelError unless ``y`` has the rows of ``fan_out``; returns how many of them are the step's own."""
    wanted = work.num_rows + len(members) * num_listed
    if y.dim() != 2 or y.shape[0] != wanted or y.stride(1) != 1:
        raise ShapeMismatch(f"y is {list(y.shape)}; contiguous rows [{wanted}, N] are needed")
    for linear, start, stop in members:
        if not 0 <= start < stop <= y.shape[1]:
            raise OutOfRange(f"columns {start}:{stop} of linear {linear} are not inside y's {y.shape[1]}")
    return work.num_rows


def check_turned(
    y: Tensor, x: Tensor, work: WorkList, tables: RotationTables, members: Sequence[Member], num_fanned: int
) -> None:
    """Raise a KernelError unless arguments of ``turn_rows`` fit together; ``num_fanned`` > 0: of ``turn_fanned``, with
    that many listed rows."""
    if num_fanned:
        check_fanned(y, work, num_fanned, members)
    else:
        check_rows(y, work, name="y")
    check_rows(x, work)
    if y.dtype != x.dtype or tables.dtype not in (None, x.dtype) or y.shape[1] != x.shape[1]:
        raise ShapeMismatch(
            f"y is {y.dtype} {list(y.shape)}, x {x.dtype} {list(x.shape)} and blocks are {tables.dtype}; "
            "one dtype and one width are needed"
        )
    for linear, start, stop in members:
        if not 0 <= linear < tables.num_linears or not 0 <= start < stop <= x.shape[1]:
            raise OutOfRange(
                f"linear {linear} of {tables.num_linears}, columns {start}:{stop}: not inside the {x.shape[1]} of x"
            )
        tables.check_width(linear, stop - start)


def check_kept(y: Tensor, kept: Tensor, work: WorkList, num_listed: int) -> None:
    """Raise a KernelError unless ``kept`` is what ``set_aside`` returned for ``y``."""
    check_rows(y, work, name="y")
    if kept.shape != (num_listed, y.shape[1]) or kept.dtype != y.dtype or kept.device != y.device:
        raise ShapeMismatch(f"kept is {kept.dtype} {list(kept.shape)}; {y.dtype} {[num_listed, y.shape[1]]} is needed")


def check_norm(
    y: Tensor,
    normalised: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    work: WorkList,
    tables: PointerTables,
    norm: int,
) -> None:
    """Raise a KernelError unless the arguments of ``change_norm`` fit together."""
    check_rows(y, work, tables, (norm,), y.shape[-1], name="y")
    if normalised.dtype != torch.float32 or normalised.shape != y.shape or not normalised.is_contiguous():
        raise ShapeMismatch(f"normalised is {normalised.dtype} {list(normalised.shape)}; fp32 {list(y.shape)} is due")
    check_gain(gain, y.shape[1])
    if shift is not None:
        check_gain(shift, y.shape[1])


def check_gain(gain: Tensor, size: int) -> None:
    """Raise a DtypeMismatch unless a norm's gain or shift is fp32 [size], contiguous."""
    if gain.dtype != torch.float32 or gain.shape != (size,) or not gain.is_contiguous():
        raise DtypeMismatch(f"gain or shift is {gain.dtype} {list(gain.shape)}; contiguous fp32 [{size}] is needed")
