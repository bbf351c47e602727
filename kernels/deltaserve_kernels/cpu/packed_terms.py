"""Products of packed weights with everything that adapters change of them, in one call.

What a group of linears adds to its base's product is looked up once, and used by every step that has the same rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deltaserve_kernels.cpu import check_dtype, check_rows, operator, prepared
from deltaserve_kernels.rotation_tables import RotationTables
from deltaserve_kernels.tables import LoraTables
from deltaserve_kernels.vector_tables import VectorTables
from deltaserve_kernels.worklist import WorkList


class TurnedOutputs(NamedTuple):
    """Rows of ``work`` whose outputs some rotation turns: the base's product, rounded, then scales and biases,
    rotations of the product and low rank, each rounded. None where the tables hold nothing for the group."""

    work: WorkList
    scales: VectorTables | None = None
    rotations: RotationTables | None = None
    low_rank: LoraTables | None = None


def group_terms(
    packed: Tensor,
    outputs: int,
    rows: int,
    columns: list[int],
    depth: float,
    *,
    outs: Tensor | None = None,
    ins: Tensor | None = None,
    turning: tuple[WorkList, RotationTables] | None = None,
    low_rank: tuple[WorkList, LoraTables] | None = None,
    turned: TurnedOutputs | None = None,
) -> Tensor:
    """What ``packed_linear_terms`` adds to products of ``rows`` rows with ``packed``, looked up once for all steps with
    the same rows. For members that are whole panels of 16 outputs.

    ``columns`` are the members one after another; ``outs`` and ``ins`` come from ``changes``. Holds addresses, so it is
    good until the tables change, or the arrays of low rank grow. Raises ValueError.
    """
    dtype = packed.dtype
    turns = [] if turning is None else _lists(dtype, rows, *turning)
    lora = [] if low_rank is None else _lists(dtype, rows, *low_rank)
    work = None if turned is None else prepared(turned.work)
    after: list[list[Tensor]] = [
        [] if turned is None or tables is None else _lists(dtype, rows, turned.work, tables)[1:]
        for tables in (turned[1:] if turned is not None else (None, None, None))
    ]
    return operator("group_terms")(packed, outputs, rows, columns, depth, outs, ins, turns, lora, work, *after)


def _lists(
    dtype: torch.dtype, rows: int, work: WorkList, tables: VectorTables | RotationTables | LoraTables
) -> list[Tensor]:
    if not isinstance(tables, VectorTables):  # whose numbers are of their own dtypes
        check_dtype(dtype, tables)
    check_rows(rows, work, tables)
    ranks = [tables.ranks] if isinstance(tables, LoraTables) else []
    return [prepared(work), tables.pointers, *ranks, tables.dims]


def packed_linear_terms(x: Tensor, packed: Tensor, bias: Tensor | None, terms: Tensor) -> Tensor:
    """``packed_linear`` with what ``group_terms`` found.

    Rows get scales and biases of outputs as by ``scale_shift``, then low rank, all in the fp32 sums that are rounded
    once. What a member multiplies is x with the scales of inputs, to the bits of ``scale_shift`` on a copy, and then
    turned, to those of ``rotate_blocks`` from x to that copy; low rank multiplies x as it is. Rows with turned outputs
    see ``TurnedOutputs``. A row's bits depend on that row and its binding alone. Raises ValueError.
    """
    return operator("packed_linear_terms")(x, packed, bias, terms)
