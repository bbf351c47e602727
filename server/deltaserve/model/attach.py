"""Attach points of residual modules, found by how the base calls its linears, not by names.

Per layer i: ``layers.i.attn_in``, what the attention's first projections are fed; ``layers.i.attn_out``, what its last
one gives; ``layers.i.mlp_in`` and ``layers.i.mlp_out`` likewise. ``embed_out`` is what the first layer is fed,
``final_hidden`` what the head reads. Where a base normalises or scales a sublayer's output before it joins the residual
stream, its ``_out`` lies before that.

A sublayer has points when it is one group of linears that are fed one tensor and then a single linear, both of the
hidden size at their outer ends. Where attention and MLP are fed the same tensor (parallel blocks with one norm), a
module may read it, but not change it for one of them: such a base has no ``_in`` points.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deltaserve.model.apart_rows import apply_apart_rows, change_apart_rows
from deltaserve.model.context import FoldedContext, ForwardContext, current_or_none
from deltaserve_kernels import ApartRows, ApartStep, WorkList, add_modules, dense_linear

if TYPE_CHECKING:
    from deltaserve.model.linear import BaseLinear, ProjectionGroup

EMBED_OUT = "embed_out"
FINAL_HIDDEN = "final_hidden"


@dataclass(slots=True)
class Ends:
    """The attach points at a group's ends, as numbers of the table of points and by name; none by default.

    ``changes``: the point at which its input may be changed. ``reads``: points whose tensor its input is.
    ``gives``: the point that its output is.
    """

    changes: int = -1
    reads: tuple[int, ...] = ()
    gives: int = -1
    names: tuple[str, ...] = ()
    """By number; shared by all groups of a base."""


def find_points(
    linears: Mapping[str, BaseLinear],
    attentions: Collection[str],
    prefix: str,
    num_layers: int,
    size: int,
    *,
    has_entry: bool,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All points by number, and those that modules may be attached to. Tells the groups of theirs.

    ``linears`` in order of calls; ``attentions`` are paths of the modules that attend; ``prefix`` that of the layers.
    ``has_entry``: the first layer takes hidden rows first. The last point is ``final_hidden``.
    """
    names: list[str] = []
    shared: set[str] = set()
    found: list[tuple[ProjectionGroup, ProjectionGroup]] = []
    for layer in range(num_layers):
        path = f"{prefix}.{layer}."
        inner = tuple(f"{name}." for name in attentions if name.startswith(path))
        of_layer = [name for name in linears if name.startswith(path)]
        for sublayer, is_attention in (("attn", True), ("mlp", False)):
            own = [linears[name] for name in of_layer if name.startswith(inner) == is_attention]
            ends = _ends_of(own, size)
            if ends is None:
                continue
            first, last = ends
            names += [f"layers.{layer}.{sublayer}_in", f"layers.{layer}.{sublayer}_out"]
            if len(first.members) + 1 != len(own):
                shared.add(names[-2])
            else:
                first.ends.changes = len(names) - 2
            first.ends.reads += (len(names) - 2,)
            last.ends.gives = len(names) - 1
            found.append((first, last))
    names += [EMBED_OUT, FINAL_HIDDEN] if has_entry else [FINAL_HIDDEN]
    for group in (group for pair in found for group in pair):
        group.ends.names = tuple(names)
    return tuple(names), tuple(name for name in names if name not in shared)


def _ends_of(own: list[BaseLinear], size: int) -> tuple[ProjectionGroup, ProjectionGroup] | None:
    """First group and last linear's group of one sublayer, or None when it is made in another way."""
    if not own:
        return None
    first = own[0].group
    rest = [linear for linear in own if linear.group is not first]
    if len(rest) != 1 or len(rest[0].group.members) != 1:
        return None
    return (first, rest[0].group) if own[0].in_features == rest[0].out_features == size else None


def apply_apart(
    group: ProjectionGroup,
    rows: Tensor,
    work: WorkList,
    ctx: ForwardContext,
    step: ApartStep | ApartRows,
    residual: Tensor | None = None,
) -> Tensor:
    """``ProjectionGroup.apply`` in a step where some rows have dense differences or residual modules."""
    if isinstance(step, ApartRows):
        return apply_apart_rows(group, rows, work, ctx, step, residual)
    ends, modules, weight = group.ends, step.family.modules, group.weight.view
    if ends.changes >= 0 and modules.has_any(ends.changes):
        rows = rows.clone()
        add_modules(rows, step, ends.changes, group.depth, {})
    for point in ends.reads:
        if step.reads(point + 1, point):  # for parallel modules: the tensor may be changed by then
            ctx.taps[point] = rows.clone()
    split = step.split_at(ends.gives) if ends.gives >= 0 else None
    if split is None or split.with_module is None or split.rows is None:
        y = group.apply_terms(rows, work, ctx, residual)
        dense_linear(y, rows, step, group.members, group.depth, weight)
        return y
    if residual is None:
        y = group.apply_terms(rows, work, ctx)
        dense_linear(y, rows, step, group.members, group.depth, weight)
        add_modules(y, step, ends.gives, group.depth, ctx.taps)
        return y
    # A module needs the sublayer's output by itself. All other rows are those of the product that adds onto the stream,
    # and theirs are the bits that they have in any other step.
    before = residual[split.rows]
    y, total = group.apply_both(rows, work, ctx, residual)
    dense_linear(y, rows, split.with_module, group.members, group.depth, weight)
    if split.without is not None:
        dense_linear(total, rows, split.without, group.members, group.depth, weight)
    add_modules(y, split.with_module, ends.gives, group.depth, ctx.taps)
    total[split.rows] = before + y[split.rows]
    return total


def change_rows(hidden: Tensor, step: ApartStep | ApartRows, point: int, depth: float) -> Tensor:
    """``hidden`` [T, H] with the modules at ``point`` added; the tensor itself stays as it is."""
    if isinstance(step, ApartRows):
        return change_apart_rows(hidden, step, point, depth)
    if not step.family.modules.has_any(point):
        return hidden
    changed = hidden.clone()
    add_modules(changed, step, point, depth, {})
    return changed


class EmbedPoint:
    """A hook before the first layer, which is given hidden rows [1, T, H] first: adds the modules at ``embed_out``."""

    def __init__(self, point: int) -> None:
        self.point = point

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        ctx = current_or_none()
        if isinstance(ctx, ForwardContext):
            if ctx.apart is None:
                return None
            return (change_rows(args[0][0], ctx.apart, self.point, 0.0)[None], *args[1:])
        if isinstance(ctx, FoldedContext) and EMBED_OUT in ctx.modules:
            return (args[0] + ctx.modules[EMBED_OUT](args[0]), *args[1:])
        return None


# ---- Folded mode: the same places, functions instead of tables ----


def folded_input(group: ProjectionGroup, x: Tensor, ctx: FoldedContext) -> Tensor:
    """``x`` [..., H] fp32 as the group's linears are fed it: with the module at its input added, if there is one."""
    ends = group.ends
    if ends.changes >= 0 and (module := ctx.modules.get(ends.names[ends.changes])) is not None:
        x = x + module(x)
    for point in ends.reads:
        ctx.taps[point] = x
    return x


def folded_output(group: ProjectionGroup, y: Tensor, ctx: FoldedContext) -> Tensor:
    """``y`` [..., H] fp32 with the module at the group's output added, if there is one."""
    if group.ends.gives < 0:
        return y
    name = group.ends.names[group.ends.gives]
    module = ctx.modules.get(name)
    if module is None:
        return y
    return y + module(ctx.taps[group.ends.gives - 1] if name in ctx.parallel else y)
