"""Launches of residual modules over a work list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from deltaserve_kernels import row_checks
from deltaserve_kernels.module_tables import ModuleTables
from deltaserve_kernels.triton_ops import guard, lora, module_kernels
from deltaserve_kernels.triton_ops.early import early
from deltaserve_kernels.triton_ops.tiles import row_tiles
from deltaserve_kernels.worklist import WorkList


@dataclass(frozen=True)
class ModuleForm:
    """``programs`` share out the ranks of a tile's module, ``group`` at a time, in ``chunk`` columns; the way up has
    ``block_n`` outputs a program and ``rank_tile`` ranks at a time."""

    tile_rows: int = lora.DECODE.tile_rows
    programs: int = 16
    group: int = 4
    chunk: int = 1024
    rank_tile: int = 16
    block_n: int = 256
    num_warps: int = 4


FORM = ModuleForm()


def add_modules(
    y: Tensor,
    work: WorkList,
    tables: ModuleTables,
    point: int,
    depth: float,
    read: Mapping[int, Tensor],
    form: ModuleForm = FORM,
) -> None:
    """``y[row] += scale * module(its input)``; see ``apart_rows.module_rows``. Raises a KernelError."""
    other = guard.check_modules(y, work, tables, point, read)
    if work.is_empty:
        return
    size = y.shape[1]
    tiles = row_tiles(work, form.tile_rows)
    max_rank = tables.rank_capacity
    h = torch.empty(work.rows.numel(), max_rank, dtype=torch.float32, device=y.device)
    lists = (
        work.rows, tiles.records, work.part_slot, work.part_scale, tables.pointers, tables.sizes, tables.num_slots,
        point, depth,
    )  # fmt: skip
    module_kernels.module_down[(form.programs, tiles.capacity)](
        h, max_rank, y, y.stride(0), other, other.stride(0), *lists,
        SIZE=size, CHUNK=form.chunk, GROUP=form.group, num_warps=form.num_warps, **early(y.device),
    )  # fmt: skip
    module_kernels.module_up[(tiles.capacity, triton.cdiv(size, form.block_n))](
        y, y.stride(0), h, max_rank, *lists,
        SIZE=size, RANK_TILE=form.rank_tile, BLOCK_N=form.block_n, num_warps=form.num_warps, **early(y.device),
    )  # fmt: skip


def set_module_rows_aside(
    y: Tensor, work: WorkList, tables: ModuleTables, point: int, form: ModuleForm = FORM
) -> Tensor:
    """See ``apart_rows.set_module_rows_aside``. Raises a KernelError."""
    row_checks.check_rows(y, work, tables, (point,), y.shape[-1], name="y")
    kept = torch.empty(work.rows.numel(), y.shape[1], dtype=y.dtype, device=y.device)
    _move(module_kernels.set_module_rows_aside, y, kept, work, tables, point, form)
    return kept


def put_module_rows_back(
    y: Tensor, kept: Tensor, work: WorkList, tables: ModuleTables, point: int, form: ModuleForm = FORM
) -> None:
    """See ``apart_rows.put_module_rows_back``. Raises a KernelError."""
    row_checks.check_rows(y, work, tables, (point,), y.shape[-1], name="y")
    _move(module_kernels.put_module_rows_back, y, kept, work, tables, point, form)


def _move(
    kernel: triton.JITFunction,
    y: Tensor,
    kept: Tensor,
    work: WorkList,
    tables: ModuleTables,
    point: int,
    form: ModuleForm,
) -> None:
    if work.is_empty:
        return
    tiles = row_tiles(work, form.tile_rows)
    size, block = y.shape[1], 1024
    kernel[(tiles.capacity, triton.cdiv(size, block))](
        y, y.stride(0), kept, work.rows, tiles.records, work.part_slot, work.part_scale,
        tables.pointers, tables.num_slots, point, SIZE=size, BLOCK_N=block, num_warps=form.num_warps, **early(y.device),
    )  # fmt: skip
