"""A projection group in a step whose rows with vectors are told by tables alone: Triton's form of ``vectors``.

The same sums in the same order as there: base product, scales and biases, low rank, sparse, blocks, each rounded. One
list serves all of them, for no operator here lets a row's bits depend on who else is in it. Where the product adds onto
the residual stream, rows with vectors are set aside first, so that what the product adds onto is 0 for them and they
need no product of their own.
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
    outputs = step.family.outputs
    if step.may_have(outputs, [member.linear for member in members]):
        scale_shift(y, step.work, outputs, members, depth)
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
    members, inputs = group.members, step.family.inputs
    if len(members) == 1:
        linear = members[0].linear
        if step.may_have(inputs, (linear,)):
            rows = scaled_input(rows, step, linear, group.depth)
        return group.weight.matmul(rows, group.bias, residual)
    if not step.fans_out or not step.may_have(inputs, [member.linear for member in members]):
        return group.weight.matmul(rows, group.bias, residual)
    # All members, whoever wants an input of its own: a launch whose shape followed adapters would compile anew.
    y = gather_members(group.weight.matmul(fan_out(rows, step, members, group.depth), group.bias), step, members)
    return y if residual is None else residual.add_(y)
