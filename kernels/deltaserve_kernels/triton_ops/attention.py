"""Launches of the paged attention kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from deltaserve_kernels.checks import BLOCK_SIZE
from deltaserve_kernels.triton_ops import attention_kernels, guard
from deltaserve_kernels.triton_ops.early import early


@dataclass(frozen=True)
class AttentionForm:
    """Tiles. ``rows``: of a prefill tile, queries * heads; below 64 by design.

    ``segments``: at most so many programs share a decode row; ``min_segment``: positions a segment has at least.
    ``decode_n``, ``num_warps``, ``num_stages``: of decode.
    """

    rows: int = 32
    block_n: int = 32
    decode_n: int = 32
    segments: int = 16
    min_segment: int = 64
    num_warps: int = 4
    num_stages: int = 2


DEFAULT = AttentionForm()
_MIN_TILE_HEADS = 16  # a matrix product has 16 rows at least; a decode tile has nothing but heads to fill them


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
    form: AttentionForm = DEFAULT,
) -> Tensor:
    """Causal attention over a paged cache; see ``operators.paged_attention``. [T, H, D]. Raises a KernelError."""
    guard.check_attention(q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens, window, softcap, sinks)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    (num_rows, heads, head_dim), kv_heads, num_seqs = q.shape, k_cache.shape[1], kv_lens.numel()
    if not num_rows:
        return out
    group = heads // kv_heads
    cache = (*k_cache.stride()[:3], *v_cache.stride()[:3])
    tables = (block_tables, block_tables.stride(0), cu_seqlens_q, kv_lens)
    numbers = (scale, 1.0 if softcap is None else softcap, 0 if window is None else window)
    sink = q if sinks is None else sinks
    sizes: dict[str, Any] = {"D": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim))}
    sizes |= {"BLOCK_N": form.block_n, "HAS_WINDOW": window is not None}
    segments: dict[str, Any] = {"SEGMENTS": form.segments, "MIN_SEGMENT": form.min_segment, "BLOCK_N": form.decode_n}
    # No sequence has more segments than the tables have room for; how one is cut goes by its own length all the same.
    room = min(form.segments, triton.cdiv(block_tables.shape[1] * BLOCK_SIZE, form.min_segment))
    part_acc = torch.empty(num_seqs, heads, form.segments, sizes["BLOCK_D"], dtype=torch.float32, device=q.device)
    part_max, part_sum = (
        torch.empty(num_seqs, heads, form.segments, dtype=torch.float32, device=q.device) for _ in range(2)
    )
    head_tiles = triton.cdiv(group, _MIN_TILE_HEADS)
    attention_kernels.decode[(num_seqs, kv_heads * head_tiles, room)](
        part_acc, part_max, part_sum, q, k_cache, v_cache, *tables, *q.stride()[:2], *cache, *numbers,
        KV_HEADS=kv_heads, GROUP=group, TILE_HEADS=_MIN_TILE_HEADS, HAS_SOFTCAP=softcap is not None,
        num_warps=form.num_warps, num_stages=form.num_stages, **sizes | segments, **early(q.device),
    )  # fmt: skip
    attention_kernels.combine[(num_seqs, heads)](
        out, part_acc, part_max, part_sum, cu_seqlens_q, kv_lens, sink, out.stride(0), numbers[2],
        HEADS=heads, HAS_SINKS=sinks is not None, num_warps=1, **sizes | segments, **early(q.device),
    )  # fmt: skip
    if one_query:
        return out
    # Whether some sequence has several queries is known to the device alone, so this launch may find nothing to do.
    tile_heads = min(_MIN_TILE_HEADS, triton.next_power_of_2(group))
    tile_queries = form.rows // tile_heads
    head_tiles = triton.cdiv(group, tile_heads)
    attention_kernels.prefill[(num_rows // tile_queries + num_seqs, kv_heads, head_tiles)](
        out, q, k_cache, v_cache, *tables, sink, num_seqs, out.stride(0), *q.stride()[:2], *cache, *numbers,
        GROUP=group, TILE_HEADS=tile_heads, TILE_QUERIES=tile_queries,
        HAS_SOFTCAP=softcap is not None, HAS_SINKS=sinks is not None, **sizes,
    )  # fmt: skip
    return out


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_index: Tensor) -> None:
    """Store row t of ``k`` and ``v`` at position ``kv_index[t]``; see ``operators.write_kv``. Raises a KernelError."""
    guard.check_write(k, v, k_cache, v_cache, kv_index)
    num_rows, kv_heads, head_dim = k.shape
    if num_rows:
        attention_kernels.store_kv[(num_rows,)](
            k, v, k_cache, v_cache, kv_index, *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            KV_HEADS=kv_heads, TILE_HEADS=triton.next_power_of_2(kv_heads), D=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
        )  # fmt: skip
