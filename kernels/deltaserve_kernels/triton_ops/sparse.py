"""Launches of the sparse kernel, and the tables it reads: jagged copies of the CSR deltas in ``SparseTables``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from deltaserve_kernels.checks import Member
from deltaserve_kernels.errors import OutOfRange
from deltaserve_kernels.tables import SparseTables
from deltaserve_kernels.triton_ops import guard, jagged, sparse_kernels
from deltaserve_kernels.triton_ops.lora import MAX_MEMBERS, place_of
from deltaserve_kernels.triton_ops.tiles import row_tiles
from deltaserve_kernels.worklist import WorkList


@dataclass(frozen=True)
class SparseForm:
    """Tiles. Untuned: no GPU has run them. ``tile_rows`` rows share one reading of a window; x is gathered from its
    rows, element by element, which suits few rows an adapter."""

    tile_rows: int = 4
    unroll: int = 8
    num_warps: int = 4


DEFAULT = SparseForm()


class JaggedTables:
    """Device addresses of jagged deltas, following one ``SparseTables``.

    pointers: int64 [num_linears, 5, num_slots]  the arrays of ``JaggedDelta.tensors``; 0 where empty
    """

    def __init__(self, tables: SparseTables) -> None:
        shape = (tables.num_linears, 5, tables.num_slots)
        self.pointers = torch.zeros(shape, dtype=torch.int64, device=tables.device)
        # What an entry was made from, to see when it is replaced, and the entry, to keep its memory.
        self._held: dict[tuple[int, int], tuple[Tensor, jagged.JaggedDelta]] = {}

    def follow(self, tables: SparseTables, linear: int, in_features: int) -> None:
        """Bring one linear's entries up to date. Converts what is new on the host, once an entry.

        Raises OutOfRange for a column that x does not have or 16 bits do not hold.
        """
        for slot in range(tables.num_slots):
            entry, held = tables.get(linear, slot), self._held.get((linear, slot))
            if entry is None:
                if held is not None:
                    del self._held[linear, slot]
                    self.pointers[linear, :, slot] = 0
                continue
            values = entry[2]
            if held is None or held[0] is not values:
                delta = jagged.from_csr(*(tensor.cpu() for tensor in entry)).to(tables.device)
                addresses = [tensor.data_ptr() for tensor in delta.tensors]
                self.pointers[linear, :, slot] = torch.tensor(addresses, dtype=torch.int64, device=tables.device)
                held = self._held[linear, slot] = (values, delta)
            if held[1].num_columns > in_features:
                last = held[1].num_columns - 1
                raise OutOfRange(f"linear {linear}, slot {slot}: column {last}, x has {in_features}")


_followers = WeakIdKeyDictionary()


def jagged_tables(tables: SparseTables) -> JaggedTables:
    """The jagged twin of ``tables``, made anew when the number of slots has changed."""
    found: JaggedTables | None = _followers.get(tables)
    if found is None or found.pointers.shape[2] != tables.num_slots:
        found = _followers[tables] = JaggedTables(tables)
    return found


def sparse_linear(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: SparseTables,
    members: Sequence[Member],
    depth: float,
    form: SparseForm = DEFAULT,
) -> None:
    """``y[row, start:stop] += sum over parts of scale * (S x[row])``; see ``operators.sparse_linear``.

    A delta is converted when it is first met, which blocks; warm-up should meet them all. Raises a KernelError.
    """
    guard.check_linear(y, x, work, tables, members)
    if work.is_empty:
        return
    twin = jagged_tables(tables)
    for linear, _, _ in members:
        twin.follow(tables, linear, x.shape[1])
    tiles = row_tiles(work, form.tile_rows)
    for begin in range(0, len(members), MAX_MEMBERS):
        group = members[begin : begin + MAX_MEMBERS]
        if not any(tables.has_any(linear) for linear, _, _ in group):
            continue
        padded = [*group, *[(0, 0, 0)] * (MAX_MEMBERS - len(group))]
        widths = [stop - start for _, start, stop in padded]
        columns = [start for _, start, _ in padded]
        windows = sum(triton.cdiv(width, jagged.WINDOW) for width in widths)
        sparse_kernels.sparse[(tiles.capacity, windows)](
            y, y.stride(0), x, x.stride(0),
            tiles.tile_item, tiles.tile_first, work.rows, work.item_rows, work.item_parts, work.part_slot,
            work.part_scale, twin.pointers, tables.num_slots,
            *[linear for linear, _, _ in padded], depth,
            TILE_ROWS=form.tile_rows, WINDOW=jagged.WINDOW, UNROLL=form.unroll,
            num_warps=form.num_warps, **place_of(widths, columns),
        )  # fmt: skip
