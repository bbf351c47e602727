"""Rotary embedding of queries and keys, and the KV write, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from deltaserve_kernels import term_checks
from deltaserve_kernels.triton_ops import guard
from deltaserve_kernels.triton_ops.attention_kernels import PAGE
from deltaserve_kernels.triton_ops.early import early, wait_then_allow

TILE_HEADS = 8


@triton.jit
def rotate(
    source, target, row_mask, cos, sin, HALF: tl.constexpr, SECOND: tl.constexpr, BLOCK_HALF: tl.constexpr
):  # fmt: skip
    """Rotate pairs (d, HALF + d) of every head; ``source`` and ``target`` [heads, 1] point to where heads begin.

    Angles of second elements lie SECOND behind those of first ones; 0: they are the same.
    """
    d = tl.arange(0, BLOCK_HALF)[None, :]
    mask = row_mask & (d < HALF)
    c = tl.load(cos + d, mask=d < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + d, mask=d < HALF, other=0.0).to(tl.float32)
    first = tl.load(source + d, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + d, mask=mask, other=0.0).to(tl.float32)
    if SECOND > 0:
        c_second = tl.load(cos + SECOND + d, mask=d < HALF, other=0.0).to(tl.float32)
        s_second = tl.load(sin + SECOND + d, mask=d < HALF, other=0.0).to(tl.float32)
    else:
        c_second = c
        s_second = s
    tl.store(target + d, (first * c - second * s).to(target.dtype.element_ty), mask=mask)
    tl.store(target + HALF + d, (second * c_second + first * s_second).to(target.dtype.element_ty), mask=mask)


@triton.jit
def copy(source, target, row_mask, BEGIN: tl.constexpr, END: tl.constexpr, BLOCK: tl.constexpr):
    """Elements BEGIN..END of every head."""
    d = tl.arange(0, BLOCK)[None, :]
    mask = row_mask & (d < END - BEGIN)
    tl.store(target + BEGIN + d, tl.load(source + BEGIN + d, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["kv_index"])
def rotate_and_store(
    q, k, v, cos, sin, k_cache, v_cache, kv_index, q_row, q_row_head, k_row, k_row_head, v_row, v_row_head,
    cos_row, sin_row, k_page, k_head, k_slot, v_page, v_head, v_slot,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, TILE_HEADS: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, SECOND: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (T, tiles of kv heads, then of heads). Keys and values go to their page; queries are rotated in place."""
    wait_then_allow(EARLY)
    KV_TILES: tl.constexpr = (KV_HEADS + TILE_HEADS - 1) // TILE_HEADS
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    cos += row * cos_row
    sin += row * sin_row
    if tile < KV_TILES:
        head = tile * TILE_HEADS + tl.arange(0, TILE_HEADS)[:, None]
        has = head < KV_HEADS
        index = tl.load(kv_index + row)
        keys = k + row * k_row + head * k_row_head
        k_out = k_cache + index // PAGE * k_page + head * k_head + index % PAGE * k_slot
        rotate(keys, k_out, has, cos, sin, HALF, SECOND, BLOCK_HALF)
        if D > 2 * HALF:
            copy(keys, k_out, has, 2 * HALF, D, BLOCK_REST)
        v_out = v_cache + index // PAGE * v_page + head * v_head + index % PAGE * v_slot
        copy(v + row * v_row + head * v_row_head, v_out, has, 0, D, BLOCK_D)
    else:
        head = (tile - KV_TILES) * TILE_HEADS + tl.arange(0, TILE_HEADS)[:, None]
        queries = q + row * q_row + head * q_row_head
        rotate(queries, queries, head < HEADS, cos, sin, HALF, SECOND, BLOCK_HALF)


def rotate_and_write_kv(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, kv_index: Tensor
) -> None:
    """Rotate ``q`` in place, store rotated ``k`` and ``v`` at ``kv_index``; see ``terms.rotate_and_write_kv``.

    What it saves over separate operators is launches. Raises a KernelError.
    """
    term_checks.check_rotary(q, k, cos, sin)
    guard.check_write(k, v, k_cache, v_cache, kv_index)
    launch(q, k, v, cos, sin, k_cache, v_cache, kv_index, half=cos.shape[1], second=0)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_index: Tensor,
    *,
    half: int,
    second: int,
) -> None:
    """``rotate_and_write_kv`` of arguments that were checked; ``half`` and ``second`` as the kernel's HALF, SECOND."""
    (num_rows, heads, head_dim), kv_heads = q.shape, k.shape[1]
    if num_rows:
        tiles = triton.cdiv(kv_heads, TILE_HEADS) + triton.cdiv(heads, TILE_HEADS)
        rotate_and_store[(num_rows, tiles)](
            q, k, v, cos, sin, k_cache, v_cache, kv_index, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            cos.stride(0), sin.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3],
            HEADS=heads, KV_HEADS=kv_heads, TILE_HEADS=TILE_HEADS, D=head_dim, HALF=half, SECOND=second,
            BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_HALF=triton.next_power_of_2(half),
            BLOCK_REST=triton.next_power_of_2(max(head_dim - 2 * half, 1)), num_warps=2, **early(q.device),
        )  # fmt: skip
