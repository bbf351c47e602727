"""Row tiles of a work list: what one program of a kernel takes. Built on the device, once per step, without a sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from deltaserve_kernels.worklist import WorkList


@dataclass(frozen=True)
class RowTiles:
    """Every item of a work list cut into tiles of at most ``tile_rows`` rows.

    The number of tiles is known to the device alone; ``capacity`` bounds it from the list's shapes, so a grid of that
    size covers them all, and programs whose ``tile_item`` is negative have nothing to do.

    tile_item:      int32 [capacity]  item of the tile, or -1
    tile_first:     int32 [capacity]  position of its first row in ``work.rows``
    item_plane:     int32 [I]         first row of the item in the buffer of shrunk rows: parts * rows, part-major
    num_plane_rows: rows of that buffer
    """

    tile_rows: int
    capacity: int
    tile_item: Tensor
    tile_first: Tensor
    item_plane: Tensor
    num_plane_rows: int


_cache = WeakIdKeyDictionary()


def row_tiles(work: WorkList, tile_rows: int) -> RowTiles:
    """The tiles of a list that is not empty; the same object for every layer of a step."""
    of_work: dict[int, RowTiles] | None = _cache.get(work)
    if of_work is None:
        of_work = _cache[work] = {}
    if tile_rows not in of_work:
        of_work[tile_rows] = _build(work, tile_rows)
    return of_work[tile_rows]


def _build(work: WorkList, tile_rows: int) -> RowTiles:
    capacity = work.num_items + work.rows.numel() // tile_rows
    row_counts, part_counts = work.item_rows.diff(), work.item_parts.diff()
    tile_counts = (row_counts + tile_rows - 1) // tile_rows
    tile_ends = tile_counts.cumsum(0)
    tile = torch.arange(capacity, device=work.device)
    item = torch.searchsorted(tile_ends, tile, right=True)
    inside = item.clamp(max=work.num_items - 1)
    first = work.item_rows[inside] + (tile - (tile_ends - tile_counts)[inside]) * tile_rows
    plane_counts = row_counts * part_counts
    # One part an item is what serving without compositions has. Only other lists cost a sync, once per step.
    one_part = work.part_slot.numel() == work.num_items
    return RowTiles(
        tile_rows=tile_rows,
        capacity=capacity,
        tile_item=torch.where(item < work.num_items, item, -1).to(torch.int32),
        tile_first=first.to(torch.int32),
        item_plane=(plane_counts.cumsum(0) - plane_counts).to(torch.int32),
        num_plane_rows=work.rows.numel() if one_part else int(plane_counts.sum()),
    )
