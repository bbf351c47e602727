"""A projection group in a step where some rows have vector terms: scales and rotations of inputs and outputs, biases.

Where the base's product is the C++ library's own, scales and biases join its sums beside the low rank, for all rows in
one call, and each member may have inputs of its own; only rows with rotated outputs (``VectorStep.turned``) are the
base's product, then rotation, then low rank. Elsewhere rows with vectors are the base's product, then scales, biases
and rotations, then low rank, each rounded; whatever their groups hold, and whoever else is in the step; all other
rows go through the product as ever. Sparse terms and blocks come last.

Scales and rotations of an input act on the base's product alone. In a library's product a row whose members need
different inputs enters once more for each of them, so that weights are read once; a group of one has its rows
replaced. On one side of a linear, scales and rotations of several adapters meet the same row, and what they change of
it is summed.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaserve.model.blocks import add_blocks
from deltaserve_kernels import (
    LoraTables,
    Prepared,
    RotationTables,
    VectorFamily,
    VectorStep,
    WorkList,
    cpu,
    lora_linear,
    rotate_blocks,
    scale_shift,
    sparse_linear,
)

if TYPE_CHECKING:
    from deltaserve.model.context import ForwardContext
    from deltaserve.model.linear import Member, ProjectionGroup
    from deltaserve.model.weight import PanelPacked


class Joining:
    """A group whose product takes vectors into its sums, and what the tables hold for its linears.

    Asked at every group of every step, where each look into Python's objects counts: so the tables are looked through
    once for every change of them.
    """

    def __init__(self, packed: PanelPacked, members: tuple[Member, ...]) -> None:
        self.packed = packed
        self.members = members
        self._columns = list(chain.from_iterable(members))
        self._family: VectorFamily | None = None
        self._version = -1
        self._has_any = False
        self._has_outputs = self._has_inputs = False
        self._turning: RotationTables | None = None
        self._turns_outputs = False

    def concerns(self, step: VectorStep) -> bool:
        """Whether the group differs at all from one in a step without vectors."""
        family = step.family
        if family.version != self._version or family is not self._family:
            self._look(family)
        return self._has_any or step.turned is not None

    def _look(self, family: VectorFamily) -> None:
        members, rotations = self.members, family.in_rotations
        self._has_outputs, self._has_inputs = family.outputs.has_any_of(members), family.inputs.has_any_of(members)
        self._turning = rotations if rotations.has_any_of(members) else None
        self._turns_outputs = family.out_rotations.has_any_of(members)
        self._has_any = self._has_outputs or self._has_inputs or bool(self._turning)
        self._family, self._version = family, family.version

    def apply(self, group: ProjectionGroup, rows: Tensor, work: WorkList, lora: LoraTables, step: VectorStep) -> Tensor:
        """``rows`` [T, K] -> [T, N]: base, scales and biases, low rank and rotated inputs in one product; rotations of
        outputs after it. For a step that ``concerns`` has just been asked about; ``work`` is its whole list."""
        turned, depth = step.turned, group.depth
        found = prepared(step)
        y = cpu.packed_linear_terms(
            rows,
            self.packed.panels,
            self.packed.outputs,
            group.bias,
            self._columns,
            depth,
            found.outputs if self._has_outputs else None,
            found.inputs if self._has_inputs else None,
            None if self._turning is None else (step.work, self._turning),
            (work if turned is None else turned.others, lora) if lora.has_any_of(self.members) else None,
        )
        if turned is not None:
            self._turn_outputs(y, turned.step, depth)
            lora_linear(y, rows, turned.step.work, lora, self.members, depth)
        return y

    def _turn_outputs(self, y: Tensor, step: VectorStep, depth: float) -> None:
        """``_change_outputs``, to the bit, without a copy of the rows where rotations are all there is."""
        family, product = step.family, y
        if self._has_outputs:
            product = y.clone() if self._turns_outputs else y
            scale_shift(y, step.work, family.outputs, self.members, depth)
        if self._turns_outputs:
            cpu.rotate_blocks(y, product, step.work, family.out_rotations, self.members, depth)


def prepared(step: VectorStep) -> Prepared:
    """Found once a step, or less: a step stays while the same adapters are in the same rows."""
    found, family = step.prepared, step.family
    if found is None or found.version != family.version:
        own = step.work
        joining = own if step.turned is None else step.turned.others
        found = Prepared(
            family.version,
            None if family.outputs.is_empty else cpu.changes(family.outputs, joining),
            None if family.inputs.is_empty else cpu.changes(family.inputs, own),
            None if family.norms.is_empty else cpu.changes(family.norms, own),
        )
        step.remember(found)
    return found


def apply_with_vectors(group: ProjectionGroup, rows: Tensor, ctx: ForwardContext, step: VectorStep) -> Tensor:
    """``rows`` [T, K] -> [T, N], as ``ProjectionGroup.apply``; ``ctx.work`` is the step's whole list."""
    if group.joining is not None and ctx.lora is not None and ctx.work is not None:
        y = group.joining.apply(group, rows, ctx.work, ctx.lora, step)
    else:
        y = _one_by_one(group, rows, ctx, step)
    if ctx.sparse is not None and ctx.work is not None and ctx.work.concerns(ctx.sparse, group.members):
        sparse_linear(y, rows, ctx.work, ctx.sparse, group.members, group.depth)
    if ctx.blocks is not None and ctx.work is not None:
        add_blocks(y, rows, ctx.work, ctx.blocks, group.members, group.depth)
    return y


def _one_by_one(group: ProjectionGroup, rows: Tensor, ctx: ForwardContext, step: VectorStep) -> Tensor:
    """The same by operators that each round."""
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
    _change_outputs(y, group, step)
    if ctx.lora is not None:
        lora_linear(y, rows, step.work, ctx.lora, members, depth)
    return y


def _change_outputs(y: Tensor, group: ProjectionGroup, step: VectorStep) -> None:
    """Scales, biases and rotations of the base's product y [T, N], in place."""
    outputs, rotations = step.family.outputs, step.family.out_rotations
    if not rotations.has_any_of(group.members):
        scale_shift(y, step.work, outputs, group.members, group.depth)
        return
    product = y[step.rows]
    changed = product.clone()
    scale_shift(changed, step.compact, outputs, group.members, group.depth)
    rotate_blocks(changed, product, step.compact, rotations, group.members, group.depth)
    y[step.rows] = changed


def _feed(group: ProjectionGroup, rows: Tensor, step: VectorStep) -> tuple[Tensor, list[tuple[Member, Tensor, int]]]:
    """What the product is given, and which of its results belong elsewhere: (member, rows int64 [R], first row)."""
    scales, rotations = step.family.inputs, step.family.in_rotations
    changed = [m for m in group.members if scales.has_any(m.linear) or rotations.has_any(m.linear)]
    if not changed:
        return rows, []
    width = rows.shape[1]
    if len(group.members) == 1:
        fed = rows.clone()
        whole = ((changed[0].linear, 0, width),)
        scale_shift(fed, step.work, scales, whole, group.depth)
        rotate_blocks(fed, rows, step.work, rotations, whole, group.depth)
        return fed, []
    extras, moves, first = [rows], [], len(rows)
    for member in changed:
        chosen = step.rows_with(scales, member.linear, rotations)
        targets = step.rows if chosen is None else step.rows[chosen]
        if not len(targets):
            continue
        x = rows[step.rows]
        fed = x.clone()
        whole = ((member.linear, 0, width),)
        scale_shift(fed, step.compact, scales, whole, group.depth)
        rotate_blocks(fed, x, step.compact, rotations, whole, group.depth)
        extras.append(fed if chosen is None else fed[chosen])
        moves.append((member, targets, first))
        first += len(targets)
    return (torch.cat(extras) if moves else rows), moves
