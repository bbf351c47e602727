"""Launches of the low-rank kernels over a work list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaserve_kernels.checks import Member
from deltaserve_kernels.tables import RANK_TILE, LoraTables
from deltaserve_kernels.triton_ops import guard, lora_programs, lora_rows
from deltaserve_kernels.triton_ops.early import early
from deltaserve_kernels.triton_ops.members import MemberGroup, groups_of
from deltaserve_kernels.triton_ops.tiles import RowTiles, row_tiles
from deltaserve_kernels.vector_tables import VectorTables
from deltaserve_kernels.worklist import WorkList


@dataclass(frozen=True)
class LoraForm:
    """One way to launch: how many launches, and tiles.

    ``by_row``: a tile's rows one after another, without matrix products (``lora_rows``); for few rows an adapter. K is
    then cut into chunks of ``block_k``, and ``rank_tile`` ranks at a time are taken by each of ``rank_programs``.
    ``fold``: shrunk rows scaled and rounded to the 16-bit dtype, K not split; for many rows an adapter.
    ``split_k``: columns of x a split takes at least; the number of splits is a function of K alone.
    ``rank_tile``: ranks that one reading of x serves, ``b_ranks``: of B that one program holds; those past an adapter's
    own cost no bytes.
    """

    by_row: bool = False
    one_launch: bool = False
    fold: bool = False
    tile_rows: int = 16
    block_k: int = 128
    split_k: int = 512
    max_splits: int = 16
    rank_tile: int = RANK_TILE
    num_warps: int = 4
    num_stages: int = 3
    block_n: int = 128
    b_ranks: int = RANK_TILE
    b_warps: int = 4
    rank_programs: int = 4

    def splits(self, in_features: int) -> int:
        """The largest power of two that leaves each split ``split_k`` columns, 1 to ``max_splits``."""
        if self.fold:
            return 1
        if self.by_row:
            return -(-in_features // self.block_k)
        return min(self.max_splits, 1 << max(0, (in_features // self.split_k).bit_length() - 1))

    def chunk(self, in_features: int) -> int:
        """Columns of one split, whole blocks of K."""
        return -(-in_features // (self.splits(in_features) * self.block_k)) * self.block_k


DECODE = LoraForm(by_row=True, tile_rows=4, block_k=4096, rank_tile=4, block_n=512, b_warps=2)
PRODUCTS = LoraForm()
ONE_LAUNCH = LoraForm(one_launch=True)
PREFILL = LoraForm(fold=True, tile_rows=64, block_k=128, num_stages=4)


def form_for(work: WorkList) -> LoraForm:
    """By what the step is: with prompts ``PREFILL``, whose tensor-core tiles many rows fill, else ``DECODE``."""
    return PREFILL if work.has_prompts else DECODE


def lora_linear(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: LoraTables,
    members: Sequence[Member],
    depth: float,
    form: LoraForm | None = None,
    vectors: VectorTables | None = None,
) -> None:
    """``y[row, start:stop] += sum over parts of scale * (B (A x[row]))``; see ``operators.lora_linear``.

    With ``vectors`` the same launches scale and shift y; see ``terms.lora_vector_linear``.

    No form: ``form_for``. A form chosen by number of rows would change a decode row's bits with its company. Raises a
    KernelError.
    """
    form = form_for(work) if form is None else form
    guard.check_linear(y, x, work, tables, members)
    if vectors is not None:
        guard.check_wide(vectors)
    if work.is_empty:
        return
    tiles = row_tiles(work, form.tile_rows)
    for group in groups_of(members):
        # Members without any entry stay in: a launch's shape must not follow the adapters, or one would compile anew.
        some = group.members
        if work.concerns(tables, some) or (vectors is not None and work.concerns(vectors, some)):
            _launch(y, x, work, tables, group, depth, form, tiles, vectors)


def _launch(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: LoraTables,
    group: MemberGroup,
    depth: float,
    form: LoraForm,
    tiles: RowTiles,
    vectors: VectorTables | None,
) -> None:
    in_features, num_members = x.shape[1], len(group.members)
    splits = form.splits(in_features)
    # Room, not work: programs go by true ranks. A padded list may be captured, and adapters of higher rank come later.
    max_rank = tables.rank_capacity if work.is_padded else tables.rank_in_use
    plane_stride = num_members * max_rank
    dtype = y.dtype if form.fold else torch.float32
    h = torch.empty(splits, tiles.num_plane_rows, plane_stride, dtype=dtype, device=x.device)
    planes = (h, h.stride(0), plane_stride, max_rank)
    lists = (work.rows, tiles.records, work.part_slot, work.part_scale, tables.pointers, tables.ranks)
    epilogue = tables.pointers if vectors is None else vectors.pointers
    tiles_n = group.num_tiles(form.block_n)
    read: dict[str, Any] = {
        "K": in_features, "CHUNK": form.chunk(in_features), "BLOCK_K": form.block_k, "TILE_ROWS": form.tile_rows,
    }  # fmt: skip
    write: dict[str, Any] = {"SPLITS": splits, "BLOCK_N": form.block_n, "VECTORS": vectors is not None, **group.place}
    if form.by_row:
        lora_rows.shrink_rows[(num_members * form.rank_programs, splits, tiles.capacity)](
            x, x.stride(0), *planes, *lists, tables.num_slots, *group.linears, depth, K=in_features,
            CHUNK=form.block_k, GROUP=form.rank_tile, PROGRAMS=form.rank_programs,
            num_warps=form.num_warps, **early(x.device),
        )  # fmt: skip
        lora_rows.expand_rows[(tiles.capacity, tiles_n)](
            y, y.stride(0), *planes, *lists, epilogue, tables.num_slots, *group.linears, depth,
            **write, RANK_TILE=form.b_ranks, num_warps=form.b_warps, **early(x.device),
        )  # fmt: skip
        return
    if not form.one_launch:
        shared = {"FOLD": form.fold, "TILE_ROWS": form.tile_rows, **early(x.device)}
        lora_programs.shrink[(num_members, splits, tiles.capacity)](
            x, x.stride(0), *planes, *lists, tables.num_slots, *group.linears, depth,
            **read | shared, RANK_TILE=form.rank_tile, num_warps=form.num_warps, num_stages=form.num_stages,
        )  # fmt: skip
        lora_programs.expand[(tiles.capacity, tiles_n)](
            y, y.stride(0), *planes, *lists, epilogue, tables.num_slots, *group.linears, depth,
            **write | shared, RANK_TILE=form.b_ranks, num_warps=form.b_warps,
        )  # fmt: skip
        return
    num_flags = tiles.capacity * num_members
    producers = num_flags * splits
    lora_programs.fused[(producers + tiles.capacity * tiles_n,)](
        y, y.stride(0), x, x.stride(0), *planes, counters(num_flags, x.device), *lists, epilogue, tables.num_slots,
        *group.linears, depth, producers, num_flags,
        **read, **write, RANK_TILE=form.rank_tile, NUM_MEMBERS=num_members, TILES_N=tiles_n, num_warps=form.num_warps,
    )  # fmt: skip


_counters: dict[torch.device, list[Tensor]] = {}
_MIN_COUNTERS = 1 << 14


def counters(num_flags: int, device: torch.device) -> Tensor:
    """Tickets, programs done and flags for ``fused``, all zero between launches; one per device, so one stream only.

    A buffer once handed out is never freed: a captured graph may hold its address. Raises RuntimeError when one would
    have to be made while a graph is captured, whose pool would own it.
    """
    held = _counters.setdefault(device, [])
    if not held or held[-1].numel() < num_flags + 2:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a launch was captured that had never run before; run it once first")
        held.append(torch.zeros(max(_MIN_COUNTERS, 2 * num_flags), dtype=torch.int32, device=device))
    return held[-1]
