"""A projection group in a step whose rows with vectors are told by tables alone: Triton's form of ``vectors``.

The same sums in the same order as there: base product, scales and biases, rotations, low rank, sparse, blocks, each
rounded. One list serves all of them, for no operator here lets a row's bits depend on who else is in it. Where the
product adds onto the residual stream, rows with vectors are set aside first, so that what it adds onto is 0 for them
and they need no product of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from deltaserve.model.blocks import add_blocks
from deltaserve_kernels import (
    VectorRows,
    WorkList,
    fan_out,
    gather_members,
    lora_linear,
    put_back,
    scale_shift,
    scaled_input,
    set_aside,
    sparse_linear,
    turn_fanned,
    turn_rows,
)

if TYPE_CHECKING:
    from deltaserve.model.context import ForwardContext
    from deltaserve.model.linear import ProjectionGroup


def apply_rows(
    group: ProjectionGroup,
    rows: Tensor,
    work: WorkList,
    ctx: ForwardContext,
    step: VectorRows,
    residual: Tensor | None = None,
) -> Tensor:
    """``rows`` [T, K] -> [T, N], as ``ProjectionGroup.apply_terms``; ``work`` is the step's whole list."""
    members, depth = group.members, group.depth
    kept = None if residual is None else set_aside(residual, step)
    y = _product(group, rows, step, residual)
    outputs, rotations, linears = step.family.outputs, step.family.out_rotations, [member.linear for member in members]
    product = y.clone() if step.num_factors(rotations, linears) else y
    if step.may_have(outputs, linears):
        scale_shift(y, step.work, outputs, members, depth)
    if product is not y:
        turn_rows(y, product, step, rotations, members, depth)
    if ctx.lora is not None and work.concerns(ctx.lora, members):
        lora_linear(y, rows, work, ctx.lora, members, depth)
    if ctx.sparse is not None and work.concerns(ctx.sparse, members):
        sparse_linear(y, rows, work, ctx.sparse, members, depth)
    if ctx.blocks is not None:
        add_blocks(y, rows, work, ctx.blocks, members, depth)
    if kept is not None:
        put_back(y, kept, step)
    return y


def _product(group: ProjectionGroup, rows: Tensor, step: VectorRows, residual: Tensor | None) -> Tensor:
    """The base's product of each row as its linears are fed it."""
    members, inputs, rotations = group.members, step.family.inputs, step.family.in_rotations
    linears = [member.linear for member in members]
    has_own_inputs = step.may_have(inputs, linears) or step.num_factors(rotations, linears) > 0
    if not has_own_inputs or (len(members) > 1 and not step.fans_out):
        return group.weight.matmul(rows, group.bias, residual)
    if len(members) == 1:
        fed = scaled_input(rows, step, linears[0], group.depth)
        turn_rows(fed, rows, step, rotations, ((linears[0], 0, rows.shape[1]),), group.depth)
        return group.weight.matmul(fed, group.bias, residual)
    # All members, whoever wants an input of its own: a launch whose shape followed adapters would compile anew.
    fed = fan_out(rows, step, members, group.depth)
    turn_fanned(fed, rows, step, members, group.depth)
    y = gather_members(group.weight.matmul(fed, group.bias), step, members)
    return y if residual is None else residual.add_(y)
