"""What one would write in PyTorch with speed in mind; cpu.py times the operators against these.

Rows come grouped by adapter in equal shares; ``adapters`` [T] names each row's adapter, ``groups`` the rows of each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deltaserve_kernels import LoraTables, SparseTables

GATHER_ROWS = 64  # up to here a gathered copy of the adapters per row beats a loop over adapters
AddLinear = Callable[[int, Tensor, Tensor, list[slice]], Tensor]


def lora(tables: LoraTables) -> AddLinear:
    """Few rows: adapters gathered per row, two bmm. Many: a loop over adapters. All adapters have one rank here."""
    stacks = []
    for linear in range(tables.num_linears):
        entries = [entry for slot in range(tables.num_slots) if (entry := tables.get(linear, slot))]
        stacks.append((torch.stack([entry[0] for entry in entries]), torch.stack([entry[1] for entry in entries])))

    def run(linear: int, x: Tensor, adapters: Tensor, groups: list[slice]) -> Tensor:
        a, b_t = stacks[linear]
        if len(x) <= GATHER_ROWS:
            return torch.bmm(torch.bmm(x.unsqueeze(1), a[adapters].transpose(1, 2)), b_t[adapters]).squeeze(1)
        return torch.cat([x[rows] @ a[slot].t() @ b_t[slot] for slot, rows in enumerate(groups)])

    return run


def sparse(tables: SparseTables, in_features: int) -> AddLinear:
    """The delta as a dense matrix, one product per adapter."""
    dense: dict[int, list[Tensor]] = {}

    def run(linear: int, x: Tensor, adapters: Tensor, groups: list[slice]) -> Tensor:
        if linear not in dense:
            entries = [entry for slot in range(tables.num_slots) if (entry := tables.get(linear, slot))]
            size = (entries[0][0].numel() - 1, in_features)
            dense[linear] = [
                torch.sparse_csr_tensor(starts, cols, values, size=size).to_dense() for starts, cols, values in entries
            ]
        return torch.cat([x[rows] @ dense[linear][slot].t() for slot, rows in enumerate(groups)])

    return run


def attention(q: Tensor, pool: Tensor, table: Tensor, num_positions: int) -> Callable[[int], Tensor]:
    """SDPA over a contiguous copy of the cache, query groups folded into the query axis.

    q [T, H, D]; pool [blocks, layers, 2, kv_heads, 16, D]; table [S, blocks per sequence], equal lengths. The copy is
    made here, outside the timing.
    """
    num_seqs, blocks = table.shape
    kv_heads, head_dim = pool.shape[3], pool.shape[5]
    group, num_queries = q.shape[1] // kv_heads, q.shape[0] // num_seqs
    folded = q.view(num_seqs, num_queries, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(num_seqs, kv_heads, group * num_queries, head_dim)
    mask = torch.ones(num_queries, num_positions, dtype=torch.bool).tril(num_positions - num_queries).repeat(group, 1)
    caches = []
    for layer in range(pool.shape[1]):
        pages = pool[table.view(-1), layer].view(num_seqs, blocks, 2, kv_heads, 16, head_dim).permute(2, 0, 3, 1, 4, 5)
        caches.append(pages.reshape(2, num_seqs, kv_heads, blocks * 16, head_dim)[:, :, :, :num_positions])

    def run(layer: int) -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(
            folded, caches[layer][0], caches[layer][1], attn_mask=None if num_queries == 1 else mask
        )
        return out.view(num_seqs, kv_heads, group, num_queries, head_dim).permute(0, 3, 1, 2, 4).reshape(q.shape)

    return run
