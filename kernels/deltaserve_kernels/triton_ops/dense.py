"""Launches of dense differences over a work list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deltaserve_kernels.base_weight import ReadWeight
from deltaserve_kernels.checks import Member
from deltaserve_kernels.dense_tables import DenseTables
from deltaserve_kernels.triton_ops import dense_kernels, guard
from deltaserve_kernels.triton_ops.members import groups_of
from deltaserve_kernels.triton_ops.tiles import row_tiles
from deltaserve_kernels.worklist import WorkList


@dataclass(frozen=True)
class DenseForm:
    """``tile_rows`` rows of one adapter share what is read of its matrix; ``block_n`` outputs are a program's.
    ``block_k`` inputs are taken at a time, a multiple of 64: of masks half as many, which keeps registers free."""

    tile_rows: int = 16
    block_n: int = 32
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 4


DECODE = DenseForm()
PROMPTS = DenseForm(tile_rows=64, block_n=64, block_k=64)


def dense_linear(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: DenseTables,
    members: Sequence[Member],
    depth: float,
    weight: ReadWeight | None = None,
    form: DenseForm | None = None,
) -> None:
    """``y[row, start:stop] += sum over parts of scale * (Q x[row])``; see ``apart_rows.dense_rows``.

    ``weight`` may be None while the tables hold no mask. No form: ``PROMPTS`` for a step with prompts, else
    ``DECODE``. Raises a KernelError.
    """
    if form is None:
        form = PROMPTS if work.has_prompts else DECODE
    guard.check_apart(y, x, work, tables, members)
    if work.is_empty:
        return
    base = guard.checked_weight(weight, y, x, tables)
    tiles = row_tiles(work, form.tile_rows)
    for group in groups_of(members):
        if not work.concerns(tables, group.members):
            continue
        dense_kernels.dense[(tiles.capacity, group.num_tiles(form.block_n))](
            y, y.stride(0), x, x.stride(0), work.rows, tiles.records, work.part_slot, work.part_scale,
            tables.pointers, tables.num_slots, base, *group.linears, depth,
            K=x.shape[1], BLOCK_K=form.block_k, TILE_ROWS=form.tile_rows, BLOCK_N=form.block_n,
            num_warps=form.num_warps, num_stages=form.num_stages, **group.place,
        )  # fmt: skip
