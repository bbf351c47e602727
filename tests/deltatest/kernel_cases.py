"""Random adapters, work lists and paged caches for operator tests, with float64 oracles built from dense matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltaserve_kernels import LoraTables, SparseTables

Parts = tuple[tuple[int, float, float], ...]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


@dataclass
class LinearCase:
    """Tables over ``num_slots`` slots and one group of linears, and the dense float64 delta of each entry."""

    in_features: int
    members: list[tuple[int, int, int]]
    num_slots: int
    dtype: torch.dtype = torch.float32
    dense: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_linears = max(member[0] for member in self.members) + 1
        self.lora = LoraTables(num_linears, self.num_slots)
        self.sparse = SparseTables(num_linears, self.num_slots)
        self.lora_dense: dict[tuple[int, int], Tensor] = {}
        self.sparse_dense: dict[tuple[int, int], Tensor] = {}

    @property
    def width(self) -> int:
        return max(member[2] for member in self.members)

    def add_lora(self, slot: int, rank: int, linears: Sequence[int] | None = None) -> None:
        for linear, start, stop in self.members:
            if linears is None or linear in linears:
                seed = 1000 * slot + linear
                a = randn(rank, self.in_features, dtype=self.dtype, seed=seed, scale=self.in_features**-0.5)
                b_t = randn(rank, stop - start, dtype=self.dtype, seed=seed + 500, scale=rank**-0.5)
                self.lora.set(linear, slot, a, b_t)
                self.lora_dense[linear, slot] = b_t.double().t() @ a.double()

    def add_sparse(self, slot: int, density: float = 0.05, linears: Sequence[int] | None = None) -> None:
        for linear, start, stop in self.members:
            if linears is None or linear in linears:
                generator = torch.Generator().manual_seed(7000 + 1000 * slot + linear)
                mask = torch.rand(stop - start, self.in_features, generator=generator) < density
                values = torch.randn(int(mask.sum()), generator=generator).to(self.dtype)
                self.sparse.set(linear, slot, *csr(mask, values))
                dense = torch.zeros(stop - start, self.in_features, dtype=torch.float64)
                dense[mask] = values.double()
                self.sparse_dense[linear, slot] = dense

    def expected(self, kind: str, y: Tensor, x: Tensor, bindings: Sequence[Parts], depth: float) -> Tensor:
        """float64 ``y`` plus every row's deltas, from the dense matrices."""
        out = y.double().clone()
        dense = self.lora_dense if kind == "lora" else self.sparse_dense
        for row, parts in enumerate(bindings):
            for slot, first, last in parts:
                for linear, start, stop in self.members:
                    if (linear, slot) in dense:
                        delta = dense[linear, slot] @ x[row].double()
                        out[row, start:stop] += (first + (last - first) * depth) * delta
        return out

    def tables(self, kind: str) -> LoraTables | SparseTables:
        return self.lora if kind == "lora" else self.sparse


def csr(mask: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(indptr, cols, values) of a boolean mask [N, K], entries in row-major order."""
    indptr = torch.zeros(mask.shape[0] + 1, dtype=torch.int32)
    indptr[1:] = mask.sum(dim=1).cumsum(dim=0)
    return indptr, mask.nonzero()[:, 1].to(torch.int32).clone(), values


@dataclass
class PagedCase:
    """Sequences over a shuffled paged cache whose every unused position is NaN."""

    q_lens: list[int]
    kv_lens: list[int]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    seed: int = 0
    extra_blocks: int = 3

    def __post_init__(self) -> None:
        counts = [-(-length // 16) for length in self.kv_lens]
        num_blocks = sum(counts) + self.extra_blocks
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(self.seed)).to(torch.int32)
        # As in the engine's pool: K and V of several layers share a page, so the views are strided.
        pool = torch.full((num_blocks, 2, 2, self.kv_heads, 16, self.head_dim), float("nan"), dtype=self.dtype)
        self.k_cache, self.v_cache = pool[:, 1, 0], pool[:, 1, 1]
        self.block_tables = torch.full((len(counts), max([1, *counts]) + 1), -1, dtype=torch.int32)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        used = 0
        for seq, (count, length) in enumerate(zip(counts, self.kv_lens, strict=True)):
            self.block_tables[seq, :count] = order[used : used + count]
            used += count
            keys = randn(length, self.kv_heads, self.head_dim, dtype=self.dtype, seed=self.seed + 10 * seq + 1)
            values = randn(length, self.kv_heads, self.head_dim, dtype=self.dtype, seed=self.seed + 10 * seq + 2)
            for pos in range(length):
                block = int(self.block_tables[seq, pos // 16])
                self.k_cache[block, :, pos % 16], self.v_cache[block, :, pos % 16] = keys[pos], values[pos]
            self.keys.append(keys)
            self.values.append(values)
        self.cu_seqlens_q = torch.tensor([0, *self.q_lens]).cumsum(dim=0).to(torch.int32)
        self.kv_lens_tensor = torch.tensor(self.kv_lens, dtype=torch.int32)
        self.q = randn(sum(self.q_lens), self.heads, self.head_dim, dtype=self.dtype, seed=self.seed + 3, scale=2.0)

    @property
    def args(self) -> tuple[Tensor, ...]:
        return (self.q, self.k_cache, self.v_cache, self.block_tables, self.cu_seqlens_q, self.kv_lens_tensor)

    def expected(
        self, scale: float, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        """float64 attention, one query and one head at a time."""
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        row = 0
        for seq, (q_len, kv_len) in enumerate(zip(self.q_lens, self.kv_lens, strict=True)):
            for i in range(q_len):
                position = kv_len - q_len + i
                first = 0 if window is None else max(0, position - window + 1)
                for head in range(self.heads):
                    kv_head = head // (self.heads // self.kv_heads)
                    keys = self.keys[seq][first : position + 1, kv_head].double()
                    values = self.values[seq][first : position + 1, kv_head].double()
                    scores = keys @ self.q[row, head].double() * scale
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    if sinks is not None:
                        weights = torch.cat([scores, sinks[head].double().view(1)]).softmax(dim=0)[:-1]
                    else:
                        weights = scores.softmax(dim=0)
                    out[row, head] = weights @ values
                row += 1
        return out
