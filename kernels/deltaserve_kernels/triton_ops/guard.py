"""Argument checks of the Triton operators. On a GPU, only of shapes and dtypes: looking into a tensor is a sync."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deltaserve_kernels import checks
from deltaserve_kernels.checks import Member
from deltaserve_kernels.errors import DtypeMismatch, OutOfRange, ShapeMismatch
from deltaserve_kernels.tables import FLOAT_DTYPES, LoraTables, SparseTables
from deltaserve_kernels.worklist import WorkList


def check_linear(
    y: Tensor, x: Tensor, work: WorkList, tables: LoraTables | SparseTables, members: Sequence[Member]
) -> None:
    """``checks.check_linear`` on the host; on a GPU all of it but the list's contents. Raises a KernelError."""
    if x.device.type == "cpu":
        checks.check_linear(y, x, work, tables, members)
        return
    if y.dim() != 2 or x.dim() != 2 or y.shape[0] != x.shape[0] or x.shape[0] != work.num_rows:
        raise ShapeMismatch(f"y {list(y.shape)} and x {list(x.shape)} must be [T, N] and [T, K], T = {work.num_rows}")
    if x.dtype not in FLOAT_DTYPES or y.dtype != x.dtype or tables.dtype != x.dtype:
        raise DtypeMismatch(f"y is {y.dtype}, x {x.dtype}, the tables hold {tables.dtype}; one float dtype is needed")
    if y.stride(1) != 1 or x.stride(1) != 1:
        raise ShapeMismatch(f"rows of y {y.stride()} and x {x.stride()} must be contiguous")
    for linear, start, stop in members:
        known_in, known_out = tables.dims[linear].tolist()
        if not 0 <= start < stop <= y.shape[1] or (known_out and known_out != stop - start):
            raise OutOfRange(f"linear {linear} has {known_out} outputs; columns {start}:{stop} of {y.shape[1]} differ")
        if known_in and known_in != x.shape[1]:
            raise ShapeMismatch(f"linear {linear} has {known_in} inputs; x has {x.shape[1]}")
