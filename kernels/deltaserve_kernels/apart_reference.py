"""Dense differences and residual modules in plain PyTorch: the definition, on any device.

fp32 throughout, one rounding to the output's dtype. Rows of an item go through in tiles of a fixed number of rows
(padded with zeros), so that every product has the same shape whoever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from deltaserve_kernels.apart_family import ApartStep
from deltaserve_kernels.base_weight import ReadWeight, WeightView
from deltaserve_kernels.checks import Member
from deltaserve_kernels.dense_tables import DenseEntry
from deltaserve_kernels.errors import DtypeMismatch, OutOfRange, ShapeMismatch
from deltaserve_kernels.module_tables import ACTIVATIONS, ModuleEntry
from deltaserve_kernels.reference import TILE_ROWS

# A difference is widened piece by piece; a piece has at most this many elements (16 MiB in fp32).
MAX_PIECE = 4 * 1024 * 1024


def dense_linear(
    y: Tensor,
    x: Tensor,
    step: ApartStep,
    members: Sequence[Member],
    depth: float,
    weight: ReadWeight | None = None,
) -> None:
    """``y[row, start:stop] += sum over parts of scale * (Q x[row])`` in place; see ``apart.dense_linear``."""
    tables = step.family.dense
    _check(x, tables.matrix_dtype)
    if max(stop for _, _, stop in members) > y.shape[1]:
        raise OutOfRange(f"members {list(members)} are not inside y's {y.shape[1]} columns")
    base = step.weight_of(members, weight)
    for rows, parts in step.items:
        tiles: Tensor | None = None
        for linear, start, stop in members:
            base_rows = None if base is None else _member_rows(base, start)
            total: Tensor | None = None
            for slot, first, last in parts:
                entry, scale = tables.entry(linear, slot), first + (last - first) * depth
                if entry is None or scale == 0.0:
                    continue
                if (entry.out_features, entry.in_features) != (stop - start, x.shape[1]):
                    raise ShapeMismatch(
                        f"linear {linear}, slot {slot}: a difference [{entry.out_features}, {entry.in_features}]; "
                        f"[{stop - start}, {x.shape[1]}] is needed"
                    )
                tiles = _tiles(x[rows].float()) if tiles is None else tiles
                term = _product(tiles, entry, base_rows).flatten(0, 1)[: len(rows)] * scale
                total = term if total is None else total + term
            if total is not None:
                y[rows, start:stop] = (y[rows, start:stop].float() + total).to(y.dtype)


def add_modules(y: Tensor, step: ApartStep, point: int, depth: float, read: Mapping[int, Tensor]) -> None:
    """``y[row] += scale * module(its input)`` in place; see ``apart.add_modules``."""
    tables = step.family.modules
    _check(y, tables.dtype)
    for rows, parts in step.items:
        total: Tensor | None = None
        for slot, first, last in parts:
            entry, scale = tables.entry(point, slot), first + (last - first) * depth
            if entry is None or scale == 0.0:
                continue
            total = y[rows].float() if total is None else total
            if entry.reads >= 0 and entry.reads not in read:
                raise OutOfRange(f"slot {slot} reads point {entry.reads}, which is not given")
            given = total if entry.reads < 0 else read[entry.reads][rows].float()
            total = total + scale * run_module(given, entry)
        if total is not None:
            y[rows] = total.to(y.dtype)


def run_module(x: Tensor, entry: ModuleEntry) -> Tensor:
    """fp32 [R, H] -> fp32 [R, H]: ``up(phi(down x + down_bias)) + up_bias``."""
    if x.shape[1] != entry.down.shape[1]:
        raise ShapeMismatch(f"a module of size {entry.down.shape[1]} is given rows of {x.shape[1]}")
    down, up_t, activate = entry.down.float().t(), entry.up_t.float(), ACTIVATIONS[entry.activation]
    pieces = []
    for tile in _tiles(x):
        middle = tile @ down
        middle = activate(middle if entry.down_bias is None else middle + entry.down_bias)
        pieces.append(middle @ up_t)
    out = torch.cat(pieces)[: len(x)]
    return out if entry.up_bias is None else out + entry.up_bias


def _check(x: Tensor, dtype: torch.dtype | None) -> None:
    if dtype is not None and x.dtype != dtype:
        raise DtypeMismatch(f"the rows are {x.dtype}; the tables hold {dtype}")


def _member_rows(base: WeightView, start: int) -> Callable[[int, int], Tensor]:
    """Rows of the base's weight of the member whose first output is ``start``."""
    return lambda i, j: base.rows(start + i, start + j)


def _product(tiles: Tensor, entry: DenseEntry, base_rows: Callable[[int, int], Tensor] | None) -> Tensor:
    """[n, TILE_ROWS, K] -> [n, TILE_ROWS, N], widening one piece of the difference at a time."""
    step = max(1, MAX_PIECE // entry.in_features)
    pieces = []
    for i in range(0, entry.out_features, step):
        piece = entry.rows(i, min(i + step, entry.out_features), base_rows).t()
        pieces.append(torch.stack([tile @ piece for tile in tiles]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def _tiles(x: Tensor) -> Tensor:
    """[R, K] -> [ceil(R / TILE_ROWS), TILE_ROWS, K], zeros behind the last row."""
    count = -(-len(x) // TILE_ROWS)
    padded = x.new_zeros(count * TILE_ROWS, x.shape[1])
    padded[: len(x)] = x
    return padded.view(count, TILE_ROWS, -1)
