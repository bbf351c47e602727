"""The operators in plain PyTorch: definition, oracle and fallback in one, on any device.

fp32 throughout, one rounding to the output's dtype at the end. Rows meet an adapter in tiles of a fixed number of rows
(padded with zeros), so that every product has the same shape whoever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from deltaserve_kernels import checks
from deltaserve_kernels.checks import BLOCK_SIZE, AnyTables, Member
from deltaserve_kernels.tables import LoraTables, SparseTables
from deltaserve_kernels.worklist import WorkList

TILE_ROWS = 32


def lora_linear(
    y: Tensor, x: Tensor, work: WorkList, tables: LoraTables, members: Sequence[Member], depth: float
) -> None:
    """``y[row, start:stop] += sum over parts of scale * (B (A x[row]))`` for every member and row of the work list."""
    checks.check_linear(y, x, work, tables, members)
    add_parts(y, x, work, tables, members, depth, _lora_delta)


def sparse_linear(
    y: Tensor, x: Tensor, work: WorkList, tables: SparseTables, members: Sequence[Member], depth: float
) -> None:
    """``y[row, start:stop] += sum over parts of scale * (S x[row])`` for every member and row of the work list."""
    checks.check_linear(y, x, work, tables, members)
    for linear, _, _ in members:
        for slot in set(work.part_slot.tolist()):
            columns = int(tables.extents[linear, 1, slot])
            if columns > x.shape[1]:
                raise checks.OutOfRange(f"linear {linear}, slot {slot}: column {columns - 1}, x has {x.shape[1]}")
    add_parts(y, x, work, tables, members, depth, _sparse_delta)


def _lora_delta(x_tile: Tensor, a: Tensor, b_t: Tensor, scale: float) -> Tensor:
    return (x_tile @ a.float().t() * scale) @ b_t.float()


def _sparse_delta(x_tile: Tensor, indptr: Tensor, cols: Tensor, values: Tensor, scale: float) -> Tensor:
    products = values.float()[:, None] * x_tile.t()[cols.long()]
    sums = torch.segment_reduce(products, "sum", offsets=indptr.long(), axis=0, initial=0.0)
    return sums.t() * scale


def add_parts(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: AnyTables,
    members: Sequence[Member],
    depth: float,
    delta: Callable[..., Tensor],
) -> None:
    """Add ``delta(x_tile, *entry, scale)`` of every part, members in turn; y is rounded once."""
    for rows, parts in items_of(work):
        for first in range(0, len(rows), TILE_ROWS):
            index = torch.tensor(rows[first : first + TILE_ROWS], device=x.device)
            x_tile = torch.zeros(TILE_ROWS, x.shape[1], device=x.device)
            x_tile[: len(index)] = x[index].float()
            for linear, start, stop in members:
                total = None
                for slot, scale_first, scale_last in parts:
                    tensors = tables.get(linear, slot)
                    if tensors is not None:
                        term = delta(x_tile, *tensors, scale_first + (scale_last - scale_first) * depth)
                        total = term if total is None else total + term
                if total is not None:
                    y[index, start:stop] = (y[index, start:stop].float() + total[: len(index)]).to(y.dtype)


def items_of(work: WorkList) -> Iterator[tuple[list[int], list[tuple[int, float, float]]]]:
    """(rows, parts) of each item."""
    rows, item_rows, item_parts = work.rows.tolist(), work.item_rows.tolist(), work.item_parts.tolist()
    slots, scales = work.part_slot.tolist(), work.part_scale.tolist()
    for item in range(len(item_rows) - 1):
        parts = range(item_parts[item], item_parts[item + 1])
        yield rows[item_rows[item] : item_rows[item + 1]], [(slots[p], scales[p][0], scales[p][1]) for p in parts]


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
) -> Tensor:
    """Causal attention of each sequence's queries over its own positions, one sequence at a time; [T, H, D]."""
    checks.check_attention(q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens, window, softcap, sinks)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    heads, kv_heads, head_dim = q.shape[1], k_cache.shape[1], q.shape[2]
    starts, lens = cu_seqlens_q.tolist(), kv_lens.tolist()
    for seq, kv_len in enumerate(lens):
        start, stop = starts[seq], starts[seq + 1]
        if start == stop:
            continue
        blocks = block_tables[seq, : -(-kv_len // BLOCK_SIZE)].long()
        # [blocks, kv_heads, 16, D] -> [kv_heads, 1, kv_len, D]; positions past kv_len may hold anything, so cut first.
        keys, values = (
            cache[blocks].transpose(0, 1).reshape(kv_heads, 1, -1, head_dim)[:, :, :kv_len].float()
            for cache in (k_cache, v_cache)
        )
        queries = q[start:stop].float().transpose(0, 1).reshape(kv_heads, heads // kv_heads, stop - start, head_dim)
        scores = queries @ keys.transpose(2, 3) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        query_pos = torch.arange(kv_len - (stop - start), kv_len, device=q.device)[:, None]
        key_pos = torch.arange(kv_len, device=q.device)[None, :]
        seen = key_pos <= query_pos
        if window is not None:
            seen &= key_pos > query_pos - window
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            extra = sinks.float().view(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, extra], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = scores.softmax(dim=-1)
        # A position no query of this chunk sees may be stale (even NaN), and 0 * NaN would leak it.
        values = values.masked_fill(~seen.any(dim=0)[None, None, :, None], 0.0)
        out[start:stop] = (weights @ values).reshape(heads, stop - start, head_dim).transpose(0, 1).to(q.dtype)
    return out


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_index: Tensor) -> None:
    """Store row t of ``k`` and ``v`` at block ``kv_index[t] // 16``, offset ``kv_index[t] % 16``."""
    checks.check_write(k, v, k_cache, v_cache, kv_index)
    block, offset = kv_index // BLOCK_SIZE, kv_index % BLOCK_SIZE
    k_cache[block, :, offset] = k
    v_cache[block, :, offset] = v
