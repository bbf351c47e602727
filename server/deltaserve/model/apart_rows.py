"""A projection group in a step whose rows with dense differences or modules are told by tables alone: Triton's form.

The same sums in the same order as in ``attach``. Where the product adds onto the residual stream, rows with a module at
the group's output are set aside first: a module needs the sublayer's output by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from deltaserve_kernels import ApartRows, WorkList, dense_rows, module_rows, put_module_rows_back, set_module_rows_aside

if TYPE_CHECKING:
    from deltaserve.model.context import ForwardContext
    from deltaserve.model.linear import ProjectionGroup


def apply_apart_rows(
    group: ProjectionGroup,
    rows: Tensor,
    work: WorkList,
    ctx: ForwardContext,
    step: ApartRows,
    residual: Tensor | None = None,
) -> Tensor:
    """``rows`` [T, K] -> [T, N], as ``attach.apply_apart``; ``work`` is the step's whole list."""
    ends, depth = group.ends, group.depth
    if ends.changes >= 0:
        rows = change_apart_rows(rows, step, ends.changes, depth)
    for point in ends.reads:
        ctx.inputs[point] = rows
    has_module = ends.gives >= 0 and step.may_have_module(ends.gives)
    kept = set_module_rows_aside(residual, step, ends.gives) if has_module and residual is not None else None
    y = group.apply_terms(rows, work, ctx, residual)
    if step.may_differ(group.members):
        dense_rows(y, rows, step, group.members, depth, group.weight.view)
    if has_module:
        module_rows(y, step, ends.gives, depth, ctx.inputs)
    if kept is not None:
        put_module_rows_back(y, kept, step, ends.gives)
    ctx.inputs.pop(ends.gives - 1, None)
    return y


def change_apart_rows(rows: Tensor, step: ApartRows, point: int, depth: float) -> Tensor:
    """``rows`` [T, H] with the modules at ``point`` added; the tensor itself stays as it is."""
    if not step.may_have_module(point):
        return rows
    changed = rows.clone()
    module_rows(changed, step, point, depth, {})
    return changed
