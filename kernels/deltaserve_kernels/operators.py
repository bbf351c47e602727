"""The public operators. Each runs the implementation that ``backend`` (or the process default) selects."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from deltaserve_kernels import reference
from deltaserve_kernels.backend import implementation, select
from deltaserve_kernels.checks import Member
from deltaserve_kernels.errors import BackendUnavailable
from deltaserve_kernels.tables import LoraTables, SparseTables
from deltaserve_kernels.worklist import WorkList


def _implementation(device: torch.device, backend: str | None) -> ModuleType:
    return implementation(device, backend, definition=reference, has_cpp=True)


def lora_linear(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: LoraTables,
    members: Sequence[Member],
    depth: float = 0.0,
    *,
    backend: str | None = None,
) -> None:
    """Add low-rank deltas in place: ``y[row, start:stop] += sum over parts of scale * (B (A x[row]))``.

    y [T, N_group] and x [T, K]: fp32, bf16 or fp16, the tables' dtype; rows contiguous, any row stride. ``members``
    lists (linear, col_start, col_stop) of the group; linears or slots without an entry add nothing. ``depth`` in
    [0, 1] places the layer between the first and last one: scale = first + (last - first) * depth. Sums are fp32 and
    y is rounded once. A row's result depends on nothing but that row and its binding. Raises a KernelError.
    """
    if not work.is_empty and work.concerns(tables, members):
        _implementation(x.device, backend).lora_linear(y, x, work, tables, members, depth)


def sparse_linear(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: SparseTables,
    members: Sequence[Member],
    depth: float = 0.0,
    *,
    backend: str | None = None,
) -> None:
    """Add unstructured sparse deltas in place: ``y[row, start:stop] += sum over parts of scale * (S x[row])``.

    Arguments, precision, order and errors as in ``lora_linear``. Raises BackendUnavailable where the C++ operators
    would have to read tables without CSR.
    """
    if not work.is_empty and work.concerns(tables, members):
        if not tables.has_csr and select(x.device, backend) == "cpu":
            raise BackendUnavailable("backend 'cpu' reads CSR; these tables hold the jagged form alone")
        _implementation(x.device, backend).sparse_linear(y, x, work, tables, members, depth)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    one_query: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Causal attention over a paged cache, prefill and decode rows mixed; returns contiguous [T, H, D] of q's dtype.

    q            [T, H, D]   rows of sequence s are ``cu_seqlens_q[s]:cu_seqlens_q[s+1]``; D contiguous
    k_cache, v_cache  [num_blocks, kv_heads, 16, D]  any strides, D contiguous; head h reads kv head h // (H/kv_heads)
    block_tables int32 [S, max_blocks];  cu_seqlens_q int32 [S+1];  kv_lens int32 [S], queries included
    window       positions a query sees, its own included; None: all.  softcap: ``softcap * tanh(score / softcap)``
    sinks        [H] extra score per head that takes weight and adds no value
    one_query    the caller knows that every sequence has exactly one row, which only the device could tell otherwise

    Query i of sequence s sits at position ``kv_lens[s] - q_len[s] + i``. fp32 sums. What lies in the cache beyond
    a query's reach never enters its result, not even NaN. Raises a KernelError (ValueError).
    """
    # Only kernels that never see the host's numbers have a use for the last one.
    return _implementation(q.device, backend).paged_attention(
        q,
        k_cache,
        v_cache,
        block_tables,
        cu_seqlens_q,
        kv_lens,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        one_query=one_query,
    )


def write_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_index: Tensor, *, backend: str | None = None
) -> None:
    """Store row t of k and v [T, kv_heads, D] at position ``kv_index[t]`` (int64, block * 16 + offset, distinct).

    Raises a KernelError (ValueError).
    """
    _implementation(k.device, backend).write_kv(k, v, k_cache, v_cache, kv_index)
