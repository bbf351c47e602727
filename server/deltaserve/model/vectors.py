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

from deltaserve_kernels import (
    LoraTables,
    Prepared,
    VectorStep,
    WorkList,
    cpu,
    lora_linear,
    rotate_blocks,
    scale_shift,
)
from deltaserve_kernels.cpu.packed_terms import TurnedOutputs, group_terms, packed_linear_terms

if TYPE_CHECKING:
    from deltaserve.model.context import ForwardContext
    from deltaserve.model.linear import Member, ProjectionGroup
    from deltaserve.model.weight import PanelPacked


class Joining:
    """A group whose product takes vectors into its sums.

    Its linears are looked up in the tables once for all steps with the same rows: a look costs what a product of a few
    rows does.
    """

    def __init__(self, packed: PanelPacked, bias: Tensor | None, members: tuple[Member, ...], depth: float) -> None:
        self.packed, self.bias = packed, bias
        self.members, self.depth = members, depth

    def terms(self, work: WorkList, lora: LoraTables | None, step: VectorStep) -> Tensor | None:
        """For ``product``; None where the group differs in nothing from one in a step without vectors. ``work``: the
        step's whole list. Good while its rows and the tables stay."""
        family, turned, members, found = step.family, step.turned, self.members, prepared(step)
        has_outputs, has_low_rank = family.outputs.has_any_of(members), lora is not None and lora.has_any_of(members)
        has_inputs, turns_inputs = family.inputs.has_any_of(members), family.in_rotations.has_any_of(members)
        turns_outputs = turned is not None and family.out_rotations.has_any_of(members)
        # Low rank of rows with turned outputs is rounded apart in every group: their bits are their binding's alone.
        rounds_apart = turned is not None and has_low_rank
        if not (has_outputs or has_inputs or turns_inputs or turns_outputs or rounds_apart):
            return None
        return group_terms(
            self.packed.panels,
            self.packed.outputs,
            work.num_rows,
            list(chain.from_iterable(members)),
            self.depth,
            outs=found.outputs if has_outputs else None,
            ins=found.inputs if has_inputs else None,
            turning=(step.work, family.in_rotations) if turns_inputs else None,
            low_rank=(work if turned is None else turned.others, lora) if lora is not None and has_low_rank else None,
            turned=None
            if turned is None
            else TurnedOutputs(
                turned.step.work,
                family.outputs if has_outputs else None,
                family.out_rotations if turns_outputs else None,
                lora if has_low_rank else None,
            ),
        )

    def product(self, rows: Tensor, terms: Tensor) -> Tensor:
        """``rows`` [T, K] -> [T, N]: base, scales, biases, rotations and low rank."""
        return packed_linear_terms(rows, self.packed.panels, self.bias, terms)


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


def apply_one_by_one(group: ProjectionGroup, rows: Tensor, ctx: ForwardContext, step: VectorStep) -> Tensor:
    """``rows`` [T, K] -> [T, N] by operators that each round: base, scales, biases, rotations and low rank."""
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
