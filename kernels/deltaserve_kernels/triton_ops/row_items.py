"""The item of each row of a step, where a kernel runs over rows: built on the device, once per step, without a sync."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from deltaserve_kernels.triton_ops.tiles import row_tiles
from deltaserve_kernels.worklist import WorkList

TILE_ROWS = 16
_cache = WeakIdKeyDictionary()


@triton.jit(do_not_specialize=["row_item", "tile_item", "tile_first", "rows", "item_rows"])
def store_items(row_item, tile_item, tile_first, rows, item_rows, TILE_ROWS: tl.constexpr):
    """Grid (tiles)."""
    item = tl.load(tile_item + tl.program_id(0))
    if item >= 0:
        position = tl.load(tile_first + tl.program_id(0)) + tl.arange(0, TILE_ROWS)
        live = position < tl.load(item_rows + item + 1)
        row = tl.load(rows + position, mask=live, other=0)
        tl.store(row_item + row, tl.full((TILE_ROWS,), 0, dtype=tl.int32) + item, mask=live)


def row_items(work: WorkList) -> Tensor:
    """int32 [T]: the item of each row, -1 for rows of the base alone. The same tensor for every layer of a step."""
    found: Tensor | None = _cache.get(work)
    if found is None:
        found = torch.full((work.num_rows,), -1, dtype=torch.int32, device=work.device)
        if not work.is_empty:
            tiles = row_tiles(work, TILE_ROWS)
            store_items[(tiles.capacity,)](
                found, tiles.tile_item, tiles.tile_first, work.rows, work.item_rows, TILE_ROWS=TILE_ROWS, num_warps=1
            )
        _cache[work] = found
    return found
