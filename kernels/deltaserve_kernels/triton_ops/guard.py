"""Argument checks of the Triton operators. On a GPU, only of shapes and dtypes: looking into a tensor is a sync."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deltaserve_kernels import checks, row_checks
from deltaserve_kernels.base_weight import ReadWeight
from deltaserve_kernels.checks import AnyTables, Member
from deltaserve_kernels.dense_tables import DenseTables
from deltaserve_kernels.errors import DtypeMismatch, OutOfRange, ShapeMismatch
from deltaserve_kernels.module_tables import ModuleTables
from deltaserve_kernels.tables import FLOAT_DTYPES
from deltaserve_kernels.vector_tables import VectorTables
from deltaserve_kernels.worklist import WorkList


def may_look(tensor: Tensor) -> bool:
    """Whether looking into a tensor is free of a sync."""
    return tensor.device.type == "cpu"


def check_linear(
    y: Tensor, x: Tensor, work: WorkList, tables: AnyTables, members: Sequence[Member], *, has_dtype: bool = True
) -> None:
    """``checks.check_linear`` on the host; on a GPU all of it but the list's contents. Raises a KernelError."""
    if may_look(x):
        checks.check_linear(y, x, work, tables, members, has_dtype=has_dtype)
        return
    if y.dim() != 2 or x.dim() != 2 or y.shape[0] != x.shape[0] or x.shape[0] != work.num_rows:
        raise ShapeMismatch(f"y {list(y.shape)} and x {list(x.shape)} must be [T, N] and [T, K], T = {work.num_rows}")
    if x.dtype not in FLOAT_DTYPES or y.dtype != x.dtype or (has_dtype and tables.dtype not in (None, x.dtype)):
        raise DtypeMismatch(f"y is {y.dtype}, x {x.dtype}, the tables hold {tables.dtype}; one float dtype is needed")
    if y.stride(1) != 1 or x.stride(1) != 1:
        raise ShapeMismatch(f"rows of y {y.stride()} and x {x.stride()} must be contiguous")
    for linear, start, stop in members:
        known_in, known_out = tables.shape_of(linear)
        if not 0 <= start < stop <= y.shape[1] or (known_out and known_out != stop - start):
            raise OutOfRange(f"linear {linear} has {known_out} outputs; columns {start}:{stop} of {y.shape[1]} differ")
        if known_in and known_in != x.shape[1]:
            raise ShapeMismatch(f"linear {linear} has {known_in} inputs; x has {x.shape[1]}")


def check_wide(vectors: VectorTables) -> None:
    """Raise a DtypeMismatch for tables whose addresses these kernels would misread."""
    if vectors.has_narrow:
        raise DtypeMismatch("the tables hold vectors in bfloat16; Triton's kernels read fp32")


def check_apart(y: Tensor, x: Tensor, work: WorkList, tables: DenseTables, members: Sequence[Member]) -> None:
    """Raise a KernelError unless arguments of ``dense.dense_linear`` fit together; no list is looked into."""
    row_checks.check_rows(y, work, name="y")
    row_checks.check_rows(x, work, name="x")
    if y.dtype != x.dtype or tables.matrix_dtype not in (None, x.dtype):
        raise DtypeMismatch(f"y is {y.dtype}, x {x.dtype}, matrices are {tables.matrix_dtype}; one dtype is needed")
    for linear, start, stop in members:
        known_in, known_out = tables.shape_of(linear)
        if not 0 <= start < stop <= y.shape[1] or (known_out and (known_in, known_out) != (x.shape[1], stop - start)):
            raise ShapeMismatch(
                f"linear {linear}: a difference [{known_out}, {known_in}]; [{stop - start}, {x.shape[1]}] is needed"
            )


def checked_weight(weight: ReadWeight | None, y: Tensor, x: Tensor, tables: DenseTables) -> Tensor:
    """The group's weight [N, K] for ``dense.dense_linear``; x in its place while nobody has a mask, for it is not read
    then. Raises a KernelError."""
    if weight is None:
        if tables.has_masks:
            raise ShapeMismatch("the tables hold masks, which read the base's weight; give it")
        return x
    found = weight().plain
    if tuple(found.shape) != (y.shape[1], x.shape[1]) or found.dtype != x.dtype or not found.is_contiguous():
        raise ShapeMismatch(f"the weight is {found.dtype} {list(found.shape)}; y {list(y.shape)}, x {x.dtype}")
    return found


def check_modules(y: Tensor, work: WorkList, tables: ModuleTables, point: int, read: Mapping[int, Tensor]) -> Tensor:
    """What modules at ``point`` read of another point, ``y`` itself where nothing is given: at most one other has been
    told to the tables. Raises a KernelError unless arguments fit together."""
    row_checks.check_rows(y, work, tables, (point,), y.shape[-1], name="y")
    if tables.dtype not in (None, y.dtype):
        raise DtypeMismatch(f"y is {y.dtype} and modules {tables.dtype}; one dtype is needed")
    others = sorted(tables.reads(point))
    if len(others) > 1 or not read.keys() >= set(others):
        raise OutOfRange(f"modules at point {point} read {others}; given are {sorted(read)}, and one is read at most")
    # Before there is any such module, and so in a captured pass, what the sublayer is fed: all that a base knows.
    other = read.get(others[0] if others else point - 1, y)
    if other.shape != y.shape or other.dtype != y.dtype or other.stride(1) != 1:
        raise ShapeMismatch(f"what is read at {others} is {other.dtype} {list(other.shape)}, not as y {list(y.shape)}")
    return other


def check_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """``checks.check_attention`` on the host; on a GPU shapes and dtypes. Raises a KernelError."""
    if may_look(q):
        checks.check_attention(q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens, window, softcap, sinks)
        return
    checks.check_cache(k_cache, v_cache, q.dtype, q.device)
    if q.dim() != 3 or q.shape[2] != k_cache.shape[3] or q.shape[1] % k_cache.shape[1] or q.stride(2) != 1:
        raise ShapeMismatch(f"q {list(q.shape)} {q.stride()} must be [T, H, {k_cache.shape[3]}], last dim contiguous")
    seqs = kv_lens.numel()
    for name, tensor, dims in (("block_tables", block_tables, 2), ("cu_seqlens_q", cu_seqlens_q, 1)):
        if tensor.dtype != torch.int32 or tensor.dim() != dims or not tensor.is_contiguous():
            raise ShapeMismatch(f"{name} is {tensor.dtype} {list(tensor.shape)}; contiguous int32 of {dims} is due")
    if kv_lens.dtype != torch.int32 or block_tables.shape[0] != seqs or cu_seqlens_q.shape[0] != seqs + 1:
        raise ShapeMismatch(f"kv_lens {kv_lens.dtype} [{seqs}], block_tables and cu_seqlens_q must be of one batch")
    if (window is not None and window < 1) or (softcap is not None and not softcap > 0):
        raise OutOfRange(f"window {window} must be at least 1 and softcap {softcap} positive")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ShapeMismatch(f"sinks {list(sinks.shape)} must be one float per head, [{q.shape[1]}]")


def check_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_index: Tensor) -> None:
    """``checks.check_write`` on the host; on a GPU shapes and dtypes. Raises a KernelError."""
    if may_look(k):
        checks.check_write(k, v, k_cache, v_cache, kv_index)
        return
    checks.check_cache(k_cache, v_cache, k.dtype, k.device)
    if k.shape != v.shape or k.dtype != v.dtype or k.dim() != 3 or k.shape[1:] != (k_cache.shape[1], k_cache.shape[3]):
        raise ShapeMismatch(f"k {list(k.shape)} and v {list(v.shape)} must be [T, kv_heads, D] as the caches have them")
    if k.stride(2) != 1 or v.stride(2) != 1 or kv_index.dtype != torch.int64 or kv_index.shape != k.shape[:1]:
        raise ShapeMismatch("k and v must be contiguous in their last dimension, kv_index int64 [T]")
