"""The launched kernels of LoRA: ``shrink`` and ``expand`` (two launches), ``fused`` (one). Up to three members each.

Programs of tiles past the list's end (records of no rows) leave at once, so grids are of fixed capacity and no
count ever travels to the host.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from deltaserve_kernels.triton_ops.early import wait_then_allow
from deltaserve_kernels.triton_ops.lora_kernels import expand_tile, pick, shrink_tile

# Not specialised: numbers that differ from step to step or layer to layer, and pointers into one packed buffer, whose
# alignment differs from step to step; live traffic would have the compiler run for each. max_rank and the strides are
# always multiples of 16, which the compiler is to know.
VARYING = [
    "num_slots", "depth", "tile_item", "tile_first", "rows", "item_rows", "item_parts", "item_plane", "records",
    "part_slot", "part_scale", "pointers", "ranks", "vectors",
    "linear0", "linear1", "linear2",
]  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def shrink(
    x, x_stride, h, split_stride, plane_stride, max_rank,
    rows, records, part_slot, part_scale, pointers, ranks, num_slots,
    linear0, linear1, linear2, depth,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_ROWS: tl.constexpr, RANK_TILE: tl.constexpr, FOLD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (members, splits, tiles): programs that read the same rows of x run side by side.

    EARLY: see ``early``.
    """
    wait_then_allow(EARLY)
    member = tl.program_id(0)
    shrink_tile(
        x, x_stride, h, split_stride, plane_stride, max_rank,
        rows, records, part_slot, part_scale, pointers, ranks, num_slots,
        tl.program_id(2), tl.program_id(1), member, pick(member, linear0, linear1, linear2), depth,
        K, CHUNK, BLOCK_K, TILE_ROWS, RANK_TILE, FOLD,
    )  # fmt: skip


@triton.jit
def place(pid, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr, BLOCK_N: tl.constexpr):
    """(member, tile inside the member) of output tile ``pid``; tiles are numbered over all members."""
    tiles0 = (WIDTH0 + BLOCK_N - 1) // BLOCK_N
    tiles1 = (WIDTH1 + BLOCK_N - 1) // BLOCK_N
    member = (pid >= tiles0).to(tl.int32) + (pid >= tiles0 + tiles1).to(tl.int32)
    return member, pid - pick(member, 0, tiles0, tiles0 + tiles1)


@triton.jit(do_not_specialize=VARYING)
def expand(
    y, y_stride, h, split_stride, plane_stride, max_rank,
    rows, records, part_slot, part_scale, pointers, ranks,
    vectors, num_slots,
    linear0, linear1, linear2, depth,
    SPLITS: tl.constexpr, TILE_ROWS: tl.constexpr, RANK_TILE: tl.constexpr, BLOCK_N: tl.constexpr,
    FOLD: tl.constexpr, VECTORS: tl.constexpr, EARLY: tl.constexpr,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    COLUMN0: tl.constexpr, COLUMN1: tl.constexpr, COLUMN2: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, output tiles of all members). EARLY: the launch before is ``shrink``."""
    if EARLY:
        gdc_launch_dependents()
    member, tile_n = place(tl.program_id(1), WIDTH0, WIDTH1, WIDTH2, BLOCK_N)
    expand_tile(
        y, y_stride, h, split_stride, plane_stride, max_rank,
        rows, records, part_slot, part_scale, pointers, ranks, vectors, num_slots,
        h, tl.program_id(0), member, pick(member, linear0, linear1, linear2),
        pick(member, WIDTH0, WIDTH1, WIDTH2), pick(member, COLUMN0, COLUMN1, COLUMN2), tile_n, depth,
        SPLITS, TILE_ROWS, RANK_TILE, BLOCK_N, FOLD, VECTORS, "launch" if EARLY else "",
    )  # fmt: skip


@triton.jit(do_not_specialize=[*VARYING, "num_producers", "num_flags"])
def fused(
    y, y_stride, x, x_stride, h, split_stride, plane_stride, max_rank, counters,
    rows, records, part_slot, part_scale, pointers, ranks,
    vectors, num_slots,
    linear0, linear1, linear2, depth,
    num_producers, num_flags,
    K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, TILE_ROWS: tl.constexpr, RANK_TILE: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_MEMBERS: tl.constexpr, TILES_N: tl.constexpr, VECTORS: tl.constexpr,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    COLUMN0: tl.constexpr, COLUMN1: tl.constexpr, COLUMN2: tl.constexpr,
):  # fmt: skip
    """Grid (producers + consumers). ``counters`` int32 [2 + flags], zero before and after: tickets drawn, programs
    done, then one flag for each (tile, member) that counts the splits written.

    A program's part goes by its ticket, not its index: whoever waits drew a later ticket than those it waits for, so
    they run already, whatever order the device starts programs in. Producers wait for nobody.
    """
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    if ticket < num_producers:
        split = ticket % SPLITS
        pair = ticket // SPLITS
        member = pair % NUM_MEMBERS
        tile = pair // NUM_MEMBERS
        shrink_tile(
            x, x_stride, h, split_stride, plane_stride, max_rank,
            rows, records, part_slot, part_scale, pointers, ranks, num_slots,
            tile, split, member, pick(member, linear0, linear1, linear2), depth,
            K, CHUNK, BLOCK_K, TILE_ROWS, RANK_TILE, False,
        )  # fmt: skip
        # All threads' stores, then one thread's release: the barrier orders the first before the second.
        tl.debug_barrier()
        tl.atomic_add(counters + 2 + pair, 1, sem="release")
    else:
        output = ticket - num_producers
        tile = output // TILES_N
        member, tile_n = place(output % TILES_N, WIDTH0, WIDTH1, WIDTH2, BLOCK_N)
        expand_tile(
            y, y_stride, h, split_stride, plane_stride, max_rank,
            rows, records, part_slot, part_scale, pointers, ranks, vectors, num_slots,
            counters + 2 + tile * NUM_MEMBERS + member, tile, member, pick(member, linear0, linear1, linear2),
            pick(member, WIDTH0, WIDTH1, WIDTH2), pick(member, COLUMN0, COLUMN1, COLUMN2), tile_n, depth,
            SPLITS, TILE_ROWS, RANK_TILE, BLOCK_N, False, VECTORS, "flag",
        )  # fmt: skip
    # The last one out leaves the counters as it found them, so that a captured graph replays.
    tl.debug_barrier()
    done = tl.atomic_add(counters + 1, 1, sem="acq_rel")
    if done == tl.num_programs(0) - 1:
        for begin in range(0, num_flags + 2, 256):
            index = begin + tl.arange(0, 256)
            tl.store(counters + index, tl.zeros((256,), dtype=tl.int32), mask=index < num_flags + 2)
