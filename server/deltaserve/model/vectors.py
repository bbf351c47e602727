"""A projection group in a step where some rows have vector terms: scales of inputs and outputs, biases.

Rows with vectors are the base's product, then scales and biases, then low rank, then sparse, each rounded; whatever
their groups hold, and whoever else is in the step; blocks come last. All other rows go through the product as ever.

Scales of an input act on the base's product alone. A row whose members need different inputs enters the product once
more for each of them, so that weights are read once; a group of one has its rows replaced.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaserve.model.blocks import add_blocks
from deltaserve_kernels import VectorStep, lora_linear, scale_shift, sparse_linear

if TYPE_CHECKING:
    from deltaserve.model.context import ForwardContext
    from deltaserve.model.linear import Member, ProjectionGroup


def apply_with_vectors(group: ProjectionGroup, rows: Tensor, ctx: ForwardContext, step: VectorStep) -> Tensor:
    """``rows`` [T, K] -> [T, N], as ``ProjectionGroup.apply``; ``ctx.work`` is the step's whole list."""
    members, depth = group.members, group.depth
    fed, moves = _feed(group, rows, step)
    others = step.others
    if others is not None and ctx.lora is not None and others.concerns(ctx.lora, members):
        if len(fed) != len(rows):
            others = replace(others, num_rows=len(fed))
        y = group.weight.matmul_lora(fed, group.bias, others, ctx.lora, members, depth)
    else:
        y = group.weight.matmul(fed, group.bias)
    for member, targets, first in moves:
        y[targets, member.start : member.stop] = y[first : first + len(targets), member.start : member.stop]
    y = y[: len(rows)]
    scale_shift(y, step.work, step.family.outputs, members, depth)
    if ctx.lora is not None:
        lora_linear(y, rows, step.work, ctx.lora, members, depth)
    if ctx.sparse is not None and ctx.work is not None:
        sparse_linear(y, rows, ctx.work, ctx.sparse, members, depth)
    if ctx.blocks is not None and ctx.work is not None:
        add_blocks(y, rows, ctx.work, ctx.blocks, members, depth)
    return y


def _feed(group: ProjectionGroup, rows: Tensor, step: VectorStep) -> tuple[Tensor, list[tuple[Member, Tensor, int]]]:
    """What the product is given, and which of its results belong elsewhere: (member, rows int64 [R], first row)."""
    tables = step.family.inputs
    scaled = [member for member in group.members if tables.has_any(member.linear)]
    if not scaled:
        return rows, []
    width = rows.shape[1]
    if len(group.members) == 1:
        fed = rows.clone()
        scale_shift(fed, step.work, tables, ((scaled[0].linear, 0, width),), group.depth)
        return fed, []
    extras, moves, first = [rows], [], len(rows)
    for member in scaled:
        chosen = step.rows_with(tables, member.linear)
        targets = step.rows if chosen is None else step.rows[chosen]
        if not len(targets):
            continue
        x = rows[step.rows]
        scale_shift(x, step.compact, tables, ((member.linear, 0, width),), group.depth)
        extras.append(x if chosen is None else x[chosen])
        moves.append((member, targets, first))
        first += len(targets)
    return (torch.cat(extras) if moves else rows), moves
