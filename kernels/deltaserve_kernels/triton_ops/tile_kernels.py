"""One small kernel that cuts the items of a work list into row tiles: the whole per-step preparation of a launch."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)
RECORD = tl.constexpr(8)  # numbers of a tile's record, 32 bytes: one sector of memory


@triton.jit(
    do_not_specialize=[
        "item_rows",
        "item_parts",
        "tile_item",
        "tile_first",
        "item_plane",
        "records",
        "part_slot",
        "num_items",
        "capacity",
    ]
)
def build_tiles(
    item_rows, item_parts, part_slot, tile_item, tile_first, item_plane, records, num_items, capacity,
    TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (1). Tiles of an item stand together, items in order, -1 after the last; see ``tiles.RowTiles``.

    Items past the last of a padded list have no rows, so they make no tile.
    """
    num_tiles = 0
    num_planes = 0
    for begin in range(0, num_items, BLOCK):
        item = begin + tl.arange(0, BLOCK)
        known = item < num_items
        first = tl.load(item_rows + item, mask=known, other=0)
        rows = tl.load(item_rows + item + 1, mask=known, other=0) - first
        parts = tl.load(item_parts + item + 1, mask=known, other=0) - tl.load(item_parts + item, mask=known, other=0)
        tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
        start = num_tiles + tl.cumsum(tiles, 0) - tiles
        planes = rows * parts
        plane = num_planes + tl.cumsum(planes, 0) - planes
        tl.store(item_plane + item, plane, mask=known)
        part = tl.load(item_parts + item, mask=known, other=0)
        slot = tl.load(part_slot + part, mask=known & (parts > 0), other=0)
        for step in range(0, tl.max(tiles, 0)):
            has = step < tiles
            tl.store(tile_item + start + step, item, mask=has)
            tl.store(tile_first + start + step, first + step * TILE_ROWS, mask=has)
            record = records + (start + step) * RECORD
            tl.store(record, tl.minimum(rows - step * TILE_ROWS, TILE_ROWS), mask=has)
            tl.store(record + 1, first + step * TILE_ROWS, mask=has)
            tl.store(record + 2, part, mask=has)
            tl.store(record + 3, part + parts, mask=has)
            tl.store(record + 4, slot, mask=has)
            tl.store(record + 5, plane + step * TILE_ROWS, mask=has)
            tl.store(record + 6, rows, mask=has)
        num_tiles += tl.sum(tiles, 0)
        num_planes += tl.sum(planes, 0)
    for begin in range(num_tiles, capacity, BLOCK):
        tile = begin + tl.arange(0, BLOCK)
        tl.store(tile_item + tile, tl.full((BLOCK,), -1, dtype=tl.int32), mask=tile < capacity)
        for word in tl.static_range(RECORD):  # no rows, and no parts
            tl.store(records + tile * RECORD + word, tl.zeros((BLOCK,), dtype=tl.int32), mask=tile < capacity)
