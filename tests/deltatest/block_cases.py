"""Random row and column blocks for operator tests, with float64 oracles built from dense matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltaserve_kernels import BlockTables
from deltatest.kernel_cases import Parts, randn


@dataclass
class BlockCase:
    """Tables over one group of linears, and the dense float64 delta of each entry. ``sea``: see ``afloat``."""

    in_features: int
    members: list[tuple[int, int, int]]
    tables: BlockTables
    dtype: torch.dtype
    sea: bool
    dense: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        in_features: int,
        widths: Sequence[int],
        num_slots: int,
        dtype: torch.dtype = torch.float32,
        sea: bool = False,
    ) -> BlockCase:
        """Members of these widths with gaps of 3 columns between them."""
        starts = [sum(widths[:i]) + 3 * i for i in range(len(widths))]
        members = [(i, start, start + width) for i, (start, width) in enumerate(zip(starts, widths, strict=True))]
        return cls(in_features, members, BlockTables(len(widths), num_slots), dtype, sea)

    @property
    def width(self) -> int:
        return self.members[-1][2]

    def add(self, slot: int, num_rows: int | None, num_cols: int | None, linears: Sequence[int] | None = None) -> None:
        """A block of so many listed rows and columns, at most what there is; None: no list."""
        for linear, start, stop in self.members:
            if linears is not None and linear not in linears:
                continue
            seed, width = 1000 * slot + linear, stop - start
            rows, cols = listed(width, num_rows, seed), listed(self.in_features, num_cols, seed + 1)
            shape = (width if rows is None else len(rows), self.in_features if cols is None else len(cols))
            block = randn(*shape, dtype=self.dtype, seed=seed, scale=shape[1] ** -0.5)
            dense = torch.zeros(width, self.in_features, dtype=torch.float64)
            at_rows = torch.arange(width) if rows is None else rows.long()
            at_cols = torch.arange(self.in_features) if cols is None else cols.long()
            dense[at_rows[:, None], at_cols[None, :]] = block.double()
            d = block.t().contiguous() if rows is None else block
            if self.sea:
                d = afloat(d, float("nan"))
                rows, cols = (None if t is None else afloat(t, 1 << 30) for t in (rows, cols))
            self.tables.set(linear, slot, d, self.in_features, width, out_rows=rows, in_cols=cols)
            self.dense[linear, slot] = dense

    def expected(self, y: Tensor, x: Tensor, bindings: Sequence[Parts], depth: float) -> Tensor:
        """float64 ``y`` plus every row's deltas, from the dense matrices."""
        out = y.double().clone()
        for row, parts in enumerate(bindings):
            for slot, first, last in parts:
                for linear, start, stop in self.members:
                    if (linear, slot) in self.dense:
                        delta = self.dense[linear, slot] @ x[row].double()
                        out[row, start:stop] += (first + (last - first) * depth) * delta
        return out


def listed(size: int, count: int | None, seed: int) -> Tensor | None:
    if count is None:
        return None
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return order[: min(count, size)].sort().values.to(torch.int32)


def afloat(tensor: Tensor, sea: float) -> Tensor:
    """The same numbers with 64 bytes of ``sea`` before and after, contiguous and aligned as tables demand."""
    margin = 64 // tensor.element_size()
    memory = torch.full((tensor.numel() + 3 * margin,), sea, dtype=tensor.dtype)
    skip = margin + (-memory.data_ptr() // tensor.element_size()) % (16 // tensor.element_size())
    inside = memory[skip : skip + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return inside
