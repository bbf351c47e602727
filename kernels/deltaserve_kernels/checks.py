"""Argument checks of the PyTorch operators. The C++ operators check the same things themselves, without Python."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaserve_kernels.block_tables import BlockTables
from deltaserve_kernels.errors import DeviceMismatch, DtypeMismatch, NotContiguous, OutOfRange, ShapeMismatch
from deltaserve_kernels.rotation_tables import RotationTables
from deltaserve_kernels.tables import FLOAT_DTYPES, LoraTables, SparseTables
from deltaserve_kernels.vector_tables import VectorTables
from deltaserve_kernels.worklist import WorkList

Member = tuple[int, int, int]
AnyTables = LoraTables | SparseTables | BlockTables | VectorTables | RotationTables
BLOCK_SIZE = 16


def check_linear(
    y: Tensor, x: Tensor, work: WorkList, tables: AnyTables, members: Sequence[Member], *, has_dtype: bool = True
) -> None:
    """Raise a KernelError unless ``lora_linear``/``sparse_linear``/``block_linear`` arguments fit together.

    ``has_dtype``: the tables must hold the dtype of the rows.
    """
    if y.dim() != 2 or x.dim() != 2 or y.shape[0] != x.shape[0] or x.shape[0] != work.num_rows:
        raise ShapeMismatch(
            f"y {list(y.shape)} and x {list(x.shape)} must be [T, N] and [T, K], T = {work.num_rows} as in the list"
        )
    if x.dtype not in FLOAT_DTYPES or y.dtype != x.dtype or (has_dtype and tables.dtype not in (None, x.dtype)):
        raise DtypeMismatch(
            f"y is {y.dtype}, x {x.dtype} and the tables hold {tables.dtype}; one float dtype is needed"
        )
    if y.device != x.device or work.device.type != x.device.type or tables.device.type != x.device.type:
        raise DeviceMismatch(f"y {y.device}, x {x.device}, work list {work.device}, tables {tables.device} must agree")
    work.validate()
    _check_rows("y", y)
    _check_rows("x", x)
    for linear, start, stop in members:
        if not 0 <= linear < tables.num_linears:
            raise OutOfRange(f"linear {linear} is not in 0..{tables.num_linears - 1}")
        if not 0 <= start < stop <= y.shape[1]:
            raise OutOfRange(f"columns {start}:{stop} of linear {linear} are not inside y's {y.shape[1]}")
        known_in, known_out = tables.dims[linear].tolist()
        if known_out and known_out != stop - start:
            raise ShapeMismatch(f"linear {linear} has {known_out} outputs; columns {start}:{stop} hold {stop - start}")
        if known_in and known_in != x.shape[1]:
            raise ShapeMismatch(f"linear {linear} has {known_in} inputs; x has {x.shape[1]}")
    if work.part_slot.numel():
        low, high = int(work.part_slot.min()), int(work.part_slot.max())
        if low < 0 or high >= tables.num_slots:
            raise OutOfRange(f"slots run {low}..{high}; the tables have 0..{tables.num_slots - 1}")


def _check_rows(name: str, tensor: Tensor) -> None:
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise NotContiguous(f"{name} has strides {tensor.stride()}; rows must be contiguous")


def check_cache(k_cache: Tensor, v_cache: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Both caches ``[num_blocks, kv_heads, 16, D]`` of one shape, dtype and device, last dimension contiguous."""
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape or k_cache.shape[2] != BLOCK_SIZE:
        raise ShapeMismatch(
            f"k_cache {list(k_cache.shape)} and v_cache {list(v_cache.shape)} must both be "
            f"[num_blocks, kv_heads, {BLOCK_SIZE}, D]"
        )
    if k_cache.dtype != dtype or v_cache.dtype != dtype or dtype not in FLOAT_DTYPES:
        raise DtypeMismatch(
            f"caches are {k_cache.dtype} and {v_cache.dtype}, the rows {dtype}; one float dtype for all"
        )
    if k_cache.device != device or v_cache.device != device:
        raise DeviceMismatch(f"caches are on {k_cache.device} and {v_cache.device}, the rows on {device}")
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise NotContiguous("the last dimension of the caches must be contiguous")


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
    """Raise a KernelError unless ``paged_attention`` arguments fit together; every index is checked."""
    check_cache(k_cache, v_cache, q.dtype, q.device)
    if q.dim() != 3 or q.shape[2] != k_cache.shape[3] or k_cache.shape[1] == 0 or q.shape[1] % k_cache.shape[1]:
        raise ShapeMismatch(
            f"q {list(q.shape)} must be [T, H, D] with D = {k_cache.shape[3]} and H a multiple of {k_cache.shape[1]}"
        )
    if q.shape[2] > 1 and q.stride(2) != 1:
        raise NotContiguous(f"q has strides {q.stride()}; the last dimension must be contiguous")
    num_seqs = kv_lens.numel()
    for name, tensor, shape in (
        ("block_tables", block_tables, (num_seqs, block_tables.shape[-1] if block_tables.dim() else 0)),
        ("cu_seqlens_q", cu_seqlens_q, (num_seqs + 1,)),
        ("kv_lens", kv_lens, (num_seqs,)),
    ):
        if tensor.dtype != torch.int32:
            raise DtypeMismatch(f"{name} is {tensor.dtype}; int32 is needed")
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ShapeMismatch(f"{name} {list(tensor.shape)} must be contiguous {list(shape)}: {num_seqs} sequences")
    if window is not None and window < 1:
        raise OutOfRange(f"window {window} must be at least 1")
    if softcap is not None and not softcap > 0:
        raise OutOfRange(f"softcap {softcap} must be positive")
    if sinks is not None and (sinks.shape != (q.shape[1],) or sinks.dtype not in FLOAT_DTYPES):
        raise ShapeMismatch(f"sinks {sinks.dtype} {list(sinks.shape)} must be one float per head, [{q.shape[1]}]")
    starts, lens = cu_seqlens_q.tolist(), kv_lens.tolist()
    if starts[0] != 0 or starts[-1] != q.shape[0]:
        raise OutOfRange(f"cu_seqlens_q runs {starts[0]}..{starts[-1]}; it must run 0..{q.shape[0]}")
    capacity = block_tables.shape[1] * BLOCK_SIZE
    for seq, kv_len in enumerate(lens):
        q_len = starts[seq + 1] - starts[seq]
        if q_len < 0 or not q_len <= kv_len <= capacity:
            raise OutOfRange(
                f"sequence {seq}: {q_len} queries and {kv_len} positions; "
                f"0 <= queries <= positions <= {capacity} (the block table's room) is needed"
            )
        used = block_tables[seq, : -(-kv_len // BLOCK_SIZE)]
        if q_len and (int(used.min()) < 0 or int(used.max()) >= k_cache.shape[0]):
            raise OutOfRange(f"sequence {seq}: block table holds a block outside 0..{k_cache.shape[0] - 1}")


def check_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_index: Tensor) -> None:
    """Raise a KernelError unless ``write_kv`` arguments fit together."""
    check_cache(k_cache, v_cache, k.dtype, k.device)
    if k.dim() != 3 or k.shape != v.shape or k.shape[1] != k_cache.shape[1] or k.shape[2] != k_cache.shape[3]:
        raise ShapeMismatch(
            f"k {list(k.shape)} and v {list(v.shape)} must both be [T, {k_cache.shape[1]}, {k_cache.shape[3]}]"
        )
    if v.dtype != k.dtype:
        raise DtypeMismatch(f"k is {k.dtype} and v {v.dtype}; both must be the same")
    if k.shape[2] > 1 and (k.stride(2) != 1 or v.stride(2) != 1):
        raise NotContiguous("the last dimension of k and v must be contiguous")
    if kv_index.dtype != torch.int64 or kv_index.shape != k.shape[:1] or not kv_index.is_contiguous():
        raise ShapeMismatch(f"kv_index {kv_index.dtype} {list(kv_index.shape)} must be contiguous int64 [{k.shape[0]}]")
    room = k_cache.shape[0] * BLOCK_SIZE
    if kv_index.numel() and (int(kv_index.min()) < 0 or int(kv_index.max()) >= room):
        raise OutOfRange(f"kv_index runs {int(kv_index.min())}..{int(kv_index.max())}; allowed: 0..{room - 1}")
