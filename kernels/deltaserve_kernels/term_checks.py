"""Argument checks of the operators of ``terms``, of shapes and dtypes, so that nothing waits for a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaserve_kernels.checks import Member, check_linear
from deltaserve_kernels.errors import DeviceMismatch, DtypeMismatch, NotContiguous, OutOfRange, ShapeMismatch
from deltaserve_kernels.tables import FLOAT_DTYPES, LoraTables
from deltaserve_kernels.vector_tables import NormTables, VectorTables
from deltaserve_kernels.worklist import WorkList


def check_vectors(vectors: VectorTables, tables: LoraTables, members: Sequence[Member]) -> None:
    """Raise a KernelError unless vector terms fit beside low-rank ones."""
    if vectors.num_linears != tables.num_linears or vectors.num_slots != tables.num_slots:
        raise ShapeMismatch(
            f"vectors have {vectors.num_linears} linears and {vectors.num_slots} slots; "
            f"the low-rank tables {tables.num_linears} and {tables.num_slots}"
        )
    if vectors.device.type != tables.device.type:
        raise DeviceMismatch(f"vectors are on {vectors.device}, the low-rank tables on {tables.device}")
    for linear, start, stop in members:
        known = int(vectors.dims[linear, 1])
        if known and known != stop - start:
            raise ShapeMismatch(f"linear {linear} has vectors of {known}; columns {start}:{stop} hold {stop - start}")


def check_scale_shift(
    y: Tensor,
    work: WorkList,
    tables: VectorTables,
    members: Sequence[Member],
    gain: Tensor | None,
    shift: Tensor | None,
) -> None:
    """Raise a KernelError unless ``scale_shift`` arguments fit together."""
    check_linear(y, y, work, tables, members, has_dtype=False)
    check_gains(members, gain, shift)


def check_gains(members: Sequence[Member], gain: Tensor | None, shift: Tensor | None) -> None:
    """Raise a ShapeMismatch unless a gain and a shift, where given, are fp32 vectors of the one member."""
    for name, vector in (("gain", gain), ("shift", shift)):
        if vector is None:
            continue
        sizes = [stop - start for _, start, stop in members]
        if vector.dtype != torch.float32 or [vector.numel()] != sizes or vector.dim() != 1:
            raise ShapeMismatch(f"{name} is {vector.dtype} {list(vector.shape)}; fp32 {sizes} of one member is needed")


def check_norm(x: Tensor, weight: Tensor, work: WorkList, tables: NormTables, norm: int) -> None:
    """Raise a KernelError unless ``rms_norm`` arguments fit together."""
    if x.dim() != 2 or x.shape[0] != work.num_rows or weight.shape != x.shape[1:]:
        raise ShapeMismatch(
            f"x {list(x.shape)} must be [T, H], T = {work.num_rows} as in the list, and weight {list(weight.shape)} [H]"
        )
    if x.dtype not in FLOAT_DTYPES or weight.dtype != x.dtype:
        raise DtypeMismatch(f"x is {x.dtype} and weight {weight.dtype}; one float dtype is needed")
    if not x.device.type == weight.device.type == tables.device.type == work.device.type:
        raise DeviceMismatch(f"x {x.device}, weight {weight.device}, list {work.device}, tables {tables.device} differ")
    if (x.shape[1] > 1 and x.stride(1) != 1) or not weight.is_contiguous():
        raise NotContiguous(f"rows of x {x.stride()} and weight {weight.stride()} must be contiguous")
    if not 0 <= norm < tables.num_linears:
        raise OutOfRange(f"norm {norm} is not in 0..{tables.num_linears - 1}")
    known = int(tables.dims[norm, 1])
    if known and known != x.shape[1]:
        raise ShapeMismatch(f"norm {norm} has gains of {known}; x has {x.shape[1]}")


def check_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise a KernelError unless the rotary half of ``rotate_and_write_kv`` fits together."""
    if q.dim() != 3 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ShapeMismatch(f"q {list(q.shape)} and k {list(k.shape)} must be [T, heads, D] with one T and one D")
    if q.dtype != k.dtype:
        raise DtypeMismatch(f"q is {q.dtype} and k {k.dtype}; both must be the same")
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[0] != q.shape[0]:
        raise ShapeMismatch(
            f"cos {list(cos.shape)} and sin {list(sin.shape)} must both be [{q.shape[0]}, half of the rotary size]"
        )
    if not 2 <= 2 * cos.shape[1] <= q.shape[2]:
        raise ShapeMismatch(f"cos {list(cos.shape)} rotates {2 * cos.shape[1]} of {q.shape[2]}; 2..{q.shape[2]} can be")
    if cos.dtype not in FLOAT_DTYPES or sin.dtype != cos.dtype:
        raise DtypeMismatch(f"cos is {cos.dtype} and sin {sin.dtype}; one float dtype is needed")
    if not q.device == k.device == cos.device == sin.device:
        raise DeviceMismatch(f"q {q.device}, k {k.device}, cos {cos.device} and sin {sin.device} must agree")
    for name, tensor in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise NotContiguous(f"{name} has strides {tensor.stride()}; the last dimension must be contiguous")


def check_slots(work: WorkList, num_slots: int) -> None:
    """The list's contents, for definitions: looks into tensors. Raises a KernelError."""
    work.validate()
    used = work.part_slot[: int(work.item_parts[-1])]
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < num_slots:
        raise OutOfRange(f"slots run {int(used.min())}..{int(used.max())}; the tables have 0..{num_slots - 1}")
