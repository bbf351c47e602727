"""Row tiles of a work list: what one program of a kernel takes. Built on the device, once per step, without a sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from deltaserve_kernels.triton_ops.tile_kernels import RECORD, build_tiles
from deltaserve_kernels.worklist import WorkList


@dataclass(frozen=True)
class RowTiles:
    """Every item of a work list cut into tiles of at most ``tile_rows`` rows.

    The number of tiles is known to the device alone; ``capacity`` bounds it from the list's shapes, so a grid of that
    size covers them all, and programs whose ``tile_item`` is negative have nothing to do.

    tile_item:      int32 [capacity]  item of the tile, or -1
    tile_first:     int32 [capacity]  position of its first row in ``work.rows``; any number where there is no tile
    item_plane:     int32 [I]         first row of the item in the buffer of shrunk rows: parts * rows, part-major
    records:        int32 [capacity, 8]  the same once more, as a kernel wants it at one place: rows of the tile (0: no
                    tile), first position, first part, end of its parts, slot of the first part, plane row of the
                    tile's first row for the first part, distance to that of the next part
    num_plane_rows: rows of that buffer
    """

    tile_rows: int
    capacity: int
    tile_item: Tensor
    tile_first: Tensor
    item_plane: Tensor
    records: Tensor
    num_plane_rows: int

    def arguments(self, work: WorkList) -> tuple[Tensor, ...]:
        """The tiles and their list, in the order of kernels that shrink to planes and expand them."""
        return (
            self.tile_item, self.tile_first, work.rows, work.item_rows, work.item_parts, self.item_plane,
            work.part_slot, work.part_scale,
        )  # fmt: skip


_cache = WeakIdKeyDictionary()


def row_tiles(work: WorkList, tile_rows: int) -> RowTiles:
    """The tiles of a list that is not empty; the same object for every layer of a step.

    They are kept with the list object: a list whose memory is filled anew needs a new object (``PaddedLayout``).
    """
    of_work: dict[int, RowTiles] | None = _cache.get(work)
    if of_work is None:
        of_work = _cache[work] = {}
    if tile_rows not in of_work:
        of_work[tile_rows] = _build(work, tile_rows)
    return of_work[tile_rows]


def _build(work: WorkList, tile_rows: int) -> RowTiles:
    num_rows, num_items = work.rows.numel(), work.num_items
    # A tile has a row, and an item at most one tile that is not full.
    capacity = min(num_rows, num_items + num_rows // tile_rows)
    tile_item, tile_first = torch.empty(2, capacity, dtype=torch.int32, device=work.device)
    item_plane = torch.empty(num_items, dtype=torch.int32, device=work.device)
    records = torch.empty(capacity, RECORD.value, dtype=torch.int32, device=work.device)
    build_tiles[(1,)](
        work.item_rows, work.item_parts, work.part_slot, tile_item, tile_first, item_plane, records,
        num_items, capacity, TILE_ROWS=tile_rows, num_warps=4,
    )  # fmt: skip
    num_planes = work.num_planes
    if num_planes is None:  # a list from elsewhere, whose counts only the device knows: a sync
        num_planes = int((work.item_rows.diff() * work.item_parts.diff()).sum())
    return RowTiles(tile_rows, capacity, tile_item, tile_first, item_plane, records, num_planes)
