"""One measured situation: a fused linear of the base in several layers, adapters in their tables, a batch of rows.

Adapters lie in stacks padded to the largest rank, since other implementations read them so; our tables point at the
true rank inside, which is contiguous. All memory of a case is its own, and goes with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deltabench.floors import FusedLinear, nonzeros
from deltabench.points import Point
from deltaserve_kernels import LoraTables, SparseEntry, SparseTables, WorkList, build_work_list

AddDelta = Callable[[int, Tensor], object]  # (layer, y [T, N]): add the adapters' terms of x into y
Csr = tuple[Tensor, Tensor, Tensor]
DIFFERENT_DELTAS = 4


class Case:
    """The base's part and the batch.

    weights: one [N, K] a layer; x [T, K]; y [T, N] scratch; ``owner`` int64 [T], each row's adapter; ``order`` int64
    [T], rows sorted by adapter; ``groups[g]`` int64, the rows of adapter g.
    """

    def __init__(self, group: FusedLinear, point: Point, layers: int, dtype: torch.dtype, device: torch.device) -> None:
        self.group, self.point, self.layers, self.dtype, self.device = group, point, layers, dtype, device
        self.weights = [
            self.random(group.out_features, group.in_features, scale=group.in_features**-0.5) for _ in range(layers)
        ]
        self.x = self.random(point.rows, group.in_features)
        self.y = torch.empty(point.rows, group.out_features, dtype=dtype, device=device)
        owner = torch.arange(point.rows) % point.adapters
        self.owner = owner.to(device)
        self.order = owner.argsort(stable=True).to(device)
        self.groups = [(owner == adapter).nonzero().flatten().to(device) for adapter in range(point.adapters)]
        self.work: WorkList = build_work_list([((int(slot), 1.0, 1.0),) for slot in owner], device)
        starts = [sum(group.widths[:i]) for i in range(len(group.widths))]
        # (linear, first column, end) of each layer, as the operators take them; linears count through all layers.
        self.members = [
            [(layer * len(starts) + i, start, start + group.widths[i]) for i, start in enumerate(starts)]
            for layer in range(layers)
        ]

    @property
    def columns(self) -> list[tuple[int, int]]:
        return [(start, stop) for _, start, stop in self.members[0]]

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device=self.device).normal_(std=scale)

    def base(self, layer: int) -> None:
        """The base's product into ``y``."""
        torch.mm(self.x, self.weights[layer].t(), out=self.y)

    def expected_base(self) -> Tensor:
        """float64 product of the base's layer 0."""
        return self.x.double() @ self.weights[0].double().t()

    def expected(self, y: Tensor) -> Tensor:
        """float64 ``y`` plus the adapters' terms of layer 0."""
        raise NotImplementedError


class LoraCase(Case):
    """``a[layer][member]`` [slots, max_rank, K] and ``b_t[layer][member]`` [slots, max_rank, N], zero past the rank."""

    def __init__(self, group: FusedLinear, point: Point, layers: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(group, point, layers, dtype, device)
        slots, self.max_rank = point.num_slots, max(point.ranks)
        # Slots without an adapter in this batch hold one all the same: that is what slots are for.
        self.ranks = [point.ranks[slot % len(point.ranks)] for slot in range(slots)]
        self.a: list[list[Tensor]] = []
        self.b_t: list[list[Tensor]] = []
        self.tables = LoraTables(layers * len(group.widths), slots, device)
        for _ in range(layers):
            self.a.append([self._stack(group.in_features, group.in_features**-0.5) for _ in group.widths])
            self.b_t.append([self._stack(width, self.max_rank**-0.5) for width in group.widths])
        for slot, rank in enumerate(self.ranks):
            self.tables.set_all(
                slot,
                [
                    (layer * len(group.widths) + i, self.a[layer][i][slot, :rank], self.b_t[layer][i][slot, :rank])
                    for layer in range(layers)
                    for i in range(len(group.widths))
                ],
            )

    def _stack(self, width: int, scale: float) -> Tensor:
        stack = self.random(len(self.ranks), self.max_rank, width, scale=scale)
        for slot, rank in enumerate(self.ranks):
            if rank < self.max_rank:
                stack[slot, rank:] = 0
        return stack

    def expected(self, y: Tensor) -> Tensor:
        out = y.double()
        x = self.x.double()
        for (start, stop), a, b_t in zip(self.columns, self.a[0], self.b_t[0], strict=True):
            for adapter, rows in enumerate(self.groups):
                out[rows, start:stop] += x[rows] @ a[adapter].double().t() @ b_t[adapter].double()
        return out


class SparseCase(Case):
    """``csr[layer][member][slot]``: places drawn at random, a few different deltas a linear, copied to all slots and
    layers (see ``draw``)."""

    def __init__(
        self,
        group: FusedLinear,
        point: Point,
        layers: int,
        dtype: torch.dtype,
        device: torch.device,
        density: float,
    ) -> None:
        super().__init__(group, point, layers, dtype, device)
        members, slots = len(group.widths), point.num_slots
        self.tables = SparseTables(layers * members, slots, device)
        drawn = [draw(self.tables, width, group.in_features, density, dtype) for width in group.widths]
        self.csr = [
            [[copy_of(some[slot % len(some)]) for slot in range(slots)] for some in drawn] for _ in range(layers)
        ]
        for slot in range(slots):
            self.tables.set_all(
                slot,
                [(layer * members + i, self.csr[layer][i][slot]) for layer in range(layers) for i in range(members)],
            )

    @cached_property
    def num_nonzeros(self) -> int:
        """Of one layer, all adapters."""
        return sum(entry.values.numel() for of_member in self.csr[0] for entry in of_member)

    def expected(self, y: Tensor) -> Tensor:
        out = y.double()
        x = self.x.double()
        for (start, stop), of_member in zip(self.columns, self.csr[0], strict=True):
            for adapter, rows in enumerate(self.groups):
                dense = to_dense(of_member[adapter][:3], self.group.in_features, torch.float64)
                out[rows, start:stop] += x[rows] @ dense.t()
        return out


def draw(
    tables: SparseTables, out_features: int, in_features: int, density: float, dtype: torch.dtype, scale: float = 1.0
) -> list[SparseEntry]:
    """A few different deltas, in every layout that ``tables`` keep. Slots get copies: to the device as good as drawn
    anew, and conversions, which happen on the host, are no part of what is measured."""
    tables.keep_jagged()
    found = []
    for _ in range(DIFFERENT_DELTAS):
        indptr, cols, values = random_csr(out_features, in_features, density, dtype, tables.device)
        found.append(tables.scan(indptr, cols, values * scale))
    return found


def copy_of(entry: SparseEntry) -> SparseEntry:
    """The same delta in memory of its own."""
    jagged = entry.jagged
    if jagged is not None:
        tensors = {field.name: getattr(jagged, field.name) for field in dataclasses.fields(jagged)}
        copies: dict[str, Any] = {name: value.clone() for name, value in tensors.items() if isinstance(value, Tensor)}
        jagged = dataclasses.replace(jagged, **copies)
    indptr, cols, values = (tensor.clone() for tensor in entry[:3])
    return SparseEntry(indptr, cols, values, entry.num_columns, jagged)


def random_csr(out_features: int, in_features: int, density: float, dtype: torch.dtype, device: torch.device) -> Csr:
    """A delta with ``nonzeros`` entries, at random places: made on the device."""
    count = nonzeros(in_features, out_features, density)
    places = torch.randint(in_features * out_features, (count,), device=device).sort().values
    indptr = torch.zeros(out_features + 1, dtype=torch.int32, device=device)
    indptr[1:] = torch.bincount(places // in_features, minlength=out_features).cumsum(0)
    values = torch.empty(count, dtype=dtype, device=device).normal_()
    return indptr, (places % in_features).to(torch.int32), values


def row_of_entry(indptr: Tensor) -> Tensor:
    """int64: the output row of each nonzero."""
    return torch.repeat_interleave(torch.arange(indptr.numel() - 1, device=indptr.device), indptr.long().diff())


def to_dense(entry: Csr, in_features: int, dtype: torch.dtype) -> Tensor:
    """[N, K]; entries at one place add up."""
    indptr, cols, values = entry
    dense = torch.zeros(indptr.numel() - 1, in_features, dtype=dtype, device=values.device)
    dense.index_put_((row_of_entry(indptr), cols.long()), values.to(dtype), accumulate=True)
    return dense
