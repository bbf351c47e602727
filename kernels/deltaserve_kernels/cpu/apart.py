"""The C++ operators of terms that are computed apart; see ``deltaserve_kernels.apart``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from deltaserve_kernels.apart_family import ApartStep
from deltaserve_kernels.base_weight import ReadWeight
from deltaserve_kernels.checks import Member
from deltaserve_kernels.cpu import operator, prepared
from deltaserve_kernels.errors import DeviceMismatch, DtypeMismatch


def dense_linear(
    y: Tensor,
    x: Tensor,
    step: ApartStep,
    members: Sequence[Member],
    depth: float,
    weight: ReadWeight | None = None,
) -> None:
    tables = step.family.dense
    _check(x, tables.matrix_dtype, is_on_host=tables.is_on_host)
    work = prepared(step.work(x.shape[0]))
    base = step.weight_of(members, weight)
    columns = list(chain.from_iterable(members))
    operator("dense_linear")(
        y, x, work, tables.pointers, tables.dims, columns, depth, None if base is None else base.data
    )


def add_modules(y: Tensor, step: ApartStep, point: int, depth: float, read: Mapping[int, Tensor]) -> None:
    tables = step.family.modules
    _check(y, tables.dtype, is_on_host=tables.is_on_host)
    points = [other for other in tables.reads(point) if other in read]
    operator("add_modules")(
        y,
        prepared(step.work(y.shape[0])),
        tables.pointers,
        tables.sizes,
        tables.dims,
        point,
        depth,
        [read[other] for other in points],
        points,
    )


def _check(x: Tensor, dtype: torch.dtype | None, *, is_on_host: bool) -> None:
    if dtype is not x.dtype and dtype is not None:
        raise DtypeMismatch(f"the rows are {x.dtype}; the tables hold {dtype}")
    if not is_on_host:
        raise DeviceMismatch("the rows are on the CPU and the tables elsewhere")
