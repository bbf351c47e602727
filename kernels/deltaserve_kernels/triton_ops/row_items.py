"""What a kernel that runs over rows knows of each: its item, and whether its parts have terms of a family.

Built on the device, once per step and list, without a sync, so that a captured pass builds them anew at each replay.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from deltaserve_kernels.triton_ops.tiles import row_tiles
from deltaserve_kernels.worklist import WorkList

TILE_ROWS = 16
FLAG_ROWS = 128
_cache = WeakIdKeyDictionary()
_all_rows = WeakIdKeyDictionary()
_flagged = WeakIdKeyDictionary()


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


def all_rows(work: WorkList) -> Tensor:
    """int32 [T]: 0, 1, 2, ... The same tensor for every layer of a step."""
    found: Tensor | None = _all_rows.get(work)
    if found is None:
        found = _all_rows[work] = torch.arange(work.num_rows, dtype=torch.int32, device=work.device)
    return found


def listed_rows(work: WorkList) -> Tensor:
    """int32 [R]: the rows that a grid has to cover: those of the list, all rows of the step where it is padded."""
    return all_rows(work) if work.is_padded else work.rows


@triton.jit(do_not_specialize=["found", "row_item", "item_parts", "part_slot", "part_scale", "flags", "num_rows"])
def flag_rows(found, row_item, item_parts, part_slot, part_scale, flags, num_rows, BLOCK: tl.constexpr):
    """Grid (blocks of rows)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    item = tl.load(row_item + row, mask=row < num_rows, other=-1)
    has = item >= 0
    begin = tl.load(item_parts + item, mask=has, other=0)
    count = tl.load(item_parts + item + 1, mask=has, other=0) - begin
    flagged = tl.zeros((BLOCK,), dtype=tl.int32)
    for step in range(0, tl.max(count, 0)):
        live = step < count
        part = begin + step
        flag = tl.load(flags + tl.load(part_slot + part, mask=live, other=0), mask=live, other=0)
        first = tl.load(part_scale + 2 * part, mask=live, other=0.0)
        last = tl.load(part_scale + 2 * part + 1, mask=live, other=0.0)
        flagged |= ((flag != 0) & ((first != 0.0) | (last != 0.0))).to(tl.int32)
    tl.store(found + row, flagged, mask=row < num_rows)


def flagged_rows(work: WorkList, flags: Tensor) -> Tensor:
    """int32 [T]: 1 for rows of which some part, not 0 throughout, lies in a slot that ``flags`` int32 [num_slots] has;
    0 for all others. The same tensor for every layer of a step, for one family's flags."""
    of_work: dict[int, Tensor] | None = _flagged.get(work)
    if of_work is None:
        of_work = _flagged[work] = {}
    found = of_work.get(flags.data_ptr())
    if found is None:
        found = of_work[flags.data_ptr()] = torch.zeros(work.num_rows, dtype=torch.int32, device=work.device)
        if not work.is_empty:
            flag_rows[(triton.cdiv(work.num_rows, FLAG_ROWS),)](
                found, row_items(work), work.item_parts, work.part_slot, work.part_scale, flags, work.num_rows,
                BLOCK=FLAG_ROWS, num_warps=4,
            )  # fmt: skip
    return found
